"""Procedural backgrounds for the sample data, without flat patches: there is always something to fill in."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.floating[Any]]
Shape = tuple[int, int]
Range = tuple[float, float]


class Texture(NamedTuple):
    """A field between 0 and 1 over [H, W], painted from one colour to another."""

    field: Callable[[np.random.Generator, Shape], Array]
    hue: Range = (0.0, 1.0)
    saturation: Range = (0.25, 0.9)
    whiteness: float = 0.0  # how much paler the second colour is


def noise(rng: np.random.Generator, shape: Shape, cell: float, stretch: float = 1.0) -> Array:
    """Smooth noise in 0..1 whose bumps are about `cell` pixels wide and `cell * stretch` high."""
    rows, columns = int(shape[0] / (cell * stretch)) + 2, int(shape[1] / cell) + 2
    bumps = Image.fromarray(rng.random((rows, columns), dtype=np.float32))
    values = np.asarray(bumps.resize((shape[1], shape[0]), Image.Resampling.BICUBIC))
    return values.clip(0, 1)


def _phase(rng: np.random.Generator, shape: Shape, angle: float, period: float) -> Array:
    """Turns (in radians) along a direction, bent a little by noise."""
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    along = (x * np.cos(angle) + y * np.sin(angle)) / period
    return np.asarray(2 * np.pi * (along + 0.6 * noise(rng, shape, 40)), np.float32)


def _clouds(rng: np.random.Generator, shape: Shape) -> Array:
    return 0.65 * noise(rng, shape, 36) + 0.35 * noise(rng, shape, 10)


def _blades(rng: np.random.Generator, shape: Shape) -> Array:
    return 0.6 * noise(rng, shape, 3, stretch=4) + 0.4 * noise(rng, shape, 24)


def _ripples(rng: np.random.Generator, shape: Shape) -> Array:
    field: Array = 0.5 + 0.5 * np.sin(_phase(rng, shape, np.pi / 2, rng.uniform(9, 15)))
    return field


def _grains(rng: np.random.Generator, shape: Shape) -> Array:
    return 0.5 * noise(rng, shape, 3) + 0.5 * noise(rng, shape, 18)


def _bricks(rng: np.random.Generator, shape: Shape) -> Array:
    height = int(rng.integers(9, 14))
    y, x = np.mgrid[: shape[0], : shape[1]]
    course = y // height
    brick = (x + (course % 2) * height) // (2 * height)
    tone = rng.random((shape[0] // height + 1, shape[1] // (2 * height) + 2), dtype=np.float32)[course, brick]
    mortar = (y % height < 2) | ((x + (course % 2) * height) % (2 * height) < 2)
    return np.where(mortar, np.float32(1), 0.5 * tone)


def _stripes(rng: np.random.Generator, shape: Shape) -> Array:
    field: Array = 0.5 + 0.5 * np.tanh(
        2 * np.sin(_phase(rng, shape, rng.uniform(0, np.pi), rng.uniform(8, 22)))
    )
    return field


def _checks(rng: np.random.Generator, shape: Shape) -> Array:
    angle, period = rng.uniform(0, np.pi / 2), rng.uniform(14, 26)
    across = np.sin(_phase(rng, shape, angle, period)) * np.sin(_phase(rng, shape, angle + np.pi / 2, period))
    field: Array = 0.5 + 0.5 * np.tanh(4 * across)
    return field


def _dots(rng: np.random.Generator, shape: Shape) -> Array:
    angle, period = rng.uniform(0, np.pi / 2), rng.uniform(11, 18)
    bumps = np.cos(_phase(rng, shape, angle, period)) + np.cos(_phase(rng, shape, angle + np.pi / 2, period))
    field: Array = 0.5 + 0.5 * np.tanh(3 * (bumps - 0.6))
    return field


def _blobs(rng: np.random.Generator, shape: Shape) -> Array:
    field: Array = 0.5 + 0.5 * np.tanh(8 * (noise(rng, shape, rng.uniform(9, 16)) - 0.5))
    return field


def _contours(rng: np.random.Generator, shape: Shape) -> Array:
    field: Array = 0.5 + 0.5 * np.sin(8 * np.pi * noise(rng, shape, 32))
    return field


STUFF = {
    "sky": Texture(_clouds, (0.54, 0.62), (0.5, 0.8), 0.9),
    "grass": Texture(_blades, (0.22, 0.38), (0.5, 0.9), 0.2),
    "water": Texture(_ripples, (0.48, 0.6), (0.5, 0.9), 0.5),
    "sand": Texture(_grains, (0.08, 0.14), (0.3, 0.6), 0.4),
    "brick": Texture(_bricks, (0.0, 0.06), (0.5, 0.8), 0.7),
}
"""Backgrounds that are classes of the segmentation set."""

PATTERNS = {
    "stripes": Texture(_stripes),
    "checks": Texture(_checks),
    "dots": Texture(_dots),
    "blobs": Texture(_blobs),
    "contours": Texture(_contours),
}
"""Backgrounds of any colour that are nothing in particular."""


def paint(texture: Texture, rng: np.random.Generator, shape: Shape, light: bool) -> Array:
    """The texture as RGB in 0..1, [H, W, 3], on the light or the dark side of mid-grey."""
    field = texture.field(rng, shape)
    field = np.clip(0.85 * field + 0.15 * noise(rng, shape, 7), 0, 1)
    value = rng.uniform(0.7, 0.85) if light else rng.uniform(0.25, 0.45)
    first = _colour(rng.uniform(*texture.hue), rng.uniform(*texture.saturation), value)
    second_hue = rng.uniform(*texture.hue)
    second = _colour(second_hue, rng.uniform(*texture.saturation) * (1 - texture.whiteness), value + 0.15)
    return np.asarray(first + field[..., None] * (second - first), np.float32)


def shade(image: Array, rng: np.random.Generator) -> Array:
    """Soft uneven light over RGB in 0..1, so that flat areas of a drawing are not constant either."""
    shape = (image.shape[0], image.shape[1])
    light = noise(rng, shape, rng.uniform(14, 30))[..., None] - 0.5
    return np.clip(0.1 + 0.8 * image * (1 + 0.4 * light) + 0.14 * light, 0, 1).astype(np.float32)


def _colour(hue: float, saturation: float, value: float) -> Array:
    """HSV, each in 0..1 -> RGB [3]."""
    ramp = np.abs((hue * 6 + np.array([0, 4, 2])) % 6 - 3) - 1
    return np.asarray(value * (1 - saturation * (1 - np.clip(ramp, 0, 1))), np.float32)
