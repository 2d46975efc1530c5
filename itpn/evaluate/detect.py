"""Average precision of detections, of boxes and of masks, as COCO counts it.

Detections travel as COCO's results do, {"image_id", "category_id", "bbox", "score", "segmentation"}, which is
JSON: ranks exchange it, files hold it, and other tools read it.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from faster_coco_eval import COCO, COCOeval_faster
from torch import Tensor

from itpn.data.coco import Category, Coco
from itpn.data.masks import Array, compressed, run_lengths
from itpn.errors import UserError, printable

Kind = Literal["box", "mask"]
Result = dict[str, Any]
Gather = Callable[[Any], list[Any]]
"""A JSON-able value of this rank -> those of all ranks."""

NO_OBJECTS = -1.0
"""COCO's number where there is nothing to find."""

MAX_DETECTIONS = (1, 10, 100)
"""Of an image that count, for AR1, AR10 and everything else."""

_ALL, _SMALL, _MEDIUM, _LARGE = range(4)
_IOUS = {"": slice(None), "50": slice(0, 1), "75": slice(5, 6)}


class Scores(NamedTuple):
    """COCO's twelve numbers by name, each in 0..1, or -1 where there is no such object."""

    kind: Kind
    overall: dict[str, float]
    by_class: list[tuple[Category, dict[str, float]]]

    def metrics(self) -> dict[str, float]:
        """The twelve, as box_AP, box_AP50, …"""
        return {f"{self.kind}_{name}": value for name, value in self.overall.items()}


def results_of(
    coco: Coco, index: int, boxes: Tensor, scores: Tensor, labels: Tensor, masks: Iterable[Tensor] | None
) -> list[Result]:
    """What was found in one image.

    Args:
        boxes: x1, y1, x2, y2 in pixels of the image as it is in its file, [n, 4]; see `to_original`.
        scores, labels: [n]
        masks: n of them, bool [H, W] of the same image, one at a time if they take much memory.
    """
    image = int(coco.image_ids[index])
    corners, opposite = boxes[:, :2].double(), boxes[:, 2:].double()
    rows = torch.cat([corners, opposite - corners], dim=1).tolist()
    found: list[Result] = [
        {"image_id": image, "category_id": coco.categories[label].id, "bbox": row, "score": score}
        for row, score, label in zip(rows, scores.tolist(), labels.tolist(), strict=True)
    ]
    if masks is not None:
        for result, mask in zip(found, masks, strict=True):
            result["segmentation"] = run_length_text(mask.cpu().numpy())
    return found


def to_original(boxes: Tensor, size: Tensor, original: Tensor) -> Tensor:
    """Boxes [n, 4] of an image that was scaled to `size` [2], in pixels of the original one.

    Args:
        size, original: Height and width.
    """
    return boxes * (original / size).flip(0).repeat(2).to(boxes)


def run_length_text(mask: Array) -> dict[str, Any]:
    """A mask, bool [H, W], as COCO's results hold it."""
    return {"size": list(mask.shape), "counts": compressed(run_lengths(mask)).decode()}


def gathered(results: Sequence[Result], gather: Gather) -> list[Result]:
    """Those of all ranks, image after image, so that their number and the split over them do not show."""
    every: list[Result] = [result for part in gather(list(results)) for result in part]
    return sorted(every, key=lambda result: int(result["image_id"]))


def write_results(path: Path, results: Sequence[Result]) -> None:
    try:
        path.write_text(json.dumps(results))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; name another file") from error


