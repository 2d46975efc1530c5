"""The bundled cut-outs: public-domain clip art with transparent surroundings, and pasting it on a ground."""

import json
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from itpn.data.textures import PATTERNS, STUFF, Array, Shape, paint, shade

SAMPLE = Path(__file__).with_name("sample")
SPLITS = ("train", "val")
Mask = NDArray[np.bool_]


class Cutout(NamedTuple):
    """A drawing whose longer side is 96 px, RGBA; labels count from 0 in alphabetical order."""

    name: str
    label: int
    image: Image.Image


def index() -> dict[str, Any]:
    """What the archive holds: {"source", "classes": names, "images": [{"file", "class", "split", ...}]}."""
    return dict(json.loads((SAMPLE / "index.json").read_text()))


def load_cutouts(split: str) -> list[Cutout]:
    """The cut-outs of one split, in the order of the index."""
    content = index()
    entries = [entry for entry in content["images"] if entry["split"] == split]
    with zipfile.ZipFile(SAMPLE / "cutouts.zip") as archive:
        return [
            Cutout(
                name=Path(entry["file"]).stem,
                label=content["classes"].index(entry["class"]),
                image=Image.open(archive.open(entry["file"])).convert("RGBA"),
            )
            for entry in entries
        ]


def place(drawing: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """One cut-out at a random scale and position on a random background, RGB, `size` x `size`."""
    textures = [*STUFF.values(), *PATTERNS.values()]
    ground = paint(textures[rng.integers(len(textures))], rng, (size, size), light=is_dark(drawing))
    drawing = resized(drawing, round(size * rng.uniform(0.65, 0.96)))
    paste(ground, drawing, random_corner(rng, (size, size), drawing))
    return picture(shade(ground, rng))


def is_dark(drawing: Image.Image) -> bool:
    pixels = np.asarray(drawing, np.float32)
    return float(np.average(pixels[..., :3].mean(-1), weights=pixels[..., 3] + 1e-3)) < 128


def resized(drawing: Image.Image, longer_side: int) -> Image.Image:
    scale = longer_side / max(drawing.size)
    width, height = (max(1, round(side * scale)) for side in drawing.size)
    return drawing.resize((width, height), Image.Resampling.BICUBIC)


def random_corner(rng: np.random.Generator, shape: Shape, drawing: Image.Image) -> tuple[int, int]:
    """(top, left) such that the drawing lies within `shape`."""
    return int(rng.integers(shape[0] - drawing.height + 1)), int(rng.integers(shape[1] - drawing.width + 1))


def paste(ground: Array, drawing: Image.Image, corner: tuple[int, int]) -> None:
    """Blends the drawing into `ground`, RGB in 0..1, in place."""
    pixels = np.asarray(drawing, np.float32) / 255
    region = ground[corner[0] : corner[0] + drawing.height, corner[1] : corner[1] + drawing.width]
    region += pixels[..., 3:] * (pixels[..., :3] - region)


def opaque(drawing: Image.Image, corner: tuple[int, int], shape: Shape) -> Mask:
    """Where the drawing would hide what is behind it, bool [H, W]."""
    mask = np.zeros(shape, bool)
    alpha = np.asarray(drawing.getchannel("A"))
    mask[corner[0] : corner[0] + drawing.height, corner[1] : corner[1] + drawing.width] = alpha > 127
    return mask


def picture(pixels: Array) -> Image.Image:
    """RGB in 0..1, [H, W, 3] -> 8 bits."""
    return Image.fromarray((pixels * 255 + 0.5).astype(np.uint8))
