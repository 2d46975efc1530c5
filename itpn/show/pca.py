"""Feature maps as colours: their three main directions of variation become red, green and blue."""

import torch
from torch import Tensor

QUANTILES = (0.01, 0.99)  # outliers beyond these saturate instead of squeezing everyone else's contrast
FLAT = 1e-12  # variance below this share of the mean square is rounding noise, and is not shown


def pca_colours(maps: Tensor, fitted_to: Tensor | None = None) -> Tensor:
    """Paints feature maps `[B, C, h, w]` as float32 colours `[B, 3, h, w]` in 0..1, on the CPU.

    One PCA is fitted over all cells of all images, so that a colour means the same in each of them. The
    result is deterministic: float64, and each direction turned so that its largest loading is positive.
    A direction in which nothing varies (constant maps, one cell, C < 3) is painted 0.5.

    Args:
        fitted_to: other maps of C channels, in whose colours these are painted.

    Raises:
        ValueError: not four-dimensional, empty, or holding NaN or infinity.
    """
    cells = _cells_of(maps)
    B, _, h, w = maps.shape
    reference = cells if fitted_to is None else _cells_of(fitted_to)
    basis = _main_directions(reference)
    components, known = ((x - reference.mean(0)) @ basis for x in (cells, reference))
    return _stretch(components, known).float().view(B, h, w, 3).permute(0, 3, 1, 2).contiguous()


def _cells_of(maps: Tensor) -> Tensor:
    """`[B, C, h, w]` as cells `[n, C]`."""
    if maps.ndim != 4 or maps.numel() == 0:
        raise ValueError(f"feature maps must be [B, C, h, w] and not empty, got {list(maps.shape)}")
    if not maps.isfinite().all():
        raise ValueError("feature maps hold NaN or infinite values; there is no picture of those")
    return maps.detach().to("cpu", torch.float64).permute(0, 2, 3, 1).flatten(0, 2)


def _main_directions(cells: Tensor) -> Tensor:
    """The three directions `[C, 3]` of largest variance of cells `[n, C]`; zero where nothing varies."""
    centred = cells - cells.mean(0)
    variances, directions = torch.linalg.eigh(centred.T @ centred / len(cells))  # ascending
    varies = variances > FLAT * cells.square().sum(1).mean()
    directions = (directions * varies).flip(1)[:, :3]
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return torch.nn.functional.pad(directions * largest.sign(), (0, 3 - directions.shape[1]))


def _stretch(components: Tensor, known: Tensor) -> Tensor:
    """Maps each column from between the quantiles of `known` to 0..1, and a constant column to 0.5."""
    low, high = known.quantile(torch.tensor(QUANTILES, dtype=known.dtype), dim=0)
    # Where nearly all cells are alike, the quantiles meet and only rounding noise lies between them.
    span = torch.maximum(high - low, 1e-6 * (known.amax(0) - known.amin(0)))
    stretched: Tensor = (components - low) / span
    return stretched.nan_to_num(0.5).clamp(0, 1)
