"""Linear probe: how well one linear layer classifies with the features of a frozen model.

Every image is seen once, as its central crop. The features are standardised per channel; multinomial logistic
regression on them is convex, so that its optimum depends on no learning rate, order or seed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from itpn.data.classes import check_same_classes
from itpn.data.randomness import permutation
from itpn.data.source import Images
from itpn.errors import UserError
from itpn.evaluate.gather import OutputFn, Pass, gathered, outputs, summed

MAX_LOGITS = 1 << 26
"""Logits held at a time (256 MB), which bounds the memory for any size of the training split."""

HELD_OUT = 10
"""One training image in so many is held out to choose the L2 strength."""


@dataclass(frozen=True, kw_only=True)
class LinearConfig:
    l2: tuple[float, ...] = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
    """L2 strengths to choose from. Half of one, times the sum of squared weights, is added to the loss."""
    max_steps: int = 500
    """Largest number of L-BFGS iterations."""
    batch_size: int = 64
    """Images per rank and forward pass."""

    def __post_init__(self) -> None:
        if not self.l2 or min(self.l2) < 0 or self.max_steps < 1 or self.batch_size < 1:
            raise UserError(
                "linear.l2 takes one or more strengths, 0 or above; linear.max_steps and linear.batch_size "
                "must be positive"
            )


class Layer(NamedTuple):
    """The linear layer of a probe."""

    weight: Tensor
    """[classes, D]."""
    bias: Tensor
    """[classes]."""


def linear_probe(
    features_fn: OutputFn, train: Images, val: Images, config: LinearConfig, through: Pass
) -> dict[str, float]:
    """Top-1 and top-5 accuracy on `val`, each in 0..1, each image counted once, and the L2 strength chosen.

    The strength is the one with the most right answers on a tenth of `train`, which keeps the shares of the
    classes; the layer is then fitted on all of `train`. An unreadable image is left out of `train` and wrong
    in `val`. The same on every rank.
    """
    num_classes = len(check_same_classes(train, val))

    def features_of(images: Images, split: str) -> tuple[Tensor, Tensor]:
        return outputs(features_fn, images, config.batch_size, through, f"features of {split}")

    world_size = through.world_size
    features, labels = (gathered(mine, len(train), world_size) for mine in features_of(train, "train"))
    features, labels = features[labels >= 0], labels[labels >= 0]
    if len(labels) < 2:
        raise UserError("a linear probe needs two or more training images that can be read")
    deviation, mean = torch.std_mean(features, dim=0)
    deviation[deviation == 0] = 1
    features = features.sub_(mean).div_(deviation)

    l2, start = config.l2[0], None
    if len(config.l2) > 1:
        l2, start = choose_l2(features, labels, num_classes, config, through.rank, world_size)
    layer = fit(features, labels, num_classes, l2, config.max_steps, start)
    features, labels = features_of(val, "val")
    hits = count_hits(layer, features.sub_(mean).div_(deviation), labels)
    top1, top5 = summed(hits, world_size).tolist()
    return {"linear_top1": top1 / len(val), "linear_top5": top5 / len(val), "linear_l2": l2}


def choose_l2(
    features: Tensor, labels: Tensor, num_classes: int, config: LinearConfig, rank: int, world_size: int
) -> tuple[float, Layer]:
    """The strength that does best on held-out images, of equal ones the strongest, and its layer."""
    held = held_out(labels)
    kept, asked = (features[~held], labels[~held]), (features[held], labels[held])
    mine = slice(rank, None, world_size)  # the ranks' hits are summed, so that all of them choose alike
    layer, tried = None, []
    for l2 in sorted(config.l2, reverse=True):  # each starts from the optimum of a stronger one
        layer = fit(*kept, num_classes, l2, config.max_steps, layer)
        hits = summed(count_hits(layer, asked[0][mine], asked[1][mine]), world_size)
        tried.append((int(hits[0]), l2, layer))
    _, l2, layer = max(tried, key=lambda attempt: attempt[0])
    return l2, layer


def held_out(labels: Tensor) -> Tensor:
    """Which one image in ten is held out, bool [n]: as nearly as can be one in ten of every class."""
    order = permutation(0, 0, len(labels)).to(labels.device)
    order = order[labels[order].argsort(stable=True)]
    held = torch.zeros_like(labels, dtype=torch.bool)
    held[order[::HELD_OUT]] = True
    return held


def fit(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    l2: float,
    max_steps: int,
    start: Layer | None = None,
) -> Layer:
    """The layer of least mean cross-entropy plus l2 / 2 times the sum of squared weights, by L-BFGS.

    Args:
        features: [n, D], all of them in every step, though their logits are computed piece by piece.
        labels: long [n].
        start: Where to start from; None: zeros.
    """
    if start is None:
        start = Layer(features.new_zeros(num_classes, features.shape[1]), features.new_zeros(num_classes))
    layer = Layer(*(tensor.clone().requires_grad_() for tensor in start))
    optimizer = torch.optim.LBFGS(
        list(layer),
        max_iter=max_steps,
        tolerance_grad=1e-6,
        tolerance_change=1e-9,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        penalty = l2 / 2 * layer.weight.square().sum()
        torch.autograd.backward(penalty)
        total = penalty.detach()
        for some in chunks(len(labels), num_classes):
            part = cross_entropy(linear(features[some], *layer), labels[some], reduction="sum") / len(labels)
            torch.autograd.backward(part)
            total += part.detach()
        return total

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return Layer(*(tensor.detach() for tensor in layer))


def count_hits(layer: Layer, features: Tensor, labels: Tensor) -> Tensor:
    """How many labels are the best class, and among the best five: long [2]."""
    num_classes = len(layer.bias)
    hits = labels.new_zeros(2)
    for some in chunks(len(labels), num_classes):
        best = linear(features[some], *layer).topk(min(5, num_classes)).indices
        found = best == labels[some, None]
        hits += torch.stack([found[:, 0].sum(), found.sum()])
    return hits


def chunks(num_rows: int, num_classes: int) -> Iterator[slice]:
    size = max(1, MAX_LOGITS // num_classes)
    yield from (slice(start, start + size) for start in range(0, num_rows, size))