def average_precision(coco: Coco, results: Sequence[Result], kind: Kind) -> Scores:
    """COCO's numbers for detections of all images; an image without any counts as well.

    Crowds are neither found nor missed. The area of a mask's detection is that of the mask. Where an object
    has no mask, what lies in its box counts neither as found nor as wrong.

    Args:
        results: With masks, if it is they that are evaluated.
    """
    truth = COCO(_truth(coco, kind))
    evaluation = COCOeval_faster(
        truth, truth.loadRes(_detections(results, kind)), iouType="segm" if kind == "mask" else "bbox"
    )
    evaluation.params.maxDets = list(MAX_DETECTIONS)
    evaluation.evaluate()
    evaluation.accumulate()
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]
    return Scores(
        kind,
        _numbers(precision, recall),
        [
            (category, _numbers(precision[:, :, [label]], recall[:, [label]]))
            for label, category in enumerate(coco.categories)
        ],
    )


def _numbers(precision: Array, recall: Array) -> dict[str, float]:
    """From precision [ious, recalls, classes, areas, limits] and recall [ious, classes, areas, limits]."""
    areas = {"s": _SMALL, "m": _MEDIUM, "l": _LARGE}
    return {
        **{f"AP{name}": _mean(precision[ious, :, :, _ALL, -1]) for name, ious in _IOUS.items()},
        **{f"AP{name}": _mean(precision[..., area, -1]) for name, area in areas.items()},
        **{f"AR{most}": _mean(recall[..., _ALL, i]) for i, most in enumerate(MAX_DETECTIONS)},
        **{f"AR{name}": _mean(recall[..., area, -1]) for name, area in areas.items()},
    }


def _mean(values: Array) -> float:
    known = values[values > -1]
    return float(known.mean()) if len(known) else NO_OBJECTS


def _detections(results: Sequence[Result], kind: Kind) -> list[Result]:
    """Copies, to which the library adds. With a mask it would take the area of the box, were there one."""
    left_out = "bbox" if kind == "mask" else "segmentation"
    return [{name: value for name, value in result.items() if name != left_out} for result in results]


def _truth(coco: Coco, kind: Kind) -> dict[str, Any]:
    """What the images hold, as the library reads it; ids count from 1, since it takes 0 for none."""
    sizes = coco.sizes.tolist()
    ids = coco.image_ids.tolist()
    return {
        "images": [
            {"id": number, "height": size[0], "width": size[1]}
            for number, size in zip(ids, sizes, strict=True)
        ],
        "categories": [category._asdict() for category in coco.categories],
        "annotations": [
            {"id": number + 1, "image_id": image, **_object(coco, index, number, kind)}
            for index, image in enumerate(ids)
            for number in coco.objects.of(index)
        ],
    }


def _object(coco: Coco, index: int, number: int, kind: Kind) -> dict[str, Any]:
    objects = coco.objects
    x, y, width, height = box = objects.boxes[number].tolist()
    fields = {
        "category_id": coco.categories[objects.labels[number]].id,
        "bbox": box,
        "area": float(objects.areas[number]),
        "iscrowd": int(objects.crowd[number]),
    }
    if kind == "mask":
        match objects.outline(number):
            case None:
                corners = [x, y, x, y + height, x + width, y + height, x + width, y]
                fields |= {"segmentation": [corners], "iscrowd": 1}
            case list(polygons):
                fields["segmentation"] = [points.ravel().tolist() for points in polygons]
            case runs:
                fields["segmentation"] = {"size": list(coco.size(index)), "counts": compressed(runs).decode()}
    return fields


def table(scores: Sequence[Scores]) -> str:
    """The twelve numbers in percent, for boxes and for masks: over all classes, then of each class."""
    return "\n\n".join("\n".join(_lines(part)) for part in scores)


def _lines(scores: Scores) -> list[str]:
    rows = [("all classes", scores.overall)]
    rows += [(printable(category.name), numbers) for category, numbers in scores.by_class]
    width = max(len(name) for name, _ in rows)
    heading = "".join(f"{name:>7}" for name in scores.overall)
    lines = [f"{scores.kind:{width}}{heading}"]
    for name, numbers in rows:
        shown = (f"{100 * value:7.1f}" if value != NO_OBJECTS else f"{'-':>7}" for value in numbers.values())
        lines.append(f"{name:{width}}{''.join(shown)}")
    return lines
