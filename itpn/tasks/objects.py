"""What a detector finds in images: as results in COCO's form, as numbers, as a report and as a picture."""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from itpn.data.coco import Coco
from itpn.data.detection import DetectionDataConfig, eval_loader
from itpn.data.picture import BadImageError
from itpn.engine.distributed import World
from itpn.engine.numerics import Precision, evaluating
from itpn.evaluate.detect import (
    NO_OBJECTS,
    Kind,
    Result,
    Scores,
    average_precision,
    gathered,
    results_of,
    to_original,
)
from itpn.heads.detect import Detector
from itpn.heads.masks import paste_masks
from itpn.heads.regions import Detections
from itpn.nn.linear import casting_once
from itpn.show.detect import annotated, comparison_picture, detected

NUM_PICTURED, LEAST_SHOWN = 6, 0.5
"""Images in a picture, and the lowest score of a detection in it."""


def found_in(
    detector: Detector,
    coco: Coco,
    data: DetectionDataConfig,
    *,
    batch_size: int,
    precision: Precision,
    world: World,
    on_bad: Callable[[BadImageError], None] | None = None,
    progress: str = "",
) -> list[Result]:
    """What a detector in evaluation mode finds in every image, each looked at once over all ranks: in COCO's
    form, on every rank.

    Args:
        progress: what a bar on the terminal calls this work; empty: no bar, as beside a run's live line.
    """
    results: list[Result] = []
    batches = eval_loader(
        coco,
        data,
        batch_size=batch_size,
        rank=world.rank,
        world_size=world.size,
        device=world.device,
        on_bad=on_bad,
        progress=progress,
    )
    with casting_once(world.device):
        for batch in batches:
            with evaluating(precision, world.device):
                found = detector.predict(batch["images"].to(world.device), batch["sizes"])
            for row, detections in enumerate(found):
                if batch["readable"][row]:
                    size, original = batch["sizes"][row], batch["original"][row]
                    results += _results(coco, int(batch["index"][row]), detections, size, original)
    return gathered(results, world.gather_json)


def _results(coco: Coco, index: int, found: Detections, size: Tensor, original: Tensor) -> list[Result]:
    """Detections in pixels of the image as it is in its file; masks are drawn one at a time."""
    boxes, scores, labels = (part.cpu() for part in found[:3])
    boxes = to_original(boxes, size, original)
    masks: Iterator[Tensor] | None = None
    if found.masks is not None:
        height, width = original.tolist()
        pairs = zip(found.masks.cpu(), boxes, strict=True)
        masks = (paste_masks(mask[None], box[None], (height, width))[0] for mask, box in pairs)
    return results_of(coco, index, boxes, scores, labels, masks)


def scores_of(coco: Coco, results: list[Result], masks: bool) -> list[Scores]:
    """COCO's numbers of boxes and, where the detector and the annotations have them, of masks."""
    kinds: tuple[Kind, ...] = ("box", "mask") if masks and coco.has_masks else ("box",)
    return [average_precision(coco, results, kind) for kind in kinds]


def numbers_of(scores: list[Scores]) -> dict[str, float]:
    """Those over all classes by name, without those of which there is nothing to find."""
    named = {name: value for part in scores for name, value in part.metrics().items()}
    return {name: value for name, value in named.items() if value != NO_OBJECTS}


def write_report(coco: Coco, scores: list[Scores], directory: Path, warnings: Sequence[str]) -> Path:
    """All numbers as report.json, over all classes and of each; null where there is nothing to find."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "report.json"
    rows: list[dict[str, Any]] = [category._asdict() for category in coco.categories]
    for part in scores:
        for row, (_, numbers) in zip(rows, part.by_class, strict=True):
            row |= _without_none({f"{part.kind}_{name}": value for name, value in numbers.items()})
    overall = {name: value for part in scores for name, value in _without_none(part.metrics()).items()}
    rest = {"images": len(coco), "warnings": [*warnings], "classes": rows}
    path.write_text(json.dumps({**overall, **rest}, indent=1) + "\n")
    return path


def _without_none(numbers: dict[str, float]) -> dict[str, float | None]:
    return {name: None if value == NO_OBJECTS else value for name, value in numbers.items()}


def pictured(coco: Coco) -> Coco:
    """A few images to look at, of those with objects if there are any."""
    chosen = np.flatnonzero(coco.objects.counts())
    chosen = chosen if len(chosen) else np.arange(len(coco))
    places = torch.linspace(0, len(chosen) - 1, min(NUM_PICTURED, len(chosen))).long().numpy()
    return coco.of_images(chosen[places], "images to look at")


def compared(coco: Coco, results: list[Result]) -> Image | None:
    """What is there beside what was found, for every image; None if none can be read."""
    images, truth, found, captions = [], [], [], []
    for index in range(len(coco)):
        own = [result for result in results if result["image_id"] == coco.image_ids[index]]
        with contextlib.suppress(BadImageError):
            with coco.open(index) as picture:
                images.append(picture.decode())
            truth.append(annotated(coco, index))
            found.append(detected(coco, own, LEAST_SHOWN))
            captions.append(coco.name(index).name)
    if not images:
        return None
    return comparison_picture(images, truth, found, captions, note=f"with a score of {LEAST_SHOWN} or more")
