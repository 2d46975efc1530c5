"""Windowed attention against plain loops, and what it must leave alone."""

import pytest
import torch
from torch import nn

from itpn.errors import UserError
from itpn.nn.hivit import HiViT
from itpn.nn.layers import Attention
from itpn.nn.positions import Relative, relative_index
from itpn.nn.windows import Windows
from tests.toys import toy_backbone


def build(**numbers):
    torch.manual_seed(0)
    model = HiViT(toy_backbone(**{"depths": (1, 1, 4), "num_global_blocks": 2} | numbers)).eval()
    for table in model.parameters():
        nn.init.normal_(table, std=0.1)
    return model


def images(size):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("grid", [(4, 6), (5, 7), (3, 2), (7, 1)])
def test_cut_and_join(grid):
    tokens = torch.randn(2, grid[0] * grid[1], 3)
    windows = Windows.of(grid, 3)
    cut = windows.cut(tokens)
    assert torch.equal(windows.join(cut), tokens)
    down, across = -(-grid[0] // 3), -(-grid[1] // 3)
    assert cut.shape == (2 * down * across, 9, 3)
    laid, per_image = tokens.view(2, *grid, 3), down * across
    for b in range(2):
        for row in range(grid[0]):
            for col in range(grid[1]):
                window = b * per_image + (row // 3) * across + col // 3
                assert torch.equal(cut[window, row % 3 * 3 + col % 3], laid[b, row, col])


@pytest.mark.parametrize("grid", [(4, 4), (5, 3)])
@pytest.mark.parametrize("bias", [None, "table", "decomposed"])
def test_each_window_attends_as_if_alone(grid, bias):
    """Also one that the grid fills only in part, which sees no filler."""
    torch.manual_seed(0)
    table = None if bias is None else (2, 2)
    attention = Attention(8, 2, window=table, decomposed=bias == "decomposed")
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, grid[0] * grid[1], 8)
    pairs = relative_index((2, 2))
    found = attention(x, Relative(pairs, (2, 2)) if bias else None, Windows.of(grid, 2)).view(2, *grid, 8)
    for row in range(0, grid[0], 2):
        for col in range(0, grid[1], 2):
            part = x.view(2, *grid, 8)[:, row : row + 2, col : col + 2]
            inside = [2 * i + j for i in range(part.shape[1]) for j in range(part.shape[2])]
            own = Relative(pairs[inside][:, inside], (2, 2)) if bias else None
            alone = attention(part.reshape(2, -1, 8), own).view(part.shape)
            torch.testing.assert_close(found[:, row : row + 2, col : col + 2], alone, atol=1e-5, rtol=1e-4)


def test_global_blocks_are_evenly_spaced_up_to_the_last():
    assert build().global_blocks == {1, 3}
    assert build(depths=(1, 1, 24), num_global_blocks=4).global_blocks == {5, 11, 17, 23}
    assert build(depths=(1, 1, 2), num_global_blocks=4).global_blocks == {0, 1}
    assert build(num_global_blocks=0).global_blocks == set()


@pytest.mark.parametrize("bias", [{}, {"relative_position_bias": True}])
def test_same_weights_with_and_without_windows(bias):
    windowed, plain = build(window=2, **bias), build(**bias)
    plain.load_state_dict(windowed.state_dict())  # strict
    x = images((96, 80))
    found = windowed(x).c16
    assert not torch.allclose(found, plain(x).c16, atol=1e-3)
    every = build(window=2, num_global_blocks=4, **bias)
    every.load_state_dict(plain.state_dict())
    torch.testing.assert_close(every(x).c16, plain(x).c16)
    torch.testing.assert_close(windowed(x[:1]).c16, found[:1], atol=1e-5, rtol=1e-4)


def test_without_global_blocks_windows_never_mix():
    model, x = build(window=2, num_global_blocks=0, relative_position_bias=True), images((64, 96))
    changed = x.clone()
    changed[:, :, :32, :32] += 1
    moved = (model(x).c16 != model(changed).c16).any(-1).view(2, 4, 6)
    assert moved[:, :2, :2].all()
    assert not moved[:, 2:].any() and not moved[:, :, 2:].any()


def test_a_bias_for_the_window_is_taken_as_it_is(monkeypatch):
    """Where the table was learned for as many units as a window has; else its fractions of the picture."""
    model = build(window=4, relative_position_bias=True)
    seen = []
    block = model.stage3[0].attn
    monkeypatch.setattr(block, "bias", lambda *given: seen.append(Attention.bias(block, *given)))
    model(images((128, 128)))
    expected = block.relative_position[relative_index((4, 4))].permute(2, 0, 1)
    assert torch.equal(seen[0], expected)


def test_windows_reach_where_the_picture_ends_and_not_where_units_are_dropped():
    model, plain = build(window=4), build()
    plain.load_state_dict(model.state_dict())
    x, keep = images((128, 128)), torch.arange(10).repeat(2, 1)
    small = images((64, 64))
    assert torch.equal(model(small).c16, plain(small).c16)
    assert torch.equal(model(x, keep).c16, plain(x, keep).c16)


def test_gradients_and_checkpointing():
    gradients = []
    for checkpointing in (False, True):
        model = build(window=2, relative_position_bias=True, checkpointing=checkpointing).train()
        model(images((80, 96))).c16.square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
        assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in model.parameters())
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("numbers", [{"window": 0}, {"num_global_blocks": -1}])
def test_nonsense_is_refused(numbers):
    with pytest.raises(UserError, match="window"):
        toy_backbone(**numbers)
