"""What masked image modeling sees, what it makes of it, and what the pyramid's levels hold."""

import math
from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from itpn.show.pca import pca_colours
from itpn.show.sheet import grid, image_of


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
    pictures = [
        [image_of(image).resize(size, Image.Resampling.BICUBIC) for image in images]
        for images in (original, masked, reconstruction)
    ]
    pictures += [[_mosaic(image_of(colours), size) for colours in pca_colours(maps)] for _, maps in levels]
    headings = [("original", f"{W} x {H} pixels"), ("masked", "what the model sees")]
    headings += [("reconstruction", "hidden units filled in")]
    headings += [(name, f"{maps.shape[3]} x {maps.shape[2]} cells, PCA") for name, maps in levels]
    return grid(list(zip(*pictures, strict=True)), headings=headings, captions=[[text] for text in captions])


def _scaled(height: int, width: int, cell: int) -> tuple[int, int]:
    """Width and height as shown."""
    scale = 2.0 ** round(math.log2(cell / max(height, width)))
    return max(1, int(width * scale)), max(1, int(height * scale))


def _mosaic(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Enlarges without blurring one cell into the next: a map's resolution is part of what is shown."""
    return image.resize(size, Image.Resampling.BOX)
