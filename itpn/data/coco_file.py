"""Reading COCO's `instances_*.json`: a file that is wrong is an error, a bad annotation is left out."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from itpn.data.coco import Category, Coco, Finding, Objects
from itpn.data.coco_entries import Annotation, Entry, Frame, annotation, brief, fields_of, text, whole
from itpn.data.folders import Split
from itpn.data.source import Blobs, Names
from itpn.errors import UserError

MAX_JSON_BYTES = 1 << 33
"""The longest file that is read; it takes about six times as much memory meanwhile."""

MAX_OBJECTS = 10_000
"""In an image; their masks are cut out together, a hundredth of a megabyte each."""

MAX_SIDE = 1 << 31
"""Of an image, in pixels."""


def places(root: Path, split: Split) -> tuple[Path, Path]:
    """Where COCO has a split's folder of images and its instances file."""
    return root / f"{split}2017", root / "annotations" / f"instances_{split}2017.json"


def find_coco(root: Path, split: Split, images: Path | None = None, annotations: Path | None = None) -> Coco:
    """The images and annotations of a split: those named, or those at COCO's places below `root`.

    Raises:
        UserError: A folder or file is missing, or the file is not what it should be.
    """
    folder, file = places(root, split)
    folder, file = images or folder, annotations or file
    for path, is_there, option in (
        (folder, folder.is_dir(), "images"),
        (file, file.is_file(), "annotations"),
    ):
        if not is_there:
            raise UserError(
                f"there is no {path}; --data.root takes a folder with {split}2017 and "
                f"annotations/instances_{split}2017.json, --data.{split}-{option} another place"
            )
    return read_coco(file, folder)


def read_coco(file: Path, folder: Path) -> Coco:
    """The annotations of the images in a folder.

    Raises:
        UserError: The file cannot be read, is no such file, names an image or category twice or in an
            impossible way, or none of its images is in the folder; or no annotation can be used.
    """
    content = _read_json(file)
    frames, categories = _frames(file, content), _categories(file, content)
    names = [frame.name for frame in frames.values()]
    if not any((folder / name).is_file() for name in names):
        raise UserError(f"none of the images of {file} is in {folder}, such as {names[0]}; name their folder")
    entries = _list(file, content, "annotations")
    used, findings = _annotations(entries, frames, categories)
    if entries and not used:
        reason = f"entry {findings[0].place} of 'annotations': {findings[0].reason}"
        raise UserError(f"{file}: no annotation can be used; {reason}; name an instances file")
    most, count = Counter(found.image for found in used).most_common(1)[0] if used else (0, 0)
    if count > MAX_OBJECTS:
        raise UserError(
            f"{file}: image {names[most]} has {count:,} annotations, more than the limit of {MAX_OBJECTS:,}"
        )
    return Coco(
        root=folder,
        names=Names(names),
        labels=None,
        class_names=None,
        description=_description(file, len(names), len(categories), used, findings),
        file=file,
        image_ids=np.array(list(frames), np.int64),
        sizes=np.array([frame.size for frame in frames.values()], np.int64),
        categories=categories,
        objects=_packed(used, len(frames)),
        num_annotations=len(entries),
        findings=tuple(findings),
    )


def _description(
    file: Path, num_images: int, num_classes: int, used: Sequence[Annotation], findings: Sequence[Finding]
) -> str:
    num_crowds = sum(found.crowd for found in used)
    parts = [f"{num_images:,} images with {len(used) - num_crowds:,} objects of {num_classes:,} classes"]
    parts += [f"and {num_crowds:,} crowds"] * bool(num_crowds)
    num_left_out = sum(finding.left_out for finding in findings)
    said = f"{num_left_out:,} annotations left out and {len(findings) - num_left_out:,} odd ones kept"
    return (
        " ".join(parts) + f" in {file}" + (f"; {said}: see itpn check-data --format coco" if findings else "")
    )


