"""Position tables against direct formulas and against torch's own interpolation."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from itpn.errors import UserError
from itpn.nn.positions import (
    relative_index,
    resample_axis,
    resample_relative,
    resample_table,
    sincos_table,
)

grids = st.tuples(st.integers(1, 9), st.integers(1, 9))


@pytest.mark.parametrize("first", ["column", "row"])
def test_sincos_entries_follow_the_formula(first):
    table = sincos_table((3, 5), 16, first)
    for row in range(3):
        for col in range(5):
            axes = (col, row) if first == "column" else (row, col)
            for half, place in enumerate(axes):
                for i in range(4):
                    angle = place / 10000 ** (i / 4)
                    entry = table[row * 5 + col, 8 * half : 8 * half + 8]
                    assert entry[i].item() == pytest.approx(math.sin(angle), abs=1e-6)
                    assert entry[4 + i].item() == pytest.approx(math.cos(angle), abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(old=grids, new=grids)
def test_resampling_by_size_is_torchs_bicubic(old, new):
    table = torch.randn(old[0] * old[1], 6, generator=torch.Generator().manual_seed(1))
    image = table.T.reshape(1, 6, *old)
    expected = F.interpolate(image, size=new, mode="bicubic").flatten(2)[0].T
    torch.testing.assert_close(resample_table(table, old, new), expected, atol=1e-5, rtol=1e-5)


def test_published_resampling_uses_the_factor_itself():
    table = torch.randn(14 * 14, 8, generator=torch.Generator().manual_seed(0))
    image = table.T.reshape(1, 8, 14, 14)
    expected = F.interpolate(image, scale_factor=20.1 / 14, mode="bicubic").flatten(2)[0].T
    ours = resample_table(table, (14, 14), (20, 20), offset=0.1)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert (ours - resample_table(table, (14, 14), (20, 20))).abs().max() > 0.01


def test_same_grid_returns_the_very_table():
    table = torch.randn(12, 4)
    assert resample_table(table, (3, 4), (3, 4)) is table


def test_gradient_reaches_a_table_resampled_under_inference_first():
    with torch.inference_mode():
        resample_table(torch.randn(20, 4), (4, 5), (6, 7))
        relative_index((6, 7))
    table = torch.randn(20, 4, requires_grad=True)
    resample_table(table, (4, 5), (6, 7)).sum().backward()
    assert table.grad is not None
    torch.testing.assert_close(table.grad.sum(), torch.tensor(42.0 * 4), atol=1e-3, rtol=0)  # rows sum to 1


@settings(max_examples=25, deadline=None)
@given(grid=grids)
def test_relative_index_counts_offsets(grid):
    rows, cols = grid
    index = relative_index(grid)
    for query in range(rows * cols):
        for key in range(rows * cols):
            dy, dx = query // cols - key // cols, query % cols - key % cols
            assert index[query, key] == (dy + rows - 1) * (2 * cols - 1) + dx + cols - 1


def by_axes(grid: tuple[int, int], places: tuple[torch.Tensor, torch.Tensor], formula) -> torch.Tensor:
    """A relative table ``[(2h-1)(2w-1), 2]``: ``formula(y, x)`` and ``formula(x, y)`` at places per axis."""
    y, x = torch.meshgrid(*places, indexing="ij")
    assert y.shape == tuple(2 * side - 1 for side in grid)
    return torch.stack([formula(y, x), formula(x, y)], dim=-1).flatten(0, 1).float()


def offsets(side: int) -> torch.Tensor:
    return torch.arange(1 - side, side).double()


def test_relative_tables_by_size_are_resampled_as_pictures():
    table = torch.randn(7 * 7, 3, generator=torch.Generator().manual_seed(0))
    ours = resample_relative(table, (4, 4), (6, 5), "size")
    expected = F.interpolate(table.T.reshape(1, 3, 7, 7), size=(11, 9), mode="bicubic").flatten(2)[0].T
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(old=grids, times=st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_an_offset_keeps_the_value_of_its_fraction(old, times):
    """In a grid k times finer, k times as many units are the same fraction of the picture."""
    new = (old[0] * times[0], old[1] * times[1])
    table = torch.randn((2 * old[0] - 1) * (2 * old[1] - 1), 3, generator=torch.Generator().manual_seed(0))
    fine = resample_relative(table, old, new).view(2 * new[0] - 1, 2 * new[1] - 1, 3)
    kept = fine[times[0] - 1 :: times[0], times[1] - 1 :: times[1]][: 2 * old[0] - 1, : 2 * old[1] - 1]
    torch.testing.assert_close(kept.flatten(0, 1), table)


@settings(max_examples=25, deadline=None)
@given(
    old=st.tuples(st.integers(4, 20), st.integers(4, 20)),
    new=st.tuples(st.integers(2, 20), st.integers(2, 20)),
)
def test_fractions_of_a_quadratic_table_are_exact_inside_the_known_range(old, new):
    def formula(y, x):
        return 1 + y - 3 * x + 2 * x * y - y**2 * x

    table = by_axes(old, [offsets(side) / side for side in old], formula)
    places = [offsets(side) / side for side in new]
    ours = resample_relative(table, old, new).view(2 * new[0] - 1, 2 * new[1] - 1, 2)
    expected = by_axes(new, places, formula).view(ours.shape)
    # The four cells around a place are known when it is a cell away from the outermost.
    y, x = (place.abs() <= (side - 2) / side for place, side in zip(places, old, strict=True))
    torch.testing.assert_close(ours[y][:, x], expected[y][:, x], atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ["fraction", "size", "geometric"])
@pytest.mark.parametrize(("old", "new"), [((14, 14), (24, 16)), ((6, 9), (5, 5))])
def test_symmetric_relative_tables_stay_symmetric_around_their_zero(method, old, new):
    table = torch.randn(2 * old[0] - 1, 2 * old[1] - 1, 2, generator=torch.Generator().manual_seed(0))
    table = (table + table.flip(0, 1)) / 2
    ours = resample_relative(table.flatten(0, 1), old, new, method)
    torch.testing.assert_close(ours, ours.flip(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(ours[len(ours) // 2], table[old[0] - 1, old[1] - 1], atol=1e-5, rtol=0)


def test_geometric_spacing_keeps_near_offsets_and_spreads_far_ones():
    """4 units to 8: q = 2, so the old offsets 0, 1, 2, 3 lie at 0, 1, 1 + 2 and 1 + 2 + 4."""
    table = torch.randn(7 * 7, 3, generator=torch.Generator().manual_seed(0))
    ours = resample_relative(table, (4, 4), (8, 8), "geometric").view(15, 15, 3)
    places = torch.tensor([-7, -3, -1, 0, 1, 3, 7])
    torch.testing.assert_close(ours[places + 7][:, places + 7].flatten(0, 1), table, atol=1e-5, rtol=0)

    def cubic(y, x):
        return (y / 7) ** 3 - y * x / 7 + (x / 7) ** 2

    table = by_axes((4, 4), (places.double(), places.double()), cubic)
    expected = by_axes((8, 8), (offsets(8), offsets(8)), cubic)
    torch.testing.assert_close(
        resample_relative(table, (4, 4), (8, 8), "geometric"), expected, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(("old", "new"), [((2, 2), (4, 4)), ((14, 14), (6, 14))])
def test_geometric_spacing_refuses_what_it_cannot_carry(old, new):
    with pytest.raises(UserError, match="geometric spacing needs"):
        resample_relative(torch.zeros((2 * old[0] - 1) * (2 * old[1] - 1), 1), old, new, "geometric")


@settings(max_examples=25, deadline=None)
@given(old=st.integers(1, 20), new=st.integers(1, 20))
def test_tables_of_one_axis_are_resampled_linearly(old, new):
    table = torch.randn(2 * old - 1, 6, generator=torch.Generator().manual_seed(1))
    expected = F.interpolate(table.T[None], size=2 * new - 1, mode="linear")[0].T
    torch.testing.assert_close(resample_axis(table, new), expected, atol=1e-5, rtol=1e-5)
    assert resample_axis(table, old) is table


def test_exact_resampling_is_nearer_to_the_formula_than_the_published():
    """A sine-cosine table knows its values at the new centres, and the published way moves even its own."""
    old, new = 14, 20
    centres = (torch.arange(new) + 0.5) * old / new - 0.5
    frequency = 10000.0 ** -(torch.arange(16) / 16)
    sines = (centres[:, None] * frequency).sin()  # the columns' first channels
    table = sincos_table((old, old), 64)

    def error(offset: float) -> float:
        ours = resample_table(table, (old, old), (new, new), offset).view(new, new, 64)[:, :, :16]
        return (ours - sines).square().mean().sqrt().item()

    assert error(0.0) < error(0.1) < 0.1
    assert (resample_table(table, (old, old), (old, old), 0.1) - table).abs().max() > 0.05


class Resampling(torch.nn.Module):
    """Every table for the grid of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.position = torch.nn.Parameter(torch.randn(12, 2))
        self.relative = torch.nn.Parameter(torch.randn(5 * 7, 2))
        self.axis = torch.nn.Parameter(torch.randn(5, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, cols = x.shape
        relative = resample_relative(self.relative, (3, 4), (rows, cols))
        table = resample_table(self.position, (3, 4), (rows, cols), 0.1)
        return (
            relative[relative_index((rows, cols))].sum((0, 1))
            + table.sum(0)
            + resample_axis(self.axis, rows)[0]
        )


def test_tables_follow_the_grid_in_an_exported_graph():
    # Sizes that no other test asks for: tracing must come first, and leave nothing of its graph behind.
    module, x = Resampling(), torch.zeros(53, 47)
    sides = {i: torch.export.Dim(f"side{i}", min=30, max=60) for i in range(2)}
    exported = torch.export.export(module, (x,), dynamic_shapes={"x": sides}).module()
    for size in ((53, 47), (31, 43)):
        torch.testing.assert_close(
            exported(torch.zeros(size)), module(torch.zeros(size)), rtol=1e-3, atol=1e-2
        )


def test_gradient_reaches_every_resampled_table():
    """The output is linear in the tables: they times their gradients sum up to it."""
    module = Resampling()
    out = module(torch.zeros(5, 6)).sum()
    out.backward()
    products = [(table * table.grad).sum() for table in module.parameters()]
    assert all(products)
    torch.testing.assert_close(sum(products), out, atol=1e-3, rtol=1e-3)
