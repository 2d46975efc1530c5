"""From an image to a uint8 tensor [3, H, W]: the random crop of training, the central one of evaluation."""

import math

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

from itpn.data.picture import Box, Picture, Size

ASPECT = (3 / 4, 4 / 3)
"""Smallest and largest width / height of a random crop."""

TRIES = 10

CROP_RATIO = 224 / 256
"""Share of the scaled image's sides that the central crop of evaluation covers, up to 224 pixels."""


def random_resized_crop_flip(
    picture: Picture, size: Size, *, min_scale: float, flip: float, generator: Generator
) -> Tensor:
    """A random crop of `min_scale` to all of the area, bicubic, mirrored with probability `flip`."""
    box = random_crop_box(*picture.size, min_scale, generator)
    mirrored = float(torch.rand((), generator=generator)) < flip
    pixels = picture.cut(box, size)
    return pixels.flip(-1) if mirrored else pixels


def random_crop_box(width: int, height: int, min_scale: float, generator: Generator) -> Box:
    """Area uniform in [min_scale, 1], aspect log-uniform; if none of the tries fits, the largest central box.

    The distribution of torchvision's RandomResizedCrop, which itself can draw from the global state only.
    """
    low, high = math.log(ASPECT[0]), math.log(ASPECT[1])
    for _ in range(TRIES):
        area, aspect = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        area = width * height * (min_scale + (1 - min_scale) * area)
        aspect = math.exp(low + (high - low) * aspect)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left = int(torch.randint(width - w + 1, (), generator=generator))
            top = int(torch.randint(height - h + 1, (), generator=generator))
            return left, top, w, h
    w = min(width, round(height * ASPECT[1]))
    h = min(height, round(width / ASPECT[0]))
    return (width - w) // 2, (height - h) // 2, w, h


def jittered(pixels: Tensor, strength: float, generator: Generator) -> Tensor:
    """Brightness, contrast and saturation of uint8 ``[3, H, W]`` changed by factors uniform in 1 - strength
    to 1 + strength, in random order: torchvision's ColorJitter, which itself draws from the global state."""
    from torchvision.transforms.v2 import functional  # half a second to import, for those who ask for it

    changes = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
    factors = 1 + strength * (2 * torch.rand(3, generator=generator, dtype=torch.float64) - 1)
    for i in torch.randperm(3, generator=generator).tolist():
        pixels = changes[i](pixels, float(factors[i]))
    return pixels


def crop_ratio_of(size: Size) -> float:
    """What is published for a size: all of the image above 224 pixels, else `CROP_RATIO`."""
    return CROP_RATIO if max(size) <= 224 else 1.0


def center_crop(image: Image.Image, size: Size, crop_ratio: float = CROP_RATIO) -> Tensor:
    """The image scaled (bicubic) to cover size / crop_ratio, then the central pixels, uint8 [3, H, W]."""
    (H, W), (height, width) = size, (int(side / crop_ratio) for side in size)
    if width * image.height >= height * image.width:
        height = int(width * image.height / image.width)
    else:
        width = int(height * image.width / image.height)
    left, top = round((width - W) / 2), round((height - H) / 2)
    # Only the central pixels are computed: of a very long image the whole would not fit in memory.
    across, down = image.width / width, image.height / height
    box = left * across, top * down, (left + W) * across, (top + H) * down
    return to_tensor(image.resize((W, H), Image.Resampling.BICUBIC, box=box))


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