def _read_json(file: Path) -> Mapping[str, Any]:
    try:
        num_bytes = file.stat().st_size
        content = json.loads(file.read_bytes()) if num_bytes <= MAX_JSON_BYTES else None
    except OSError as error:
        raise UserError(
            f"cannot read {file}: {error.strerror}; check the path and its permissions"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON: {error}; write or download it again") from error
    if num_bytes > MAX_JSON_BYTES:
        raise UserError(
            f"{file}: {num_bytes:,} bytes are more than the limit of {MAX_JSON_BYTES:,}; split it"
        )
    if isinstance(content, list):
        raise UserError(f"{file} is a list, as files of detections are; name the file of annotations")
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no object with images, annotations and categories")
    return content


def _list(file: Path, content: Mapping[str, Any], name: str) -> Sequence[object]:
    entries = content.get(name)
    if not isinstance(entries, list):
        found = ", ".join(brief(key) for key in list(content)[:5]) or "nothing"
        raise UserError(f"{file} has no list {name!r}, but {found}; name a COCO instances file")
    return entries


def _frames(file: Path, content: Mapping[str, Any]) -> dict[int, Frame]:
    """The images by their ids, in the order of the file."""
    frames: dict[int, Frame] = {}
    for place, entry in enumerate(_list(file, content, "images")):
        try:
            fields = fields_of(entry)
            number, name = whole(fields, "id"), text(fields, "file_name")
            size = whole(fields, "height", 1, MAX_SIDE), whole(fields, "width", 1, MAX_SIDE)
            if number in frames:
                raise ValueError(f"id {number} is that of another image, {frames[number].name}")
        except ValueError as error:
            raise UserError(f"{file}: entry {place} of 'images': {error}; correct it") from error
        frames[number] = Frame(len(frames), name, size)
    if not frames:
        raise UserError(f"{file} has no images; name another file")
    return frames


def _categories(file: Path, content: Mapping[str, Any]) -> tuple[Category, ...]:
    """In the order of their ids."""
    categories: dict[int, Category] = {}
    for place, entry in enumerate(_list(file, content, "categories")):
        try:
            fields = fields_of(entry)
            number, name = whole(fields, "id"), text(fields, "name")
            if number in categories:
                raise ValueError(f"id {number} is that of another category, {categories[number].name}")
        except ValueError as error:
            raise UserError(f"{file}: entry {place} of 'categories': {error}; correct it") from error
        categories[number] = Category(number, name)
    if not categories:
        raise UserError(f"{file} has no categories, and objects must be of some; add them")
    return tuple(categories[number] for number in sorted(categories))


def _frame(entry: Entry, frames: Mapping[int, Frame]) -> Frame | None:
    number = entry.get("image_id")
    return frames.get(number) if type(number) is int else None


def _annotations(
    entries: Sequence[object], frames: Mapping[int, Frame], categories: Sequence[Category]
) -> tuple[list[Annotation], list[Finding]]:
    """Those that can be used, and what is odd about these and about the others."""
    labels = {category.id: label for label, category in enumerate(categories)}
    by_id: dict[int, Annotation] = {}
    findings = []
    used = []
    for place, entry in enumerate(entries):
        name = image = ""
        try:
            fields = fields_of(entry)
            number, frame = fields.get("id"), _frame(fields, frames)
            name, image = brief(number) if type(number) is int else "", frame.name if frame else ""
            found, odd = annotation(fields, frames, labels)
            earlier = by_id.setdefault(found.id, found)
            if found is not earlier:
                if found == earlier:
                    raise ValueError("id: an exact copy of an earlier annotation")
                odd = "id: that of an earlier annotation"
        except ValueError as error:
            findings.append(Finding(place, name, image, str(error), left_out=True))
            continue
        used.append(found)
        if odd:
            findings.append(Finding(place, name, image, odd, left_out=False))
    return used, findings


def _packed(annotations: Sequence[Annotation], num_images: int) -> Objects:
    order = sorted(annotations, key=lambda found: found.image)  # stable: the file's order within an image
    images = np.array([found.image for found in order], np.int64)
    return Objects(
        first=np.searchsorted(images, np.arange(num_images + 1)),
        ids=np.array([found.id for found in order], np.int64),
        labels=np.array([found.label for found in order], np.int64),
        boxes=np.array([found.box for found in order], np.float64).reshape(-1, 4),
        areas=np.array([found.area for found in order], np.float64),
        crowd=np.array([found.crowd for found in order], np.bool_),
        masks=Blobs([found.mask for found in order]),
    )
