"""Scenes of several cut-outs that may hide one another, annotated as COCO and ADE20K do."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from itpn.data.masks import run_lengths
from itpn.data.sample_cutouts import Cutout, Mask, is_dark, opaque, paste, picture, random_corner, resized
from itpn.data.textures import PATTERNS, STUFF, Array, Shape, noise, paint, shade

SCENE_SHAPES: tuple[Shape, ...] = ((192, 256), (256, 192), (224, 224))
MAX_THINGS = 6
MIN_VISIBLE = 0.4  # of a thing's opaque pixels: less would be hard to recognise


class Thing(NamedTuple):
    """A cut-out in a scene: its label (from 0) and where it can be seen, bool [H, W]."""

    label: int
    mask: Mask


class Scene(NamedTuple):
    """`stuff` numbers the background, [H, W]: 0 for nothing in particular, else 1 + its place in STUFF."""

    image: Image.Image
    stuff: NDArray[np.uint8]
    things: list[Thing]


def compose(by_label: list[list[Cutout]], rng: np.random.Generator) -> Scene:
    """A scene of two to six things as a rule, every class as likely as any other, all of them darker or all
    lighter than the background.

    Args:
        by_label: the cut-outs to choose from, one list per class.
    """
    shape = SCENE_SHAPES[rng.integers(len(SCENE_SHAPES))]
    light = bool(rng.integers(2))
    ground, stuff = _background(rng, shape, light)
    things: list[Thing] = []
    full_areas: list[int] = []
    num_things = int(rng.integers(2, MAX_THINGS + 1))
    for _ in range(4 * MAX_THINGS):
        choices = by_label[rng.integers(len(by_label))]
        cutout = choices[rng.integers(len(choices))]
        drawing = resized(cutout.image, int(rng.integers(48, 129)))
        corner = random_corner(rng, shape, drawing)
        mask = opaque(drawing, corner, shape)
        behind = [thing._replace(mask=thing.mask & ~mask) for thing in things]
        kept = [
            thing.mask.sum() >= MIN_VISIBLE * full for thing, full in zip(behind, full_areas, strict=True)
        ]
        if len(things) < num_things and all(kept) and mask.any() and is_dark(drawing) == light:
            paste(ground, drawing, corner)
            things = [*behind, Thing(cutout.label, mask)]
            full_areas.append(int(mask.sum()))
    return Scene(picture(shade(ground, rng)), stuff, things)


def _background(rng: np.random.Generator, shape: Shape, light: bool) -> tuple[Array, NDArray[np.uint8]]:
    """Two textures above one another with an uneven horizon, and which is where."""
    names = [*STUFF, *PATTERNS]
    upper, lower = rng.choice(len(names), 2, replace=False)
    horizon = shape[0] * (rng.uniform(0.25, 0.75) + 0.3 * (noise(rng, (1, shape[1]), 50)[0] - 0.5))
    below = np.arange(shape[0])[:, None] > horizon
    textures = STUFF | PATTERNS
    over, under = (paint(textures[names[kind]], rng, shape, light) for kind in (upper, lower))
    numbers = np.array([*range(1, len(STUFF) + 1), *[0] * len(PATTERNS)], np.uint8)
    return np.where(below[..., None], under, over), np.where(below, numbers[lower], numbers[upper])


def coco_annotations(scene: Scene, image_id: int, first_id: int) -> list[dict[str, Any]]:
    """One entry of COCO's `instances_*.json` per thing; categories count from 1, masks are run lengths."""
    return [
        {
            "id": first_id + i,
            "image_id": image_id,
            "category_id": thing.label + 1,
            "iscrowd": 0,
            "area": int(thing.mask.sum()),
            "bbox": bounding_box(thing.mask),
            "segmentation": {"size": list(thing.mask.shape), "counts": run_lengths(thing.mask).tolist()},
        }
        for i, thing in enumerate(scene.things)
    ]


def bounding_box(mask: Mask) -> list[int]:
    """[x, y, width, height] of a mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x, y = int(columns[0]), int(rows[0])
    return [x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1]


def ade20k_labels(scene: Scene, num_things: int) -> NDArray[np.uint8]:
    """Labels [H, W] as ADE20K's: 0 for other, the classes of things from 1, then those of stuff."""
    labels = np.where(scene.stuff > 0, num_things + scene.stuff, 0).astype(np.uint8)
    for thing in scene.things:
        labels[thing.mask] = thing.label + 1
    return labels
