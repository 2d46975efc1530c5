"""Transforms of an image and the labels of its pixels, which stay on one another.

A scaled picture has its first and last pixel's outer edges where the original has them, for images (bilinear)
as for labels (the nearest one); mmseg takes the labels of images that it enlarges from up to half a pixel
further left and above.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Generator, Tensor

from itpn.data.labels import Labels
from itpn.data.picture import Size
from itpn.data.transforms import to_tensor

TRIES = 10
"""Crops that are drawn until one is not nearly all of one class."""


class Distortion(NamedTuple):
    """How much colours are changed, each with probability one half."""

    brightness: float
    """Largest number, of 255, that is added to all pixels or taken away."""
    contrast: float
    """All pixels are multiplied by 1 - this to 1 + this."""
    saturation: float
    """The same for the saturation (of HSV)."""
    hue: float
    """Largest turn of the hue, in degrees."""


def scaled_size(size: Size, short: int, long: int, ratio: float = 1.0) -> Size:
    """As large as fits with the shorter side at most `ratio * short`, the longer one `ratio * long`, and the
    aspect kept."""
    factor = min(int(ratio * short) / min(size), int(ratio * long) / max(size))
    height, width = (max(1, int(side * factor + 0.5)) for side in size)
    return height, width


def fitted(image: Image.Image, short: int, long: int) -> Tensor:
    """The image as evaluations see it, ``uint8 [1, 3, h, w]``."""
    size = scaled_size((image.height, image.width), short, long)
    return cut_image(image, size, (0, 0), size)[None]


def crop_corner(
    labels: Labels, scaled: Size, crop: Size, unlabelled: int, max_share: float, generator: Generator
) -> tuple[int, int]:
    """Top and left of a random crop of the scaled picture, its corner where that is not larger.

    The first of ten whose labelled pixels are of several classes, none of them `max_share` or more; if there
    is none, the last.

    Args:
        labels: of the picture before it is scaled, [H, W].
    """
    top = left = 0
    for _ in range(TRIES):
        top, left = (
            int(torch.randint(max(0, side - length) + 1, (), generator=generator))
            for side, length in zip(scaled, crop, strict=True)
        )
        if max_share >= 1:
            break
        part = cut_labels(labels, scaled, (top, left), crop)
        counts = np.bincount(part.ravel(), minlength=unlabelled + 1)
        counts[unlabelled] = 0
        if np.count_nonzero(counts) > 1 and counts.max() < max_share * counts.sum():
            break
    return top, left


def cut_image(image: Image.Image, scaled: Size, corner: tuple[int, int], crop: Size) -> Tensor:
    """The part of the scaled image (bilinear, antialiased) that lies in the crop, uint8 [3, h, w]; only that
    part is computed."""
    (top, bottom), (left, right) = _span(scaled[0], corner[0], crop[0]), _span(scaled[1], corner[1], crop[1])
    down, across = image.height / scaled[0], image.width / scaled[1]
    box = left * across, top * down, min(right * across, image.width), min(bottom * down, image.height)
    return to_tensor(image.resize((right - left, bottom - top), Image.Resampling.BILINEAR, box=box))


def cut_labels(labels: Labels, scaled: Size, corner: tuple[int, int], crop: Size) -> Labels:
    """The same of labels [H, W], each the nearest."""
    rows, columns = (
        _nearest(side, size, start, part)
        for side, size, start, part in zip(labels.shape, scaled, corner, crop, strict=True)
    )
    return labels[rows[:, None], columns]


def padded(pixels: Tensor, value: Tensor, size: Size) -> Tensor:
    """Pixels [C, h, w], grown to [C, H, W] at the right and below with a value [C]."""
    h, w = pixels.shape[1:]
    if (h, w) == size:
        return pixels
    grown = value.to(pixels.dtype)[:, None, None].repeat(1, *size)
    grown[:, :h, :w] = pixels
    return grown


def distorted(pixels: Tensor, most: Distortion, generator: Generator) -> Tensor:
    """Colours of uint8 ``[3, H, W]`` changed as SSD and mmseg do: brightness, contrast, saturation, hue, with
    the contrast either there or last, and values clipped to 0..255 after each.

    They are rounded once, in the end, and the hue is not turned in steps of two degrees.
    """
    draws = torch.rand(9, generator=generator, dtype=torch.float64).tolist()
    brightness, contrast, saturation, hue = (
        strength * (2 * draw - 1) for strength, draw in zip(most, draws[:4], strict=True)
    )
    changes = (
        lambda x: (x + brightness).clamp(0, 255),
        lambda x: (x * (1 + contrast)).clamp(0, 255),
        lambda x: saturated(x, 1 + saturation),
        lambda x: turned(x, hue),
    )
    happens = [strength > 0 and draw < 0.5 for strength, draw in zip(most, draws[4:8], strict=True)]
    x = pixels.float()
    for i in (0, 1, 2, 3) if draws[8] < 0.5 else (0, 2, 3, 1):
        x = changes[i](x) if happens[i] else x
    return x.round().to(torch.uint8)


def saturated(x: Tensor, factor: float) -> Tensor:
    """Colours [3, H, W] with their saturation (of HSV) times a factor, at most 1; hue and value are kept."""
    value, least = x.amax(0), x.amin(0)
    spread = value - least
    # Saturation is spread / value, and every channel's distance from the value is in proportion to it.
    factors = torch.minimum(value / spread.clamp(min=1e-6), torch.tensor(factor))
    return value - (value - x) * factors


def turned(x: Tensor, degrees: float) -> Tensor:
    """Colours [3, H, W], 0 to 255, with their hue turned; saturation and value are kept."""
    from torchvision.transforms.v2 import functional  # half a second to import, for those who ask for it

    hued: Tensor = functional.adjust_hue(x / 255, degrees / 360)
    return hued * 255


def _span(side: int, start: int, part: int) -> tuple[int, int]:
    return start, min(start + part, side)


def _nearest(side: int, scaled: int, start: int, part: int) -> NDArray[np.int64]:
    """Which pixels of `side` are nearest to those of the part of `scaled`."""
    first, last = _span(scaled, start, part)
    return (2 * np.arange(first, last) + 1) * side // (2 * scaled)
