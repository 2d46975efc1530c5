"""Bicubic resizing of a box to a square by torch, whose kernel for bytes takes a third of Pillow's time."""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

MARGIN = 8


class Span(NamedTuple):
    """Pixels `start` to `stop` of a row or column, and how many output pixels they yield around the wanted
    ones."""

    start: int
    stop: int
    before: int
    after: int


def whole_pixels(start: float, stop: float, length: float, size: int) -> Span:
    """What to read of a row of `length` pixels so that `start` to `stop` become `size` output pixels.

    torch resizes from whole pixels only, and the corners of a box fall between them where a JPEG was decoded
    at a fraction of its size. So the box grows by whole output pixels until its ends are nearly whole; what
    they add is cut off afterwards.
    """
    step = (stop - start) / size
    before, first = _nearest_whole(start, -step, start / step)
    after, last = _nearest_whole(stop, step, (length - stop) / step)
    return Span(first, last, before, after)


def _nearest_whole(end: float, step: float, most: float) -> tuple[int, int]:
    """The number of steps, and the whole number, where `end` + steps comes nearest to a whole number."""
    steps = range(min(MARGIN, int(most)) + 1)
    best = min(steps, key=lambda n: abs(end + n * step - round(end + n * step)))
    return best, round(end + best * step)


def resized(part: NDArray[np.uint8], columns: Span, rows: Span, size: int) -> Tensor:
    """The wanted pixels of `part`, which holds the spans' pixels: uint8 [h, w, 3] -> [3, size, size]."""
    whole = [span.before + size + span.after for span in (rows, columns)]
    images = torch.from_numpy(part).permute(2, 0, 1).unsqueeze(0)
    images = F.interpolate(images, size=whole, mode="bicubic", antialias=True)
    wanted: Any = images[0, :, rows.before : rows.before + size, columns.before : columns.before + size]
    return wanted
