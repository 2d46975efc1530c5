"""What a model in pre-training sees, what it makes of it, and what the pyramid's levels hold."""

import math
from collections.abc import Sequence
from typing import TypeAlias

from PIL import Image
from torch import Tensor

from itpn.show.pca import pca_colours
from itpn.show.sheet import grid, image_of

Column: TypeAlias = tuple[tuple[str, str], list[Image.Image]]
"""A heading with its note, and a picture per image."""


def reconstruction_picture(
    original: Tensor,
    masked: Tensor,
    reconstruction: Tensor,
    levels: Sequence[tuple[str, Tensor]] = (),
    captions: Sequence[str] = (),
    *,
    cell: int = 200,
) -> Image.Image:
    """One row per image: original, masked, reconstruction, and each level's feature map in PCA colours.

    Args:
        original, masked, reconstruction: float `[B, C, H, W]` in 0..1.
        levels: names and maps `[B, C, h, w]`, fine to coarse; none where the model has no pyramid.
        captions: one per image, written below its row.
        cell: wanted length in pixels of an image's longer side. Images are scaled by the power of two that
            comes closest, so that the cells of a feature map come out equally large.

    Raises:
        ValueError: shapes that do not belong together, or feature maps that are not finite.
    """
    B, _, H, W = original.shape
    if B == 0 or not original.shape == masked.shape == reconstruction.shape:
        shapes = [list(images.shape) for images in (original, masked, reconstruction)]
        raise ValueError(f"original, masked and reconstruction must be alike and not empty, got {shapes}")
    if any(len(maps) != B for _, maps in levels) or (captions and len(captions) != B):
        raise ValueError(f"levels and captions must be one per image, and there are {B} images")

    size = _scaled(H, W, cell)
    columns = [
        _picture(original, size, "original", f"{W} x {H} pixels"),
        _picture(masked, size, "masked", "what the model sees"),
        _picture(reconstruction, size, "reconstruction", "hidden units filled in"),
        *(_map(pca_colours(maps), size, name, "PCA") for name, maps in levels),
    ]
    return _sheet(columns, captions)


def distillation_picture(
    original: Tensor,
    masked: Tensor,
    levels: Sequence[tuple[str, Tensor]],
    target: Tensor,
    prediction: Tensor,
    similarity: Tensor,
    captions: Sequence[str] = (),
    *,
    cell: int = 200,
) -> Image.Image:
    """One row per image: original, masked, each level's map, the teacher's tokens in PCA colours, the
    student's in the same, and how similar the two are.

    Args:
        original, masked: float `[B, C, H, W]` in 0..1.
        levels: names and maps `[B, C, h, w]`, fine to coarse.
        target, prediction: maps `[B, T, h, w]`.
        similarity: `[B, 1, h, w]`, white at 1 and black at 0 and below.
        captions: one per image, written below its row.
        cell: as of `reconstruction_picture`.

    Raises:
        ValueError: maps that are not finite.
    """
    _, _, H, W = original.shape
    size = _scaled(H, W, cell)
    columns = [
        _picture(original, size, "original", f"{W} x {H} pixels"),
        _picture(masked, size, "masked", "what stage 3 sees"),
        *(_map(pca_colours(maps), size, name, "PCA") for name, maps in levels),
        _map(pca_colours(target), size, "teacher", "PCA"),
        _map(pca_colours(prediction, fitted_to=target), size, "student", "the same colours"),
        _map(similarity, size, "cosine similarity", "white 1, black 0"),
    ]
    return _sheet(columns, captions)


def _picture(images: Tensor, size: tuple[int, int], name: str, note: str) -> Column:
    return (name, note), [image_of(image).resize(size, Image.Resampling.BICUBIC) for image in images]


def _map(colours: Tensor, size: tuple[int, int], name: str, note: str) -> Column:
    """Enlarged without blurring one cell into the next: a map's resolution is part of what is shown."""
    cells = f"{colours.shape[3]} x {colours.shape[2]} cells, {note}"
    return (name, cells), [image_of(colour).resize(size, Image.Resampling.BOX) for colour in colours]


def _sheet(columns: Sequence[Column], captions: Sequence[str]) -> Image.Image:
    headings, pictures = zip(*columns, strict=True)
    rows = list(zip(*pictures, strict=True))
    return grid(rows, headings=headings, captions=[[text] for text in captions])


def _scaled(height: int, width: int, cell: int) -> tuple[int, int]:
    """Width and height as shown."""
    scale = 2.0 ** round(math.log2(cell / max(height, width)))
    return max(1, int(width * scale)), max(1, int(height * scale))
