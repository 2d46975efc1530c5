"""Fast-iTPN's layers, decomposed relative positions and maps for downstream, each computed a second way."""

import pytest
import torch
import torch.nn.functional as F

from itpn.nn.hivit import SIZES, HiViT, HiViTConfig
from itpn.nn.layers import Attention, SwiGlu, to_map
from itpn.nn.positions import Relative, relative_index
from itpn.nn.pyramid import Model, ModelConfig, PyramidConfig, detection_maps, segmentation_maps


def fast(**numbers):
    given = {"width": 32, "depths": (1, 1, 2), "num_heads": 2, "image_size": 64, "layer_scale": 0.1}
    return HiViTConfig(size="fast_itpn_nano", **(given | numbers))


def randomised(module):
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module.eval()


def test_attention_without_key_bias_is_attention_with_a_key_bias_of_zero():
    bare, full = randomised(Attention(32, 4, key_bias=False)), Attention(32, 4)
    state = bare.state_dict()
    zeros = torch.zeros(32)
    state["qkv.bias"] = torch.cat([state.pop("q_bias"), zeros, state.pop("v_bias")])
    full.load_state_dict(state)
    x = torch.randn(2, 9, 32)
    torch.testing.assert_close(bare(x), full(x))


def test_gated_mlp():
    mlp = randomised(SwiGlu(8, 3.0, 1e-6))
    x = torch.randn(2, 5, 8)
    gate = x @ mlp.gate.weight.T + mlp.gate.bias
    hidden = gate * torch.sigmoid(gate) * (x @ mlp.fc1.weight.T + mlp.fc1.bias)
    mean, variance = hidden.mean(-1, keepdim=True), hidden.var(-1, keepdim=True, unbiased=False)
    normed = (hidden - mean) / (variance + 1e-6).sqrt() * mlp.norm.weight + mlp.norm.bias
    torch.testing.assert_close(mlp(x), normed @ mlp.fc2.weight.T + mlp.fc2.bias)


def decomposed_bias(attention, q, places):
    """ViTDet's bias, entry by entry: the unscaled query times the vectors of its row and column offsets."""
    B, heads, L, _ = q.shape
    rows, cols = attention.relative_position_rows, attention.relative_position_cols
    bias = torch.zeros(B, heads, L, L)
    for b in range(B):
        for i, (y, x) in enumerate(places[b]):
            for j, (v, u) in enumerate(places[b]):
                vector = rows[y - v + attention.window[0] - 1] + cols[x - u + attention.window[1] - 1]
                bias[b, :, i, j] = q[b, :, i] @ vector
    return bias


@pytest.mark.parametrize("kept", [False, True])
def test_decomposed_relative_positions_are_vitdets(kept):
    attention = randomised(Attention(16, 2, window=(2, 3), decomposed=True))
    cells = [(y, x) for y in range(2) for x in range(3)]
    ids = torch.tensor([[0, 2, 5], [1, 3, 4]]) if kept else torch.arange(6).expand(2, 6)
    pairs = relative_index((2, 3))
    relative = Relative(pairs[ids[:, :, None], ids[:, None, :]] if kept else pairs, (2, 3))
    q = torch.randn(2, 2, ids.shape[1], 8)
    places = [[cells[i] for i in row] for row in ids.tolist()]
    ours = attention.bias(relative, q)
    torch.testing.assert_close(ours.expand(2, -1, -1, -1), decomposed_bias(attention, q, places))


def test_decomposed_tables_take_another_grid():
    config = HiViTConfig(
        size="itpn_pico", image_size=64, relative_position_bias=True, relative_position_decomposed=True
    )
    backbone = randomised(HiViT(config))
    features = backbone(torch.randn(1, 3, 96, 64))
    assert features.c16.shape == (1, 24, 64)
    features.c16.sum().backward()
    assert backbone.stage3[0].attn.relative_position_rows.grad.abs().sum() > 0


def test_bias_tables_may_be_for_another_grid_than_positions():
    config = HiViTConfig(size="itpn_pico", image_size=64, relative_image_size=96, relative_position_bias=True)
    backbone = HiViT(config)
    assert len(backbone.position) == 16
    assert len(backbone.stage3[0].attn.relative_position) == 11**2
    assert backbone(torch.randn(1, 3, 64, 96)).c8.shape == (1, 24, 2, 2, 32)


