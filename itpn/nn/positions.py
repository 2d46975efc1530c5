"""Position tables: making them, and resampling them to any grid by cached matrices, one per axis."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, wraps
from typing import Literal, NamedTuple, TypeVarTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from itpn.errors import UserError

Grid = tuple[int, int]
RelativeMethod = Literal["fraction", "size", "geometric"]
Asked = TypeVarTuple("Asked")


class Relative(NamedTuple):
    """Pairs of positions: ``pairs [L, L]`` or ``[B, K, K]`` index a bias table for ``grid``, to which a table
    for another grid is resampled by ``method``."""

    pairs: Tensor
    grid: Grid
    method: RelativeMethod = "fraction"


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


def _cached(build: Callable[[*Asked], Tensor]) -> Callable[[*Asked], Tensor]:
    """Keep what ``build`` makes, as plain tensors: not inference tensors, and none that a tracer made, which
    belongs to its graph."""
    kept = lru_cache(maxsize=64)(torch.inference_mode(False)(build))

    @wraps(build)
    def ask(*asked: *Asked) -> Tensor:
        return build(*asked) if torch.compiler.is_compiling() else kept(*asked)

    return ask


def _units(first: int, end: int) -> Tensor:
    return torch.arange(first, end, dtype=torch.float64, device="cpu")


def _cubic(places: Tensor, cells: int, sharpness: float) -> Tensor:
    """Weights ``[places, cells]`` of cubic convolution (Keys 1981); past the border its cell goes on."""
    around = torch.arange(-3, cells + 3, device="cpu")
    x = (places[:, None] - around).abs()
    near = ((sharpness + 2) * x - (sharpness + 3)) * x * x + 1
    far = sharpness * (((x - 5) * x + 8) * x - 4)
    weights = torch.where(x <= 1, near, torch.where(x < 2, far, 0.0))
    return weights @ F.one_hot(around.clamp(0, cells - 1), cells).double()


@_cached
def _by_size(old: int, new: int, offset: float) -> Tensor:
    """Weights ``[new, old]`` of torch's bicubic resizing along one axis.

    The source coordinates follow the factor (new + offset) / old itself and not the rounded sizes.
    """
    return _cubic((_units(0, new) + 0.5) * old / (new + offset) - 0.5, old, -0.75).float()


@_cached
def _by_size_linear(old: int, new: int) -> Tensor:
    """The same of torch's linear resizing."""
    places = ((_units(0, new) + 0.5) * old / new - 0.5).clamp(0, old - 1)
    return (1 - (places[:, None] - _units(0, old)).abs()).clamp(min=0).float()


@_cached
def _by_fraction(old: int, new: int) -> Tensor:
    """Weights ``[2 new - 1, 2 old - 1]``: d of ``new`` units are d old / new of ``old`` units."""
    return _cubic(_units(1 - new, new) * old / new + old - 1, 2 * old - 1, -0.5).float()


@_cached
def _by_geometric(old: int, new: int) -> Tensor:
    """Weights ``[2 new - 1, 2 old - 1]`` of a cubic spline through the old values, laid at the offsets 0, ±1,
    ±(1 + q), ±(1 + q + q²), …, with the q that brings the outermost to the new outermost."""
    if min(old, new) < 3 or 2 * new < old:
        raise UserError(
            f"relative positions of {old} to {new} units: geometric spacing needs 3 or more units on both "
            "sides and at most halves them; use the method fraction"
        )
    low, high = 0.0, float(new)
    for _ in range(60):
        q = (low + high) / 2
        low, high = (q, high) if sum(q**i for i in range(old - 1)) < new - 1 else (low, q)
    steps = (q ** _units(0, old - 1)).cumsum(0)
    known = torch.cat([-steps.flip(0), steps.new_zeros(1), steps]) / steps[-1]

    def basis(places: Tensor) -> Tensor:
        bends = (places[:, None] - known[2:-2]).clamp(min=0) ** 3
        return torch.cat([places[:, None] ** _units(0, 4), bends], dim=1)

    return (basis(_units(1 - new, new) / steps[-1]) @ torch.inverse(basis(known))).float()


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """The meta device, on which models are counted, has no autocast to disable, and says so by an error."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def _resample(table: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """``[old cells, C]`` to ``[new cells, C]`` in fp32, by a matrix ``[new, old]`` for each axis."""
    with _without_autocast(table.device):
        x = rows.to(table.device) @ table.float().reshape(rows.shape[1], -1)
        x = cols.to(table.device) @ x.reshape(rows.shape[0], cols.shape[1], -1)
        return x.flatten(0, 1).to(table.dtype)


def resample_table(table: Tensor, old: Grid, new: Grid, offset: float = 0.0) -> Tensor:
    """Resample ``[old cells, C]`` to ``[new cells, C]``: torch's bicubic by size, in fp32.

    The centre of a cell takes the value of the same place of the picture. ``offset`` 0.1 gives the published
    arithmetic: a scale factor of (new + 0.1) / old that also sets the sampling grid.
    """
    if old == new and not offset:
        return table
    return _resample(table, _by_size(old[0], new[0], offset), _by_size(old[1], new[1], offset))


def resample_relative(table: Tensor, old: Grid, new: Grid, method: RelativeMethod = "fraction") -> Tensor:
    """Resample a relative-position table ``[(2h-1)(2w-1), heads]`` from one window to another, in fp32.

    Args:
        method: ``fraction``: an offset takes the value of the old offset that is the same fraction of the
            picture (cubic convolution; an offset past the outermost known one, by less than a unit, takes
            about that one's value). ``size``: torch's bicubic by size over the table as a picture, as the
            authors' detection and segmentation code loads it; its factor (2 old - 1) / (2 new - 1) is 1 % off
            the fraction from 14 to 20. ``geometric``: the way of BEiT's loader, which Fast-iTPN's code has
            too: an offset of a unit or two keeps its value, far ones are spread geometrically up to the new
            outermost (cubic spline).

    Raises:
        UserError: ``geometric`` from or to fewer than 3 units, or to fewer than half.
    """
    if old == new:
        return table
    if method == "size":
        rows, cols = (_by_size(2 * a - 1, 2 * b - 1, 0.0) for a, b in zip(old, new, strict=True))
    else:
        along = _by_fraction if method == "fraction" else _by_geometric
        rows, cols = (along(a, b) for a, b in zip(old, new, strict=True))
    return _resample(table, rows, cols)


def resample_axis(table: Tensor, new: int) -> Tensor:
    """Resample one axis of relative positions, ``[2 old - 1, D]`` to ``[2 new - 1, D]``: linear by size, in
    fp32, as ViTDet does for its decomposed tables."""
    if table.shape[0] == 2 * new - 1:
        return table
    with _without_autocast(table.device):
        return (_by_size_linear(table.shape[0], 2 * new - 1).to(table.device) @ table.float()).to(table.dtype)


@_cached
def relative_index(grid: Grid) -> Tensor:
    """Index ``[L, L]`` (query, key) into a table of offsets (dy, dx), each counted from its most negative
    value."""
    rows, cols = grid
    places = torch.meshgrid(torch.arange(rows, device="cpu"), torch.arange(cols, device="cpu"), indexing="ij")
    y, x = (place.flatten() for place in places)
    return (y[:, None] - y + rows - 1) * (2 * cols - 1) + (x[:, None] - x + cols - 1)
