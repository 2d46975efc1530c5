"""Made-up JPEGs that cost about what photographs do to decode, where there are none to measure with."""

import re
from pathlib import Path

import numpy as np
from PIL import Image

from itpn.data.limits import MAX_PIXELS
from itpn.data.textures import noise
from itpn.errors import UserError

Size = tuple[int, int]
"""Width and height in pixels."""

QUALITY = 88


def sizes_of(text: str) -> list[Size]:
    """`500x400,1024x768` as sizes."""
    found = [re.fullmatch(r"([1-9]\d{1,4})x([1-9]\d{1,4})", part) for part in text.split(",")]
    if not all(found):
        raise UserError(
            f"--synthetic {text}: give sizes as WIDTHxHEIGHT of 10 pixels or more, with commas between"
        )
    sizes = [(int(size[1]), int(size[2])) for size in found if size]
    if any(width * height > MAX_PIXELS for width, height in sizes):
        raise UserError(f"--synthetic {text}: an image may have {MAX_PIXELS:,} pixels at most")
    return sizes


def write_photographs(folder: Path, size: Size, number: int) -> list[Path]:
    paths = [folder / f"{size[0]}x{size[1]}-{i}.jpg" for i in range(number)]
    for i, path in enumerate(paths):
        photograph(np.random.default_rng(i), size).save(path, quality=QUALITY, subsampling="4:2:0")
    return paths


def photograph(rng: np.random.Generator, size: Size) -> Image.Image:
    """Greyish noise, the wider its bumps the stronger, with some edges: about 2 bits a pixel as a JPEG."""
    shape = (size[1], size[0])
    image = np.zeros((*shape, 3), np.float32)
    for octave in range(9):
        light = noise(rng, shape, 2.0**octave) - 0.5
        if octave > 4:
            light = 0.5 * np.tanh(20 * light)
        image += 2 ** (0.3 * octave) * light[..., None]
    for channel in range(3):
        image[..., channel] += 4 * (noise(rng, shape, 64) - 0.5) + (noise(rng, shape, 4) - 0.5)
    image = 128 + 55 * (image - image.mean()) / image.std()
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))
