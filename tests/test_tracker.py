"""Template and search together: the example runs, and stage 3 over both is plain attention over a set."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import itpn

EXAMPLE = Path(__file__).parents[1] / "examples" / "tracker.py"


@pytest.fixture(scope="module")
def tracker():
    spec = importlib.util.spec_from_file_location("tracker", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=["itpn_pico", "fast_itpn_nano"])
def backbone(request):
    torch.manual_seed(0)
    backbone = itpn.create_model(request.param, image_size=64, features="tokens").eval().backbone
    for parameter in backbone.stage3.parameters():  # so that attention weighs something
        torch.nn.init.normal_(parameter, std=0.1)
    return backbone


def tokens(backbone, num, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, num, backbone.config.shape.width, generator=generator)


def test_the_example_finds_the_template(tracker, capsys):
    maps = tracker.main()
    for found in maps.values():
        assert found.shape == (8, 8)
        assert found[4:, 4:].min() > found[:4].max()
    assert len(maps) == 2 and len(capsys.readouterr().out.splitlines()) == 2 * 9


def test_six_channels_see_two_images_and_of_one_twice_the_same_as_three(tracker, backbone):
    wide, images = tracker.with_six_channels(backbone), torch.randn(2, 3, 64, 64)
    expected = backbone(images)
    for found, three in zip(wide(torch.cat([images, images], 1)), expected, strict=True):
        torch.testing.assert_close(found, three, atol=1e-4, rtol=1e-4)
    other = wide(torch.cat([images, torch.zeros_like(images)], 1))
    assert not torch.allclose(other.c16, expected.c16, atol=1e-2)


def test_a_templates_positions_are_made_of_the_search_images(tracker):
    """Places on a plane: the corners of both grids meet, or the upper left parts do."""
    place = torch.cartesian_prod(torch.arange(14.0), torch.arange(14.0))
    cut = tracker.template_positions(place, (14, 14), (7, 5), cut=True)
    assert torch.equal(cut, torch.cartesian_prod(torch.arange(7.0), torch.arange(5.0)))
    resized = tracker.template_positions(place, (14, 14), (7, 7), cut=False).unflatten(0, (7, 7))
    for row, col in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        torch.testing.assert_close(resized[row, col], place.unflatten(0, (14, 14))[row, col])
    torch.testing.assert_close(resized[3, 3], torch.tensor([6.5, 6.5]))


def test_taps_are_counted_with_the_merges(tracker, backbone):
    """Their list holds a block of stage 1, a merge, a block of stage 2, a merge, and then stage 3."""
    assert tracker.taps_of(backbone, [4, 5]) == [0, 1]
    with pytest.raises(SystemExit, match="stage 3 starts with their block 4"):
        tracker.taps_of(backbone, [3])
    template, search = tokens(backbone, 4), tokens(backbone, 9, 1)
    last = 3 + len(backbone.stage3)
    _, after, tapped = tracker.joint(backbone, template, search, tracker.taps_of(backbone, [4, last]))
    first = backbone.stage3[0](torch.cat([template, search], 1))[:, 4:]
    torch.testing.assert_close(tapped[0], first)
    torch.testing.assert_close(tapped[1], after)


def test_each_image_has_positions_on_its_own_grid(tracker, backbone):
    template, search = torch.randn(2, 1, 3, 64, 64), torch.randn(2, 1, 3, 128, 128)
    for images in (template[0], search[0]):
        alone, grid = tracker.tokens_of(backbone, images)
        assert grid == (images.shape[2] // 16,) * 2
        torch.testing.assert_close(backbone.context(alone)[0], backbone(images).c16)


def test_an_empty_search_leaves_the_template_alone(tracker, backbone):
    template = tokens(backbone, 16)
    together, rest, _ = tracker.joint(backbone, template, template[:, :0])
    assert rest.shape[1] == 0
    torch.testing.assert_close(together, backbone.context(template)[0])


@settings(max_examples=10, deadline=None)
@given(num=st.integers(1, 20), seed=st.integers(0, 99))
def test_template_and_search_are_one_set(tracker, backbone, num, seed):
    template, search = tokens(backbone, 7, seed), tokens(backbone, num, seed + 1)
    first, second, _ = tracker.joint(backbone, template, search)
    swapped_second, swapped_first, _ = tracker.joint(backbone, search, template)
    torch.testing.assert_close(first, swapped_first, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(second, swapped_second, atol=1e-4, rtol=1e-4)
    order = torch.randperm(num, generator=torch.Generator().manual_seed(seed))
    again, permuted, _ = tracker.joint(backbone, template, search[:, order])
    torch.testing.assert_close(first, again, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(second[:, order], permuted, atol=1e-4, rtol=1e-4)


def test_the_search_sees_the_template(tracker, backbone):
    template, search = tokens(backbone, 4), tokens(backbone, 9, 1)
    _, second, _ = tracker.joint(backbone, template, search)
    _, without, _ = tracker.joint(backbone, template[:, :0], search)
    assert not torch.allclose(second, without, atol=1e-2)


def test_attention_over_both_is_torchs(tracker, backbone):
    """The search tokens' part of the first block's attention, from torch's own function."""
    attention, num_heads = backbone.stage3[0].attn, backbone.config.shape.num_heads
    together = torch.cat([tokens(backbone, 4), tokens(backbone, 9, 1)], 1)
    q, k, v = (F.linear(together, weight) for weight in attention.qkv.weight.chunk(3))
    if attention.q_bias is not None:
        q, v = q + attention.q_bias, v + attention.v_bias
    else:
        q, k, v = (x + bias for x, bias in zip((q, k, v), attention.qkv.bias.chunk(3), strict=True))
    theirs = torch.nn.MultiheadAttention(together.shape[2], num_heads, batch_first=True)
    identity = torch.eye(together.shape[2])
    theirs.load_state_dict(
        {
            "in_proj_weight": identity.repeat(3, 1), "in_proj_bias": torch.zeros(3 * together.shape[2]),
            "out_proj.weight": attention.proj.weight, "out_proj.bias": attention.proj.bias,
        }
    )  # fmt: skip
    expected, _ = theirs(q[:, 4:], k, v)
    torch.testing.assert_close(attention(together)[:, 4:], expected, atol=1e-4, rtol=1e-4)
