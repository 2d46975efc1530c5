"""Block-wise masking: the published distribution, the exact count, and what no sample may be."""

import json
import math
import pickle
import random
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor

from itpn.errors import UserError
from itpn.objectives.masking import BlockMasking

PUBLISHED = json.loads((Path(__file__).parents[1] / "reference/rules/masking_blockwise.json").read_text())
SIDES = (14, 16)
DRAWS = 2000
SIGMAS = 5.0


@cache
def drawn(side: int, exact: bool) -> Tensor:
    """``[DRAWS, side, side]``: 1.0 where hidden."""
    generator = torch.Generator().manual_seed(side)
    draw = BlockMasking((side, side), exact=exact)
    return torch.stack([draw(generator)["hidden"] for _ in range(DRAWS)]).double().view(-1, side, side)


@cache
def plainly_drawn(side: int) -> Tensor:
    """The same from Python's own random numbers, cell by cell."""
    numbers = random.Random(0)
    return torch.tensor([plain_mask(side, numbers) for _ in range(DRAWS)]).double()


def plain_mask(side: int, numbers: random.Random) -> list[list[int]]:
    mask, missing, failures = [[0] * side for _ in range(side)], 75, 0
    while missing and failures < 10:
        failures += 1
        area = numbers.uniform(16, missing)
        aspect = math.exp(numbers.uniform(math.log(0.3), math.log(1 / 0.3)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if max(height, width) >= side:
            continue
        top, left = numbers.randint(0, side - height), numbers.randint(0, side - width)
        cells = [
            (y, x) for y in range(top, top + height) for x in range(left, left + width) if not mask[y][x]
        ]
        if 0 < len(cells) <= missing:
            missing, failures = missing - len(cells), 0
            for y, x in cells:
                mask[y][x] = 1
    return mask


def deviations(ours: Tensor, other: Tensor) -> Tensor:
    """How far the means of two independent samples ``[DRAWS, ...]`` lie apart, in standard errors."""
    error = ((ours.var(0) + other.var(0)) / DRAWS).sqrt()
    return (ours.mean(0) - other.mean(0)).abs() / error


def runs(hidden: Tensor) -> Tensor:
    """Neighbours of which both are hidden, per mask of ``[B, H, W]``: many in blocks, few in scattered
    units."""
    rows, columns = hidden[:, 1:] * hidden[:, :-1], hidden[:, :, 1:] * hidden[:, :, :-1]
    return rows.sum((1, 2)) + columns.sum((1, 2))


@pytest.mark.parametrize("side", SIDES)
def test_the_plain_way_is_the_published_one(side):
    published, plain = PUBLISHED[f"{side}x{side}"], plainly_drawn(side)
    assert plain[:3].tolist() == published["first3_random_seed_0"]
    counts = plain.sum((1, 2))
    assert counts.mean().item() == pytest.approx(published["mean"])
    assert (counts == 75).double().mean().item() == pytest.approx(published["frac_exact75"])
    assert (counts.min(), counts.max()) == (published["min"], published["max"])


@pytest.mark.parametrize("side", SIDES)
def test_as_published_the_distribution_is_the_published_one(side):
    ours, plain = drawn(side, exact=False), plainly_drawn(side)
    counts, plain_counts = ours.sum((1, 2)), plain.sum((1, 2))
    assert counts.max() == 75
    assert counts.min() >= 55
    assert deviations(counts, plain_counts) < SIGMAS
    assert deviations((counts == 75).double(), (plain_counts == 75).double()) < SIGMAS
    assert deviations(runs(ours), runs(plain)) < SIGMAS
    assert deviations(ours, plain).max() < SIGMAS


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("side", SIDES)
def test_every_side_of_the_image_is_treated_alike(side, exact):
    hidden = drawn(side, exact)
    for mirrored in (hidden.flip(1), hidden.flip(2), hidden.transpose(1, 2)):
        difference = hidden - mirrored
        error = (difference.var(0) / DRAWS).sqrt().clamp(min=1e-12)
        assert (difference.mean(0).abs() / error).max() < SIGMAS
    assert hidden.mean(0).min() > 0.01  # corners are rarely hidden


@pytest.mark.parametrize("side", SIDES)
def test_the_exact_count_changes_little(side):
    exact, published = drawn(side, exact=True), drawn(side, exact=False)
    assert (exact.sum((1, 2)) == 75).all()
    assert (exact.mean(0) - published.mean(0)).abs().max() < 0.08


@st.composite
def maskings(draw: st.DrawFn) -> BlockMasking:
    grid = draw(st.tuples(st.integers(2, 20), st.integers(2, 20)))
    num_hidden = draw(st.integers(1, grid[0] * grid[1] - 1))
    min_block = draw(st.integers(1, min(num_hidden, 16)))
    try:
        return BlockMasking(grid, num_hidden, min_block, exact=draw(st.booleans()), num_drops=3)
    except UserError:
        reject()


@settings(deadline=None)
@given(masking=maskings(), seed=st.integers(0, 2**32))
def test_any_grid_hides_what_it_should(masking, seed):
    first, again = (masking(torch.Generator().manual_seed(seed)) for _ in range(2))
    hidden, (height, width) = first["hidden"], masking.grid
    assert (hidden.dtype, hidden.shape) == (torch.bool, (height * width,))
    count = int(hidden.sum())
    assert count == masking.num_hidden if masking.exact else 1 <= count <= masking.num_hidden
    assert first["drop"].shape == (3,)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)


@settings(deadline=None, max_examples=30)
@given(grid=st.tuples(st.integers(2, 16), st.integers(2, 16)))
def test_the_largest_block_is_the_largest_that_some_aspect_lays(grid):
    num_hidden = grid[0] * grid[1] - 1
    area = torch.arange(1, num_hidden + 1).double()[:, None]
    aspect = torch.linspace(math.log(0.3), -math.log(0.3), 20001).double().exp()
    height, width = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = ((height < grid[0]) & (width < grid[1])).any(1)
    largest = int(fits.sum())
    BlockMasking(grid, num_hidden, largest)
    if largest < num_hidden:
        with pytest.raises(UserError, match="min_block"):
            BlockMasking(grid, num_hidden, largest + 1)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32), exact=st.booleans())
