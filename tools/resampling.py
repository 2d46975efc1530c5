"""Error of resampled position tables against their formulas, as Markdown: `python tools/resampling.py`."""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from itpn.nn.positions import Grid, resample_relative, resample_table, sincos_table

SMALL, LARGE = (14, 14), ((20, 20), (24, 16))
Way = Callable[[Tensor, Grid, Grid], Tensor]


def antialiased(table: Tensor, old: Grid, new: Grid) -> Tensor:
    image = table.T.reshape(1, -1, *old)
    return F.interpolate(image, size=new, mode="bicubic", antialias=True).flatten(2)[0].T


def waves(old: Grid, new: Grid) -> Tensor:
    """The sine-cosine table of ``old``, 512 wide, at the centres of the cells of ``new``."""
    frequency = 10000.0 ** -(torch.arange(128, dtype=torch.float64) / 128)
    row, col = ((torch.arange(b).double() + 0.5) * a / b - 0.5 for a, b in zip(old, new, strict=True))
    angles = [axis.flatten()[:, None] * frequency for axis in torch.meshgrid(row, col, indexing="ij")[::-1]]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)


def bell(grid: Grid, width: float = 0.2) -> Tensor:
    """A relative table that falls off as a Gaussian of the offset's fraction of the picture."""
    y, x = (torch.arange(1 - n, n).double() / n for n in grid)
    return torch.exp(-(y[:, None] ** 2 + x**2) / (2 * width**2)).reshape(-1, 1)


def report(title: str, ways: Mapping[str, Way], made: Callable[[Grid], Tensor], true: Way) -> None:
    """One line for each change of grid, there and back too; ``true(table, old, new)`` is the formula."""
    print(f"| {title}, rms / max | {' | '.join(ways)} |\n|---|{'---|' * len(ways)}")
    routes = [(SMALL, SMALL), *((SMALL, big) for big in LARGE), *((big, SMALL) for big in LARGE)]
    for route in [*routes, *((SMALL, big, SMALL) for big in LARGE)]:
        cells = []
        for way in ways.values():
            table = made(route[0])
            for old, new in pairwise(route):
                table = way(table, old, new)
            error = table - true(table, route[0], route[-1])
            cells.append(f"{error.square().mean().sqrt():.4f} / {error.abs().max():.3f}")
        print(f"| {' → '.join('{} x {}'.format(*grid) for grid in route)} | {' | '.join(cells)} |")
    print()


if __name__ == "__main__":
    published = partial(resample_table, offset=0.1)
    tables = {"exact": resample_table, "published": published, "exact, antialiased": antialiased}
    report("position table", tables, partial(sincos_table, width=512), lambda _, old, new: waves(old, new))
    methods = ("fraction", "size", "geometric")
    relative = {method: partial(resample_relative, method=method) for method in methods}
    report("relative-position table", relative, bell, lambda _, old, new: bell(new))