def test_layer_scale_of_fast_layers_is_in_stage_3_alone():
    names = {name for name, _ in HiViT(fast()).named_parameters() if name.endswith("gamma")}
    assert names == {f"stage3.{i}.scale{k}.gamma" for i in (0, 1) for k in (1, 2)}


def test_context_takes_any_set_of_tokens():
    """Tokens of two images together: each of their attention layers sees all, in whatever order."""
    backbone = randomised(HiViT(fast()))
    template, search = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 64, 48)
    sets = []
    for images in (template, search):
        _, _, tokens = backbone.local(backbone.stem(images))
        sets.append(backbone.embed(tokens, backbone.grid_of(images)))
    together, _ = backbone.context(torch.cat(sets, 1))
    swapped, _ = backbone.context(torch.cat(sets[::-1], 1))
    alone, _ = backbone.context(sets[0])
    assert together.shape == (2, 4 + 12, 32)
    torch.testing.assert_close(together[:, :4], swapped[:, 12:], atol=1e-4, rtol=0)
    assert not torch.allclose(together[:, :4], alone, atol=1e-2)


def test_units_of_a_fast_backbone_drop_out_as_of_any_other():
    backbone = randomised(HiViT(fast()))
    images, keep = torch.randn(2, 3, 64, 64), torch.tensor([[0, 5, 9], [2, 3, 15]])
    whole, some = backbone(images), backbone(images, keep)
    for i in range(2):
        torch.testing.assert_close(some.c4[i], whole.c4[i, keep[i]])
        torch.testing.assert_close(some.c8[i], whole.c8[i, keep[i]])


def test_every_pair_of_sizes_has_its_layers():
    for name, shape in SIZES.items():
        assert (shape.layers == "fast") == name.startswith("fast_")
        assert HiViTConfig(size=name).stage3_mlp_ratio == (3.0 if shape.layers == "fast" else 4.0)
    assert HiViTConfig(size="itpn_nano", layers="fast").shape.layers == "fast"


@pytest.mark.parametrize("grid", [(4, 4), (5, 6)])
def test_maps_for_detectors_and_segmentors(grid):
    config = ModelConfig(backbone=fast(), pyramid=PyramidConfig(width=24, layers="fast", depth=1))
    model = randomised(Model(config))
    features, levels = model(torch.randn(1, 3, 16 * grid[0], 16 * grid[1]))
    maps = detection_maps(levels, grid)
    assert [found.shape[1:] for found in maps[:3]] == [(24, k * grid[0], k * grid[1]) for k in (4, 2, 1)]
    p16 = to_map(levels.p16, grid)
    p32 = (
        p16[:, :, : grid[0] // 2 * 2, : grid[1] // 2 * 2]
        .unflatten(2, (-1, 2))
        .unflatten(4, (-1, 2))
        .mean((3, 5))
    )
    torch.testing.assert_close(maps[3], p32)
    torch.testing.assert_close(maps[4], F.adaptive_avg_pool2d(p32[:, :, :2, :2], 1))
    stages = segmentation_maps(features, levels, grid)
    assert [found.shape[1] for found in stages] == [24 + 8, 24 + 16, 24 + 32, 24 + 32]
    torch.testing.assert_close(stages[2], torch.cat([p16, to_map(features.c16, grid)], 1))
    whole = stages[2][:, :, : grid[0] // 2 * 2, : grid[1] // 2 * 2]
    torch.testing.assert_close(stages[3], whole.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).amax((3, 5)))


@pytest.mark.parametrize("decomposed", [False, True])
def test_half_precision_models_take_other_sizes_too(decomposed):
    config = HiViTConfig(
        size="itpn_pico",
        image_size=64,
        relative_position_bias=True,
        relative_position_decomposed=decomposed,
    )
    backbone = HiViT(config).bfloat16()
    assert backbone(torch.randn(1, 3, 96, 64, dtype=torch.bfloat16)).c16.dtype == torch.bfloat16