def test_hidden_units_stand_in_blocks(seed, exact):
    draw = BlockMasking((14, 14), exact=exact)
    hidden = draw(torch.Generator().manual_seed(seed))["hidden"]
    scattered = hidden[torch.randperm(196, generator=torch.Generator().manual_seed(seed))]
    blocks, random_units = (runs(units.view(1, 14, 14).double()).item() for units in (hidden, scattered))
    assert blocks > 1.3 * random_units


def test_draws_differ_and_come_from_the_generator_alone():
    draw = BlockMasking((14, 14))
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(1)
    random.seed(1)
    first, second = draw(generator), draw(generator)
    assert list(first) == ["hidden"]
    assert not torch.equal(first["hidden"], second["hidden"])
    torch.manual_seed(2)
    random.seed(2)
    again = pickle.loads(pickle.dumps(draw))(torch.Generator().manual_seed(0))
    assert torch.equal(first["hidden"], again["hidden"])


@pytest.mark.parametrize(
    ("grid", "num_hidden", "min_block", "field"),
    [
        ((4, 4), 75, 16, "num_hidden"),
        ((4, 4), 16, 4, "num_hidden"),
        ((14, 14), 0, 1, "num_hidden"),
        ((14, 14), -1, 1, "num_hidden"),
        ((14, 14), 75, 0, "min_block"),
        ((14, 14), 75, 76, "min_block"),
        ((4, 4), 15, 13, "min_block"),
        ((1, 9), 4, 1, "min_block"),
        ((2, 100), 60, 50, "min_block"),
    ],
)
def test_what_does_not_fit_names_its_field(grid, num_hidden, min_block, field):
    with pytest.raises(UserError, match=rf"^objective\.{field}: "):
        BlockMasking(grid, num_hidden, min_block)
