"""The backbone: units never mix before stage 3, any grid, any channels, drop path, checkpointing."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from itpn.errors import UserError
from itpn.nn.hivit import SIZES, HiViT, HiViTConfig
from itpn.nn.layers import Attention, Merge, Split, add_branch, drop_path_factors, to_map, units_of
from itpn.nn.positions import Relative, relative_index
from tests.toys import toy_backbone


def build(**numbers):
    torch.manual_seed(0)
    return HiViT(toy_backbone(**numbers))


def images(size=(64, 64), batch=2, channels=3):
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))


def test_units_and_maps_are_inverse():
    x = images((32, 48))
    assert torch.equal(to_map(units_of(x, 16), (2, 3)), x)
    assert torch.equal(units_of(x, 16)[1, 4, 3, 5], x[1, :, 16 + 3, 16 + 5])


def test_stem_is_the_published_convolution_per_unit():
    model, x = build(), images()
    weight = model.stem_proj.weight.view(8, 4, 4, 3).permute(0, 3, 1, 2)
    by_convolution = F.conv2d(x, weight, model.stem_proj.bias, stride=4)
    by_convolution = F.layer_norm(by_convolution.movedim(1, -1), (8,), eps=1e-6).movedim(-1, 1)
    torch.testing.assert_close(to_map(model.stem(x), (4, 4)), by_convolution, atol=1e-5, rtol=1e-4)


def test_merge_gathers_row_fastest():
    merge = Merge(2, 1e-6)
    x = torch.arange(8.0).view(1, 1, 2, 2, 2)
    seen = []
    merge.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    assert merge(x).shape == (1, 1, 1, 1, 4)
    assert seen[0].flatten().tolist() == [0, 1, 4, 5, 2, 3, 6, 7]


def test_split_lays_cells_out_row_by_row():
    split = Split(4, 3, 1e-6)
    x = torch.randn(1, 2, 2, 2, 4)
    flat = split.expand(split.norm(x))
    out = split(x)
    assert out.shape == (1, 2, 4, 4, 3)
    for row in range(4):
        for col in range(4):
            part = 2 * (row % 2) + col % 2
            torch.testing.assert_close(
                out[0, 1, row, col], flat[0, 1, row // 2, col // 2, 3 * part : 3 * part + 3]
            )


def test_attention_is_torchs_multi_head_attention():
    torch.manual_seed(0)
    ours, theirs = Attention(32, 4), nn.MultiheadAttention(32, 4, batch_first=True)
    theirs.load_state_dict(
        {
            "in_proj_weight": ours.qkv.weight, "in_proj_bias": ours.qkv.bias,
            "out_proj.weight": ours.proj.weight, "out_proj.bias": ours.proj.bias,
        }
    )  # fmt: skip
    x = torch.randn(2, 9, 32)
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0], atol=1e-5, rtol=1e-4)


def test_relative_bias_is_added_to_the_scaled_product():
    torch.manual_seed(0)
    attention = Attention(8, 2, window=(3, 2))
    nn.init.normal_(attention.relative_position)
    x, pairs = torch.randn(1, 6, 8), relative_index((3, 2))
    q, k, v = attention.qkv(x).view(6, 3, 2, 4).unbind(1)
    out = []
    for head in range(2):
        logits = q[:, head] @ k[:, head].T / 2
        for i in range(6):
            for j in range(6):
                logits[i, j] = logits[i, j] + attention.relative_position[pairs[i, j], head]
        out.append(logits.softmax(-1) @ v[:, head])
    expected = attention.proj(torch.cat(out, 1))
    torch.testing.assert_close(attention(x, Relative(pairs, (3, 2)))[0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
def test_dropped_units_leave_the_others_as_if_never_there(bias):
    """Units see only themselves in stages 1-2; stage 3 takes all of them, kept in another order, as a set."""
    model, x = build(relative_position_bias=bias), images()
    for table in model.parameters():
        nn.init.normal_(table, std=0.1)
    keep = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    whole, shuffled = model(x), model(x, keep)
    for level, again in zip(whole, shuffled, strict=True):
        index = keep.view(2, 16, *[1] * (level.ndim - 2)).expand_as(level)
        torch.testing.assert_close(level.gather(1, index), again, atol=1e-5, rtol=1e-4)
    some = model(x, keep[:, :5])
    torch.testing.assert_close(some.c4, shuffled.c4[:, :5])
    torch.testing.assert_close(some.c8, shuffled.c8[:, :5])
    assert not torch.allclose(some.c16, shuffled.c16[:, :5])


@pytest.mark.parametrize("size", [(64, 64), (32, 96), (16, 16), (128, 80)])
@pytest.mark.parametrize("bias", [False, True])
def test_any_grid(size, bias):
    model = build(relative_position_bias=bias)
    features = model(images(size))
    N = size[0] * size[1] // 256
    assert [list(x.shape) for x in features] == [[2, N, 4, 4, 8], [2, N, 2, 2, 16], [2, N, 32]]
    features.c16.sum().backward()
    assert model.position.grad.abs().sum() > 0


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_any_number_of_channels(channels):
    assert build(in_channels=channels)(images(channels=channels)).c16.shape == (2, 16, 32)


def test_taps_are_block_outputs():
    model, tokens = build(), torch.randn(2, 7, 32)
    last, taps = model.context(tokens, taps=(0, 1))
    assert torch.equal(taps[0], model.stage3[0](tokens))
    assert torch.equal(taps[1], last)


def test_drop_path_follows_the_given_numbers():
    branch = torch.ones(4, 2, 3)
    factors = drop_path_factors(torch.tensor([[0.1], [0.5], [0.25], [0.9]]), torch.tensor([0.25]))
    added = add_branch(2 * branch, branch, factors[:, 0])
    assert added[:, 0, 0].tolist() == pytest.approx([2, 10 / 3, 10 / 3, 10 / 3])
    model, x = build(drop_path=0.5).train(), images()
    always, never = torch.ones(2, model.num_drops), torch.zeros(2, model.num_drops)
    assert model.num_drops == 1 + 1 + 2 * 2
    assert model.drop_rates.tolist() == pytest.approx([0, 1 / 6, 1 / 3, 1 / 3, 1 / 2, 1 / 2])
    tokens = model.local(model.stem(x))[0]
    dropped = model(x, drop=never)
    torch.testing.assert_close(dropped.c4, tokens)  # the first block's rate is 0
    torch.testing.assert_close(dropped.c8, model.merge1(tokens))  # the second block is gone
    assert not torch.allclose(model(x, drop=always).c16, model.eval()(x).c16)  # survivors are scaled up
    assert torch.equal(model(x, drop=never).c16, model(x).c16)  # and in evaluation nothing is dropped


def test_without_given_numbers_training_draws_its_own():
    model, x = build(drop_path=0.5).train(), images()
    assert not torch.equal(model(x).c16, model(x).c16)


def test_checkpointing_changes_no_gradient():
    plain, saving = build(drop_path=0.3).train(), build(drop_path=0.3, checkpointing=True).train()
    drop = torch.rand(2, plain.num_drops)
    for model in (plain, saving):
        model(images(), drop=drop).c16.square().sum().backward()
    for ours, theirs in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_frozen_table_is_not_trained_and_starts_as_said():
    model = build(position_frozen=True, position="normal")
    assert not model.position.requires_grad
    assert 0.015 < model.position.std().item() < 0.025


def test_every_size_builds():
    with torch.device("meta"):
        for size in SIZES:
            HiViT(HiViTConfig(size=size))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": "huge"}, "hivit_base"),
        ({"image_size": 100}, "multiple of the unit of 16 pixels; the nearest is 96"),
        ({"patch_size": 6}, "multiple of 4"),
        ({"width": 50}, "heads"),
    ],
)
def test_wrong_configs_name_field_and_cure(change, words):
    with pytest.raises(UserError, match=words):
        replace(toy_backbone(), **change)


def test_image_that_is_no_multiple_of_the_unit():
    with pytest.raises(UserError, match="40 x 64 pixels"):
        build()(images((40, 64)))
