"""The bundled clip art, written as three data sets in the formats users have: image folder, COCO, ADE20K.

Every byte is a function of the seed (and of the versions of NumPy and Pillow). Train images are made of
cut-outs of the train split only, val images of those of the val split.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from rich import get_console
from rich.progress import track

from itpn.data.sample_cutouts import SPLITS, index, load_cutouts, place
from itpn.data.sample_scenes import Scene, ade20k_labels, bounding_box, coco_annotations, compose
from itpn.data.textures import STUFF
from itpn.errors import UserError
from itpn.outputs import adding

IMAGE_SIZE = 96
SHEET = "contact-sheet.png"
FOLDER_STREAM, SCENE_STREAM = range(2)  # keeps the random numbers of the two kinds of images apart
T = TypeVar("T")


class Written(NamedTuple):
    """What `write_sample` made: counts, and the picture to look at first."""

    num_images: dict[str, int]
    num_scenes: dict[str, int]
    num_things: dict[str, int]
    class_names: list[str]
    contact_sheet: Path


def write_sample(
    directory: Path, *, seed: int = 0, num_train_scenes: int = 400, num_val_scenes: int = 100
) -> Written:
    """Write DIRECTORY/imagefolder, DIRECTORY/coco, DIRECTORY/ade20k and DIRECTORY/contact-sheet.png.

    Raises:
        UserError: the directory cannot be written, or holds another file of one of these names.
    """
    names = index()["classes"]
    with adding(directory, "DIR") as folder:
        num_images = write_imagefolder(folder / "imagefolder", seed)
        scenes = {
            split: _compose_all(split, count, seed)
            for split, count in zip(SPLITS, (num_train_scenes, num_val_scenes), strict=True)
        }
        num_things = write_coco(folder / "coco", scenes, names)
        write_ade20k(folder / "ade20k", scenes, names)
        _contact_sheet(folder / "imagefolder", scenes["train"][:6], names).save(folder / SHEET)
    num_scenes = {split: len(scenes[split]) for split in SPLITS}
    return Written(num_images, num_scenes, num_things, names, directory / SHEET)


def write_imagefolder(directory: Path, seed: int = 0, repeats: int = 1) -> dict[str, int]:
    """Write DIRECTORY/{train,val}/CLASS/*.jpg, 96 x 96, and return the number of images per split.

    Args:
        repeats: images per train cut-out, each on another background; every val cut-out is used once.
    """
    counts = {}
    for stream, split in enumerate(SPLITS):
        folders = [_folder(directory / split / name) for name in index()["classes"]]
        copies = range(repeats if split == "train" else 1)
        jobs = [(i, cutout, copy) for i, cutout in enumerate(load_cutouts(split)) for copy in copies]
        for i, cutout, copy in _watch(jobs, f"images, {split}"):
            image = place(
                cutout.image, IMAGE_SIZE, np.random.default_rng([seed, FOLDER_STREAM, stream, i, copy])
            )
            image.save(folders[cutout.label] / f"{cutout.name}_{copy}.jpg", quality=92)
        counts[split] = len(jobs)
    return counts


def write_coco(directory: Path, scenes: dict[str, list[Scene]], names: list[str]) -> dict[str, int]:
    """Write DIRECTORY/{train,val}2017/*.jpg and DIRECTORY/annotations; return how many things each has."""
    annotation_folder = _folder(directory / "annotations")
    counts = {}
    image_id = annotation_id = 1
    for split in SPLITS:
        folder = _folder(directory / f"{split}2017")
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for scene in _watch(scenes[split], f"COCO, {split}"):
            file = f"{image_id:012d}.jpg"
            scene.image.save(folder / file, quality=92)
            width, height = scene.image.size
            images.append({"id": image_id, "file_name": file, "width": width, "height": height})
            annotations += coco_annotations(scene, image_id, annotation_id + len(annotations))
            image_id += 1
        annotation_id += len(annotations)
        counts[split] = len(annotations)
        content = {
            "info": {"description": "itpn sample data", "version": "1.0", "year": 2026},
            "licenses": [{"id": 1, "name": "public domain", "url": "https://openclipart.org"}],
            "images": images,
            "annotations": annotations,
            "categories": [
                {"id": i, "name": name, "supercategory": "clip art"} for i, name in enumerate(names, 1)
            ],
        }
        (annotation_folder / f"instances_{split}2017.json").write_text(json.dumps(content))
    return counts


def write_ade20k(directory: Path, scenes: dict[str, list[Scene]], names: list[str]) -> None:
    """Write DIRECTORY/ADEChallengeData2016: images, label pictures, and the table of class names."""
    root = directory / "ADEChallengeData2016"
    class_names = [*names, *STUFF]
    present = {split: np.zeros(len(class_names) + 1, int) for split in SPLITS}
    pixels = np.zeros(len(class_names) + 1, int)
    for split, long_name in zip(SPLITS, ("training", "validation"), strict=True):
        image_folder, label_folder = (_folder(root / kind / long_name) for kind in ("images", "annotations"))
        for i, scene in enumerate(_watch(scenes[split], f"ADE20K, {split}"), 1):
            labels = ade20k_labels(scene, len(names))
            scene.image.save(image_folder / f"ADE_{split}_{i:08d}.jpg", quality=92)
            Image.fromarray(labels).save(label_folder / f"ADE_{split}_{i:08d}.png")
            area = np.bincount(labels.ravel(), minlength=len(class_names) + 1)
            pixels += area
            present[split] += area > 0
    rows = ["Idx\tRatio\tTrain\tVal\tStuff\tName"]
    for i, name in enumerate(class_names, 1):
        ratio = pixels[i] / max(1, pixels.sum())
        rows.append(
            f"{i}\t{ratio:.4f}\t{present['train'][i]}\t{present['val'][i]}\t{int(i > len(names))}\t{name}"
        )
    (root / "objectInfo150.txt").write_text("\n".join(rows) + "\n")


def _compose_all(split: str, count: int, seed: int) -> list[Scene]:
    cutouts = load_cutouts(split)
    by_label = [[c for c in cutouts if c.label == label] for label in range(len(index()["classes"]))]
    stream = SPLITS.index(split)
    return [
        compose(by_label, np.random.default_rng([seed, SCENE_STREAM, stream, i]))
        for i in _watch(range(count), f"scenes, {split}")
    ]


def _folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}; name another directory") from error
    return path


def _watch(jobs: Iterable[T], description: str) -> Iterable[T]:
    quiet = not get_console().is_terminal
    return track(list(jobs), description=f"{description:15s}", transient=True, disable=quiet)


def _contact_sheet(imagefolder: Path, scenes: list[Scene], names: list[str]) -> Image.Image:
    """Left one row of train images per class, right a few scenes: plain, with boxes, with labels."""
    tile, columns, side = 64, 8, 200
    left = 80 + columns * (tile + 2)
    height = max(len(names) * (tile + 2), len(scenes) * (side + 2))
    sheet = Image.new("RGB", (left + 3 * (side + 2) + 8, height), "white")
    draw = ImageDraw.Draw(sheet)
    for row, name in enumerate(names):
        draw.text((4, row * (tile + 2) + tile // 2 - 6), name, fill="black")
        for column, path in enumerate(sorted((imagefolder / "train" / name).glob("*.jpg"))[:columns]):
            with Image.open(path) as small:
                sheet.paste(small.resize((tile, tile)), (80 + column * (tile + 2), row * (tile + 2)))
    for row, scene in enumerate(scenes):
        for column, image in enumerate((scene.image, _with_boxes(scene, names), _coloured(scene, names))):
            sheet.paste(
                ImageOps.contain(image, (side, side)), (left + 8 + column * (side + 2), row * (side + 2))
            )
    return sheet


def _with_boxes(scene: Scene, names: list[str]) -> Image.Image:
    image = scene.image.copy()
    draw = ImageDraw.Draw(image)
    for thing in scene.things:
        x, y, width, height = bounding_box(thing.mask)
        draw.rectangle((x, y, x + width - 1, y + height - 1), outline="yellow")
        draw.text((x + 2, y), names[thing.label], fill="yellow", stroke_width=1, stroke_fill="black")
    return image


def _coloured(scene: Scene, names: list[str]) -> Image.Image:
    colours = np.random.default_rng(0).integers(40, 256, (len(names) + len(STUFF) + 1, 3), dtype=np.uint8)
    colours[0] = 0
    return Image.fromarray(colours[ade20k_labels(scene, len(names))])
