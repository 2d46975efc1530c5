"""`itpn predict` with a detector: boxes, masks and labels of objects, as pictures and as COCO's JSON."""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from itpn.commands.predicting import Predict, sources_of, tell_unreadable
from itpn.data.classes import names_for
from itpn.data.coco import Category, Coco, Objects
from itpn.data.detection import DetectionDataConfig
from itpn.data.masks import runs_of_text
from itpn.data.picture import BadImageError, Size
from itpn.data.source import Blobs, Names
from itpn.data.views import MultiScale
from itpn.engine.distributed import World, choose_device
from itpn.errors import UserError, printable
from itpn.evaluate.detect import Result
from itpn.models import DetectorModel
from itpn.outputs import claim, distinct, writing
from itpn.show.detect import detected, objects_picture
from itpn.tasks.objects import found_in
from itpn.weights import files

NUM_SHOWN = 100
"""Images in the table on the terminal."""


def detect(model: DetectorModel, options: Predict) -> None:
    """Pictures, an instances file, and a table of what was found."""
    if options.embeddings or options.image_size:
        raise UserError(
            f"{options.model} is a detector: leave out --embeddings and --image-size, or write its backbone "
            "alone with itpn export"
        )
    out = options.out or Path("predictions")
    bad: list[BadImageError] = []
    paths, sizes = sized(options, bad)
    num_images = len(paths) + len(bad)
    if not paths:
        return tell_unreadable(bad, num_images)
    pictures = [out / f"{name}.png" for name in distinct(paths)]
    claim(("--json", options.json), *(("--out", path) for path in pictures))
    coco = unannotated(paths, sizes, categories_of(model))
    views = MultiScale() if model.views is None else files.structured(model.views, MultiScale, options.model)
    device = choose_device(options.device)
    results = found_in(
        model.to(device),
        coco,
        DetectionDataConfig(scale=views),
        batch_size=options.batch_size,
        precision="fp32",
        world=World(0, 1, device),
        on_bad=bad.append,
        progress="predicting",
    )
    results = [result for result in results if result["score"] >= options.min_score]
    drawn = [index for index in range(len(coco)) if coco.name(index) not in {error.path for error in bad}]
    _draw(coco, drawn, results, pictures, options.min_score)
    _show(coco, drawn, results, options.top)
    print(f"{printable(out)}: {len(drawn):,} pictures")
    tell_unreadable(bad, num_images)
    if options.json:
        with writing(options.json, "--json") as file:
            file.write_text(json.dumps(instances(coco, drawn, results)))


def sized(options: Predict, bad: list[BadImageError]) -> tuple[list[Path], list[Size]]:
    """Every image that can be opened, with height and width; the others are added to `bad`."""
    paths, sizes = [], []
    for images in sources_of(options.images):
        for index in range(len(images)):
            try:
                with images.open(index) as picture:
                    sizes.append(picture.size[::-1])
                    paths.append(images.name(index))
            except BadImageError as error:
                bad.append(error)
    return paths, sizes


def categories_of(model: DetectorModel) -> tuple[Category, ...]:
    """By class id; those of the annotations that the model was trained on, where it knows them."""
    names = names_for(model.classes, model.config.num_classes)
    ids = model.category_ids or range(1, len(names) + 1)
    return tuple(Category(number, name) for number, name in zip(ids, names, strict=True))


def unannotated(paths: Sequence[Path], sizes: Sequence[Size], categories: tuple[Category, ...]) -> Coco:
    """Images of which nothing is known but their sizes; their ids count from 1."""
    none = np.empty(0, np.int64)
    objects = Objects(
        first=np.zeros(len(paths) + 1, np.int64),
        ids=none,
        labels=none,
        boxes=np.empty((0, 4)),
        areas=np.empty(0),
        crowd=np.empty(0, np.bool_),
        masks=Blobs(),
    )
    return Coco(
        root=Path(),
        names=Names([str(path) for path in paths]),
        labels=None,
        class_names=None,
        description=f"{len(paths):,} images",
        file=Path(),
        image_ids=np.arange(1, len(paths) + 1),
        sizes=np.array(sizes, np.int64),
        categories=categories,
        objects=objects,
        num_annotations=0,
        findings=(),
    )


def instances(coco: Coco, images: Sequence[int], results: Sequence[Result]) -> dict[str, Any]:
    """What was found as a file of annotations, with scores, that COCO's tools and `itpn check-data` read."""
    sizes = coco.sizes.tolist()
    return {
        "images": [
            {"id": index + 1, "file_name": str(coco.name(index)), "height": height, "width": width}
            for index in images
            for height, width in [sizes[index]]
        ],
        "categories": [category._asdict() for category in coco.categories],
        "annotations": [
            {"id": number, **result, "area": _area(result), "iscrowd": 0}
            for number, result in enumerate(results, 1)
        ],
    }


def _area(result: Result) -> float:
    """Of the mask in pixels, or of the box."""
    if runs := result.get("segmentation"):
        return int(runs_of_text(runs["counts"].encode())[1::2].sum())
    width, height = result["bbox"][2:]
    return float(width * height)


def _draw(
    coco: Coco,
    images: Sequence[int],
    results: Sequence[Result],
    pictures: Sequence[Path],
    least_score: float,
) -> None:
    """Draws each image with its objects."""
    by_image: dict[int, list[Result]] = defaultdict(list)
    for result in results:
        by_image[result["image_id"]].append(result)
    for index in images:
        with coco.open(index) as picture:
            image = picture.decode()
        with writing(pictures[index]) as file:
            objects_picture(image, detected(coco, by_image[index + 1], least_score)).save(file)


def _show(coco: Coco, images: Sequence[int], results: Sequence[Result], most: int) -> None:
    """How many objects of which classes, on the terminal."""
    names = {category.id: category.name for category in coco.categories}
    counts: dict[int, Counter[str]] = defaultdict(Counter)
    for result in results:
        counts[result["image_id"]][names[result["category_id"]]] += 1
    table = Table("image", "objects", box=None, padding=(0, 2, 0, 0))
    for index in images[:NUM_SHOWN]:
        found = counts[index + 1]
        listed = ", ".join(f"{number} {name}" for name, number in found.most_common(most)) or "none"
        more = f", and {len(found) - most} other classes" if len(found) > most else ""
        table.add_row(printable(coco.name(index)), printable(listed + more))
    Console(highlight=False, markup=False, soft_wrap=True).print(table)
    if len(images) > NUM_SHOWN:
        print(f"showing the first {NUM_SHOWN} of {len(images):,} images; --json FILE writes all")
