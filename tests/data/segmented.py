"""Small folders of labelled images for tests."""

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = np.array([[220, 40, 40], [40, 200, 60], [50, 70, 220], [230, 210, 60]], np.uint8)
"""What the classes look like."""


def blocks(
    rng: np.random.Generator, height: int, width: int, num_classes: int = 4, block: int = 8
) -> np.ndarray:
    """Random class ids [height, width] in blocks."""
    small = rng.integers(0, num_classes, (-(-height // block), -(-width // block)), dtype=np.uint8)
    return small.repeat(block, 0).repeat(block, 1)[:height, :width]


def write_pair(
    folder: Path, split: str, name: str, labels: np.ndarray, stored: np.ndarray | None = None
) -> None:
    """ROOT/images/SPLIT/NAME.png in the classes' colours, and ROOT/labels/SPLIT/NAME.png."""
    image, truth = (folder / kind / split / f"{name}.png" for kind in ("images", "labels"))
    for path in (image, truth):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(COLOURS[labels % len(COLOURS)]).save(image)
    Image.fromarray(labels if stored is None else stored).save(truth)


def write_masks(
    folder: Path, counts: dict[str, int], size: tuple[int, int] = (40, 56), seed: int = 0
) -> Path:
    """Pairs of four classes, with a column of pixels that have no label, and classes.txt."""
    rng = np.random.default_rng(seed)
    for split, count in counts.items():
        for i in range(count):
            labels = blocks(rng, *size)
            stored = labels.copy()
            stored[:, 0] = 255
            write_pair(folder, split, f"{i:02d}", labels, stored)
    (folder / "classes.txt").write_text("red\ngreen\nblue\nyellow\n")
    return folder
