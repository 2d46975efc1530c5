"""How well a classifier classifies: predictions for all images of a split, and what they are worth."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from itpn.data.source import Images
from itpn.errors import UserError
from itpn.evaluate.gather import OutputFn, Pass, gathered, outputs

NUM_BINS = 15


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions for all images of a split, in its order."""

    index: Tensor
    """The image's number in the split: long [n]."""
    labels: Tensor
    """The true class: long [n]; -1 if it is unknown or the image cannot be read."""
    logits: Tensor
    """fp32 [n, classes]."""


class ClassResult(NamedTuple):
    """What became of one class's images."""

    name: str
    images: int
    top1: float
    """Share that was recognised; NaN without images."""
    confusion: str
    """The class that most of the others were taken for; empty if there are no others."""
    confused: int
    """How many were taken for that one."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Report:
    """Quality of the predictions. Shares and accuracies are in 0..1.

    An unreadable image is wrong in `top1` and `top5`; the rest is of the images that could be read.
    """

    images: int
    unreadable: int
    top1: float
    top5: float
    """With fewer than five classes, the truth is always among the best five."""
    loss: float
    """Mean cross-entropy."""
    ece: float
    """Expected calibration error: how far confidence and accuracy lie apart, weighted over the bins."""
    class_top1: float
    """Mean of the classes' accuracies, each class counting alike; of those that have images."""
    classes: tuple[ClassResult, ...]
    confusion: Tensor
    """Images by true class (rows) and predicted class (columns): long [classes, classes]."""
    reliability: Tensor
    """Per bin of confidence, number of images, mean confidence and accuracy: fp64 [15, 3]."""

    @property
    def tells(self) -> bool:
        """Whether there are images of two classes or more: of one, always to say the same is right."""
        return sum(result.images > 0 for result in self.classes) > 1


def predict(
    logits_fn: OutputFn, images: Images, batch_size: int, through: Pass, progress: str = ""
) -> Predictions:
    """Logits of every image exactly once, on the CPU, the same on every rank.

    Args:
        logits_fn: Images uint8 [B, 3, H, W] on the device -> logits [B, classes]; in evaluation mode.
        progress: see `itpn.evaluate.gather.outputs`.
    """
    logits, labels = outputs(logits_fn, images, batch_size, through, progress)
    logits, labels = (gathered(mine, len(images), through.world_size).cpu() for mine in (logits, labels))
    return Predictions(torch.arange(len(images)), labels, logits)


def report(predictions: Predictions, class_names: Sequence[str]) -> Report:
    """What predictions are worth, measured against the labels.

    Raises:
        UserError: there are no labels, other classes than logits, or logits that are not finite.
    """
    labels, logits = predictions.labels, predictions.logits
    num_images, num_classes = logits.shape
    if not len(class_names) == num_classes > int(labels.max()):
        raise UserError(
            f"the model has {num_classes:,} classes, but the images have {len(class_names):,} class names "
            f"and labels up to {int(labels.max())}"
        )
    readable = labels >= 0
    logits, labels = logits[readable], labels[readable]
    if not len(labels):
        raise UserError("there is nothing to evaluate: no image has a label and can be read")
    if not_finite := int((~logits.isfinite().all(1)).sum()):
        raise UserError(f"the model's output is not finite for {not_finite:,} of {num_images:,} images")

    best = logits.topk(min(5, num_classes)).indices
    hits = best == labels[:, None]
    confusion = torch.bincount(labels * num_classes + best[:, 0], minlength=num_classes**2)
    confusion = confusion.view(num_classes, num_classes)
    classes = tuple(_class_results(confusion, class_names))
    reliability = _reliability(logits.softmax(1).amax(1), hits[:, 0])
    num_per_bin, confidence, accuracy = reliability.unbind(1)
    return Report(
        images=num_images,
        unreadable=num_images - len(labels),
        top1=int(hits[:, 0].sum()) / num_images,
        top5=int(hits.sum()) / num_images,
        loss=float(cross_entropy(logits, labels)),
        ece=float((num_per_bin * (confidence - accuracy).abs()).sum()) / len(labels),
        class_top1=_mean([result.top1 for result in classes if result.images]),
        classes=classes,
        confusion=confusion,
        reliability=reliability,
    )


def scores(report: Report) -> dict[str, float]:
    """The numbers of a report under their names in `metrics.jsonl`; no accuracy of a single class."""
    accuracy = {"val_top1": report.top1, "val_top5": report.top5} if report.tells else {}
    return accuracy | {"val_loss": report.loss, "val_ece": report.ece}


def _class_results(confusion: Tensor, class_names: Sequence[str]) -> list[ClassResult]:
    totals, right = confusion.sum(1).tolist(), confusion.diagonal().tolist()
    confused, confusions = (confusion - confusion.diagonal().diag()).max(1)
    return [
        ClassResult(
            name,
            totals[i],
            right[i] / totals[i] if totals[i] else math.nan,
            class_names[int(confusions[i])] if confused[i] else "",
            int(confused[i]),
        )
        for i, name in enumerate(class_names)
    ]


def _reliability(confidence: Tensor, right: Tensor) -> Tensor:
    """See `Report`. The bins are equally wide; torchmetrics, which agrees, keeps only the error of them."""
    bins = (confidence * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    columns = torch.stack([torch.ones_like(confidence), confidence, right.float()], dim=1).double()
    sums = columns.new_zeros(NUM_BINS, 3).index_add_(0, bins, columns)
    return torch.cat([sums[:, :1], sums[:, 1:] / sums[:, :1].clamp(min=1)], dim=1)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
