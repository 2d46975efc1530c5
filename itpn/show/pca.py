"""Feature maps as colours: their three main directions of variation become red, green and blue."""

import torch
from torch import Tensor

QUANTILES = (0.01, 0.99)  # outliers beyond these saturate instead of squeezing everyone else's contrast
FLAT = 1e-12  # variance below this share of the mean square is rounding noise, and is not shown


def pca_colours(maps: Tensor) -> Tensor:
    """Paints feature maps `[B, C, h, w]` as float32 colours `[B, 3, h, w]` in 0..1, on the CPU.

    One PCA is fitted over all cells of all images, so that a colour means the same in each of them. The
    result is deterministic: float64, and each direction turned so that its largest loading is positive.
    A direction in which nothing varies (constant maps, one cell, C < 3) is painted 0.5.

    Raises:
        ValueError: not four-dimensional, empty, or holding NaN or infinity.
    """
    if maps.ndim != 4 or maps.numel() == 0:
        raise ValueError(f"feature maps must be [B, C, h, w] and not empty, got {list(maps.shape)}")
    if not maps.isfinite().all():
        raise ValueError("feature maps hold NaN or infinite values; there is no picture of those")
    B, C, h, w = maps.shape
    cells = maps.detach().to("cpu", torch.float64).permute(0, 2, 3, 1).reshape(-1, C)
    return _stretch(_main_components(cells)).float().view(B, h, w, 3).permute(0, 3, 1, 2).contiguous()


def _main_components(cells: Tensor) -> Tensor:
    """Cells `[n, C]` along the three directions of largest variance, `[n, 3]`; zero where nothing varies."""
    centred = cells - cells.mean(0)
    variances, directions = torch.linalg.eigh(centred.T @ centred / len(cells))  # ascending
    varies = variances > FLAT * cells.square().sum(1).mean()
    directions = (directions * varies).flip(1)[:, :3]
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    components = centred @ (directions * largest.sign())
    return torch.nn.functional.pad(components, (0, 3 - components.shape[1]))


def _stretch(components: Tensor) -> Tensor:
    """Maps each column from between its quantiles to 0..1, and a constant column to 0.5."""
    low, high = components.quantile(torch.tensor(QUANTILES, dtype=components.dtype), dim=0)
    # Where nearly all cells are alike, the quantiles meet and only rounding noise lies between them.
    span = torch.maximum(high - low, 1e-6 * (components.amax(0) - components.amin(0)))
    stretched: Tensor = (components - low) / span
    return stretched.nan_to_num(0.5).clamp(0, 1)
