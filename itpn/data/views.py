"""What detection sees of images: which part at which scale, mirrored or not, and how it is padded.

Sizes are height and width, int64 [n, 2]; boxes of whole pixels are left, top, width, height, int64 [n, 4].
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from itpn.errors import UserError

Array = NDArray[Any]

STRIDE = 32
"""The images' padded sides are multiples of this."""

NUM_DRAWS = 8
"""Uniform numbers that a view is made of."""

ASPECTS = (4 / 3, 5 / 3)
"""Of padded sizes, long to short; the most frequent ones of photographs fit without much waste."""


@dataclass(frozen=True, kw_only=True)
class MultiScale:
    """The published augmentation of detection (that of DETR), and the one scale of its evaluation."""

    flip: float = 0.5
    """Probability of mirroring an image."""
    short_sides: tuple[int, ...] = tuple(range(480, 801, 32))
    """Lengths in pixels that an image's shorter side is scaled to, one at random."""
    max_side: int = 1333
    """The longer side is never longer; the shorter one is shortened for it."""
    crop: float = 0.5
    """Probability of seeing a random part: the image is scaled to one of `crop_short_sides`, cut to random
    sides of `crop_sides`, and the part scaled as a whole image is."""
    crop_short_sides: tuple[int, ...] = (400, 500, 600)
    """Lengths of the shorter side before the cut."""
    crop_sides: tuple[int, int] = (384, 600)
    """Least and greatest length of a part's sides, before it is scaled."""
    eval_short_side: int = 800
    """Length of the shorter side in evaluation."""
    num_short_sides: int = 3
    """Padded sizes have this many different shorter sides; more pad less, and compile more often."""

    def __post_init__(self) -> None:
        for name in ("flip", "crop"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"data.scale.{name} is {getattr(self, name)}; it is a probability, in [0, 1]")
        for name in ("short_sides", "crop_short_sides"):
            sides = getattr(self, name)
            if not sides or min(sides) < 1:
                raise UserError(f"data.scale.{name} is {sides}; it takes one or more lengths in pixels")
        if not 1 <= self.crop_sides[0] <= self.crop_sides[1]:
            raise UserError(f"data.scale.crop_sides is {self.crop_sides}; the least side comes first")
        for name in ("max_side", "eval_short_side", "num_short_sides"):
            if getattr(self, name) < 1:
                raise UserError(f"data.scale.{name} is {getattr(self, name)}; it must be at least 1")


class Views(NamedTuple):
    boxes: Array
    """The parts of the images that are seen."""
    sizes: Array
    """What they are scaled to."""
    mirrored: Array
    """bool [n]"""


def random_views(sizes: Array, draws: Array, scale: MultiScale) -> Views:
    """A view of each image for training.

    Args:
        draws: Uniform in [0, 1), [n, 8].
    """
    cut = draws[:, 1] < scale.crop
    boxes = np.where(cut[:, None], _cut(sizes, draws[:, 2:7], scale), _whole(sizes))
    short = _chosen(scale.short_sides, draws[:, 7])
    return Views(boxes, scaled(boxes[:, :1:-1], short, scale), draws[:, 0] < scale.flip)


def whole_views(sizes: Array, scale: MultiScale) -> Views:
    """That of each image in evaluation."""
    return Views(
        _whole(sizes), scaled(sizes, np.array(scale.eval_short_side), scale), np.zeros(len(sizes), np.bool_)
    )


def scaled(sizes: Array, short: Array, scale: MultiScale) -> Array:
    """Sizes with the shorter side made `short`, as long as the longer one stays below the greatest length."""
    factor = np.minimum(short / sizes.min(1), scale.max_side / sizes.max(1))
    rounded: Array = np.maximum(1, np.floor(sizes * factor[:, None] + 0.5)).astype(np.int64)
    return rounded


def shrunk(size: Array, most: Array) -> Array:
    """A size [2] that is made to fit into another one, with its aspect."""
    factor = min(1.0, float((most / size).min()))
    smaller: Array = np.clip(np.floor(size * factor + 0.5), 1, most).astype(np.int64)
    return smaller


def paddings(scale: MultiScale) -> Array:
    """The few sizes that images are padded to, lying and standing, int64 [k, 2], the smallest area first.

    The shorter sides are spread evenly over those that images are scaled to; every view fits into one.
    """
    greatest = max(*scale.short_sides, scale.eval_short_side)
    longest = scale.max_side
    shorts = np.linspace(min(scale.short_sides), greatest, scale.num_short_sides + 1)[1:]
    pairs = {(min(short, longest), min(short * aspect, longest)) for short in shorts for aspect in ASPECTS}
    pairs.add((min(greatest, longest), longest))
    rounded = {tuple(-int(-side // STRIDE) * STRIDE for side in pair) for pair in pairs}
    both = sorted({*rounded, *((b, a) for a, b in rounded)}, key=lambda size: (size[0] * size[1], size))
    return np.array(both, np.int64)


def fitting(sizes: Array, paddings: Array) -> Array:
    """The number of the smallest padding that holds each size, int64 [n]."""
    first: Array = (sizes[:, None] <= paddings).all(-1).argmax(1)
    return first


def _whole(sizes: Array) -> Array:
    return np.concatenate([np.zeros_like(sizes), sizes[:, ::-1]], axis=1)


def _cut(sizes: Array, draws: Array, scale: MultiScale) -> Array:
    """Random parts of images that are scaled first, in whole pixels of the images as they are."""
    factor = _chosen(scale.crop_short_sides, draws[:, 0]) / sizes.min(1)
    first = np.maximum(1, np.floor(sizes * factor[:, None] + 0.5))
    least, most = np.minimum(first, scale.crop_sides[0]), np.minimum(first, scale.crop_sides[1])
    sides = least + np.floor(draws[:, 1:3] * (most - least + 1))
    corners = np.floor(draws[:, 3:5] * (first - sides + 1))
    corners, sides = (np.floor(lengths * sizes / first + 0.5) for lengths in (corners, sides))
    corners = np.minimum(corners, sizes - 1)
    sides = np.clip(sides, 1, sizes - corners)
    return np.concatenate([corners[:, ::-1], sides[:, ::-1]], axis=1).astype(np.int64)


def _chosen(values: tuple[int, ...], draws: Array) -> Array:
    chosen: Array = np.array(values)[(draws * len(values)).astype(np.int64)]
    return chosen
