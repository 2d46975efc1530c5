"""Position tables: making them, and resampling them to any grid by a cached matrix product."""

from functools import lru_cache
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]


class Relative(NamedTuple):
    """Pairs of positions: ``pairs [L, L]`` or ``[B, K, K]`` index a bias table for ``grid``."""

    pairs: Tensor
    grid: Grid


def sincos_table(grid: Grid, width: int, first: Literal["column", "row"] = "column") -> Tensor:
    """2-D sine-cosine table ``[rows * cols, width]``: per axis half the channels, sines before cosines.

    MAE and the authors' code put the column in the first half, mmpretrain the row.
    """
    rows, cols = grid
    row, col = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    axes = (col, row) if first == "column" else (row, col)
    angles = [axis.flatten()[:, None].double() * frequency for axis in axes]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1).float()


# What is cached must be a plain CPU tensor, whatever mode or default device the first caller runs under.


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _resampling(old: Grid, new: Grid, offset: float) -> Tensor:
    """Matrix ``[new cells, old cells]`` of bicubic resampling, read off the identity."""
    identity = torch.eye(old[0] * old[1], device="cpu").view(-1, 1, *old)
    if offset:
        # The source coordinates follow the factor itself and not the rounded sizes.
        factor = ((new[0] + offset) / old[0], (new[1] + offset) / old[1])
        rows = F.interpolate(identity, scale_factor=factor, mode="bicubic", recompute_scale_factor=False)
    else:
        rows = F.interpolate(identity, size=new, mode="bicubic")
    return rows.flatten(1).T.contiguous()


def resample_table(table: Tensor, old: Grid, new: Grid, offset: float = 0.0) -> Tensor:
    """Resample ``[old cells, C]`` to ``[new cells, C]``, bicubic, in fp32.

    ``offset`` 0.1 gives the published arithmetic: a scale factor of (new + 0.1) / old that also sets the
    sampling grid.
    """
    if old == new and not offset:
        return table
    with torch.autocast(table.device.type, enabled=False):
        return _resampling(old, new, offset).to(table.device) @ table.float()


def resample_relative(table: Tensor, old: Grid, new: Grid) -> Tensor:
    """Resample a relative-position table ``[(2h-1)(2w-1), heads]`` from one window to another."""
    return resample_table(table, (2 * old[0] - 1, 2 * old[1] - 1), (2 * new[0] - 1, 2 * new[1] - 1))


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def relative_index(grid: Grid) -> Tensor:
    """Index ``[L, L]`` (query, key) into a table of offsets (dy, dx), each counted from its most negative
    value."""
    rows, cols = grid
    cells = torch.arange(rows * cols, device="cpu")
    y, x = cells // cols, cells % cols
    return (y[:, None] - y + rows - 1) * (2 * cols - 1) + (x[:, None] - x + cols - 1)


def resample_axis(table: Tensor, size: int) -> Tensor:
    """Resample a table of offsets along one axis ``[2S-1, D]`` to ``size`` units, linearly, as ViTDet does."""
    if len(table) == 2 * size - 1:
        return table
    return F.interpolate(table.T[None].float(), size=2 * size - 1, mode="linear")[0].T
