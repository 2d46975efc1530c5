"""Reading COCO's `instances_*.json`: a file that is wrong is an error, a bad annotation is left out."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from itpn.data.coco import Category, Coco, Finding, Objects
from itpn.data.coco_entries import (
    Annotation,
    Entry,
    Frame,
    Id,
    annotation,
    brief,
    fields_of,
    id_in,
    ident,
    numbered,
    text,
)
from itpn.data.coco_images import Frames, frames_in, naming
from itpn.data.coco_json import list_in, read_json, what_to_do
from itpn.data.coco_units import check_units
from itpn.data.folders import Split, inside, splits_in
from itpn.data.source import Blobs, Names
from itpn.errors import UserError

MAX_OBJECTS = 10_000
"""In an image; their masks are cut out together, a hundredth of a megabyte each."""

SOME = 0.01
"""Share of annotations that are odd and kept, from which on they are warned of."""


BESIDE = "_annotations.coco.json"
"""The instances file beside the images of a split, as labelling services export it."""


def places(root: Path, split: Split) -> tuple[Path, Path]:
    """Where a split's folder of images and its instances file are; where COCO has them, if there are none.

    Single folders may lie around the data. A folder with the name of a split may hold both.
    """
    root = inside(root, lambda place: (place / "annotations").is_dir() or _with_annotations(place))
    if folder := _with_annotations(root).get(split):
        return folder, folder / BESIDE
    return root / f"{split}2017", root / "annotations" / f"instances_{split}2017.json"


def _with_annotations(root: Path) -> dict[str, Path]:
    """The folders of splits that hold their own instances file."""
    return {kind: path for kind, path in splits_in(root).items() if (path / BESIDE).is_file()}


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
                f"annotations/instances_{split}2017.json, or with a folder {split} that holds its images and "
                f"{BESIDE}; --data.{split}-{option} takes another place"
            )
    return read_coco(file, folder)


def read_coco(file: Path, folder: Path) -> Coco:
    """The annotations of the images in a folder.

    Raises:
        UserError: The file cannot be read, is no such file, names two images or categories alike or in an
            impossible way, or none of its images is in the folder; or no annotation can be used, or most
            boxes are in other units.
    """
    content = read_json(file)
    frames = frames_in(file, list_in(file, content, "images"), folder)
    categories, labels = _categories(file, list_in(file, content, "categories"))
    entries = list_in(file, content, "annotations")
    units = check_units(file, entries, frames.by_id)
    used, findings = _annotations(entries, frames.by_id, labels)
    if entries and not used:
        reason = f"entry {findings[0].place} of 'annotations': {findings[0].reason}"
        raise UserError(
            f"{file}: no annotation can be used; {reason}; {what_to_do(entries[0], findings[0].reason)}"
        )
    names = [frame.name for frame in frames.each]
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
        description=_description(file, frames, len(categories), used, findings),
        notes=(*frames.notes, *units, *_notes(findings, len(entries))),
        file=file,
        image_ids=np.array(numbered(frames.ids), np.int64),
        sizes=np.array([frame.size for frame in frames.each], np.int64),
        categories=categories,
        objects=_packed(used, len(names)),
        num_annotations=len(entries),
        findings=tuple(findings),
    )


def _description(
    file: Path, frames: Frames, num_classes: int, used: Sequence[Annotation], findings: Sequence[Finding]
) -> str:
    num_crowds = sum(found.crowd for found in used)
    said = (
        f"{len(frames.each):,} images with {len(used) - num_crowds:,} objects of {num_classes:,} classes"
        + f" and {num_crowds:,} crowds" * bool(num_crowds)
        + f" in {file}"
    )
    if findings:
        num_left_out = sum(finding.left_out for finding in findings)
        said += f"; {num_left_out:,} annotations left out and {len(findings) - num_left_out:,} odd ones kept"
        said += ": see itpn check-data --format coco"
    if numbered(frames.ids) != frames.ids:
        said += "; ids of images are no numbers of 64 bits, and results count images from 1, as in the file"
    return said


def _notes(findings: Sequence[Finding], num: int) -> list[str]:
    """What to say of bad and of odd annotations."""
    notes = []
    for left_out, what, least in (
        (True, "cannot be used and are left out", 0.0),
        (False, "are odd and kept", SOME),
    ):
        some = [finding for finding in findings if finding.left_out == left_out]
        if len(some) > least * num:
            first = f"{some[0].where}: {some[0].reason}"
            notes.append(f"{len(some):,} of {num:,} annotations {what}, such as {first}; correct them")
    return notes


def _categories(file: Path, entries: Sequence[object]) -> tuple[tuple[Category, ...], dict[Id, int]]:
    """In the order of their ids, and their labels by these and by names that are no ids.

    Raises:
        UserError: An entry is wrong, or there is none.
    """
    names: dict[Id, str] = {}
    for place, entry in enumerate(entries):
        with naming(file, place, "categories"):
            fields = fields_of(entry)
            number, name = ident(fields, "id"), text(fields, "name")
            if number in names:
                raise ValueError(f"id {number} is that of another category, {names[number]}")
        names[number] = name
    if not names:
        raise UserError(f"{file} has no categories, and objects must be of some; add them")
    are_numbers = all(isinstance(number, int) for number in names)
    ids = sorted(names, key=lambda number: (number if are_numbers else 0, str(number)))
    categories = tuple(map(Category, numbered(ids), [names[number] for number in ids]))
    counts = Counter(names.values())
    by_name = {names[number]: label for label, number in enumerate(ids) if counts[names[number]] == 1}
    return categories, by_name | {number: label for label, number in enumerate(ids)}


def _annotations(
    entries: Sequence[object], frames: Mapping[Id, Frame], labels: Mapping[Id, int]
) -> tuple[list[Annotation], list[Finding]]:
    """Those that can be used, and what is odd about these and about the others."""
    by_id: dict[Id, Annotation] = {}
    findings = []
    used = []
    for place, entry in enumerate(entries):
        name = image = ""
        try:
            fields = fields_of(entry)
            number = id_in(fields)
            name, image = "" if number is None else brief(number), _image(fields, frames)
            found, odd = annotation(fields, frames, labels)
            earlier = found if number is None else by_id.setdefault(number, found)
            if found is not earlier:
                if found == earlier:
                    raise ValueError("id: an exact copy of an earlier annotation")
                odd = odd or "id: that of an earlier annotation"
        except ValueError as error:
            findings.append(Finding(place, name, image, str(error), left_out=True))
            continue
        used.append(found)
        if odd:
            findings.append(Finding(place, name, image, odd, left_out=False))
    return used, findings


def _image(entry: Entry, frames: Mapping[Id, Frame]) -> str:
    """The name of an annotation's image; empty where there is none."""
    with suppress(ValueError):
        if frame := frames.get(ident(entry, "image_id")):
            return frame.name
    return ""


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
