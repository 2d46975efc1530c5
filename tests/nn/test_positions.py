"""Position tables against direct formulas and against torch's own interpolation."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from itpn.nn.positions import relative_index, resample_relative, resample_table, sincos_table

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


def test_relative_tables_are_resampled_as_maps_of_offsets():
    table = torch.randn(7 * 7, 3, generator=torch.Generator().manual_seed(0))
    ours = resample_relative(table, (4, 4), (6, 5))
    expected = F.interpolate(table.T.reshape(1, 3, 7, 7), size=(11, 9), mode="bicubic").flatten(2)[0].T
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
