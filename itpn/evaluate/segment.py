"""How well a model labels pixels: numbers from one confusion matrix of the whole data set."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from itpn.data.labelled import LabelledImages
from itpn.data.picture import Size
from itpn.data.progress import watched
from itpn.data.segmentation import OnBad, SegmentationDataConfig, eval_pairs
from itpn.errors import UserError, printable

SegmentFn = Callable[[Tensor, Size], Tensor]
"""Images uint8 [1, 3, h, w] on the device, and a size -> class ids long [1, height, width]."""

MAX_CLASSES = 1 << 13
"""Classes up to which the confusion matrix is of sane size (0.5 GB)."""


class ClassScore(NamedTuple):
    """One class. A number is NaN where there is nothing to count: `iou` of a class that is neither there nor
    predicted, `accuracy` of one that is not there."""

    name: str
    iou: float
    """Pixels rightly of the class, over all that are or are said to be of it."""
    accuracy: float
    """The share of the class's pixels that are found."""
    num_pixels: int
    """Pixels that are of the class."""


class SegmentationScores(NamedTuple):
    """Numbers in 0..1; means are over the classes whose number is not NaN, as published.

    They are NaN themselves where the labels are of fewer than two classes: always to say the same is right
    then, and tells nothing.
    """

    miou: float
    pixel_accuracy: float
    """The share of all labelled pixels that are right."""
    mean_accuracy: float
    classes: tuple[ClassScore, ...]
    num_images: int
    num_left_out: int
    """Images that could not be used."""

    @property
    def overall(self) -> dict[str, float]:
        """The numbers over all classes by name."""
        return {
            "miou": self.miou,
            "pixel_accuracy": self.pixel_accuracy,
            "mean_accuracy": self.mean_accuracy,
        }

    def numbers(self) -> dict[str, float]:
        """Numbers that could be measured, for the log."""
        return {name: number for name, number in self.overall.items() if not math.isnan(number)}


@torch.no_grad()
def evaluate_segmentation(
    segment: SegmentFn,
    images: LabelledImages,
    config: SegmentationDataConfig,
    *,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    on_bad: OnBad | None = None,
    progress: str = "",
) -> SegmentationScores:
    """Every labelled pixel counted once, at the size that its file has; the same on every rank.

    Args:
        progress: What a bar on the terminal calls this work; empty: no bar, as beside a run's live line.

    Raises:
        UserError: an image or its labels cannot be used, unless `config.skip_bad` leaves such out; there are
            too many classes for a confusion matrix.
    """
    num_classes = images.labelling.num_classes
    if num_classes > MAX_CLASSES:
        raise UserError(f"{num_classes:,} classes are too many to evaluate; at most {MAX_CLASSES:,} are")
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.long, device=device)
    seen = torch.zeros(2, dtype=torch.long, device=device)
    pairs = eval_pairs(images, config, rank=rank, world_size=world_size, device=device, on_bad=on_bad)
    num_mine = len(range(rank, len(images), world_size))
    for batch in watched(pairs, progress, num_mine) if progress else pairs:
        usable = "labels" in batch
        seen[0 if usable else 1] += 1
        if usable:
            labels = batch["labels"].to(device, non_blocking=True)
            size = (labels.shape[1], labels.shape[2])
            predicted = segment(batch["images"].to(device, non_blocking=True), size)
            matrix += confusion(labels, predicted, num_classes)
    if world_size > 1:
        dist.all_reduce(matrix)
        dist.all_reduce(seen)
    num_images, num_left_out = seen.tolist()
    return summed_up(matrix, images.labelling.class_names, num_images, num_left_out)


def confusion(labels: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """How many pixels of each class (row) were said to be of each (column), long [classes, classes].

    torchmetrics counts the same (the tests compare), but looks through all values first. Labels of any
    integer type and shape; those that are no class are not counted.
    """
    labelled = labels < num_classes
    pairs = labels[labelled].long() * num_classes + predicted[labelled].long()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def summed_up(
    matrix: Tensor, class_names: Sequence[str], num_images: int, num_left_out: int = 0
) -> SegmentationScores:
    """The scores of a confusion matrix, rows the truth."""
    counts = matrix.cpu().double()
    right, there, said = counts.diagonal(), counts.sum(1), counts.sum(0)
    iou, accuracy = right / (there + said - right), right / there
    rows = zip(class_names, iou.tolist(), accuracy.tolist(), there.long().tolist(), strict=True)
    overall = (float(iou.nanmean()), float(right.sum() / there.sum()), float(accuracy.nanmean()))
    miou, pixel_accuracy, mean_accuracy = overall if there.count_nonzero() > 1 else (math.nan,) * 3
    return SegmentationScores(
        miou=miou,
        pixel_accuracy=pixel_accuracy,
        mean_accuracy=mean_accuracy,
        classes=tuple(ClassScore(*row) for row in rows),
        num_images=num_images,
        num_left_out=num_left_out,
    )


def table(scores: SegmentationScores) -> str:
    """The three numbers, then a row per class, as text."""
    width = max(5, *(len(printable(row.name)) for row in scores.classes))
    left_out = f", {scores.num_left_out:,} left out" if scores.num_left_out else ""
    measured = sum(not math.isnan(row.iou) for row in scores.classes)
    found = (
        f"mIoU {scores.miou:.2%} over {measured:,} of {len(scores.classes):,} classes, pixel accuracy "
        f"{scores.pixel_accuracy:.2%}, mean accuracy {scores.mean_accuracy:.2%}"
        if scores.numbers()
        else "nothing can be measured, since the labels are of fewer than two classes,"
    )
    lines = [
        f"{found} on {scores.num_images:,} images{left_out}",
        f"{'class':{width}}  {'IoU':>6}  {'acc.':>6}  {'pixels':>6}",
    ]
    total = max(1, sum(row.num_pixels for row in scores.classes))
    for row in scores.classes:
        iou, accuracy = ("     -" if math.isnan(x) else f"{x:6.1%}" for x in (row.iou, row.accuracy))
        lines.append(f"{printable(row.name):{width}}  {iou}  {accuracy}  {row.num_pixels / total:6.2%}")
    return "\n".join(lines)
