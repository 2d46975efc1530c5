"""Layer decay against what the authors' code gives its optimiser, and what every rule keeps."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.optim import param_groups_layer_decay

from itpn.engine.optim import AdamWConfig, parameter_groups
from itpn.errors import UserError
from itpn.heads.classify import Classifier, ClassifierConfig
from itpn.nn.depth import LayerDecayConfig, layer_ids, lr_scales
from itpn.nn.hivit import SIZES, HiViT, HiViTConfig
from itpn.timm import TimmModel
from itpn.weights.names import to_ours
from tests.toys import toy_objective

RULES = Path(__file__).parents[1] / "reference" / "rules"
BASE, LARGE = SIZES["itpn_base"].depths, SIZES["itpn_large"].depths
PIXEL, CLIP = {"relative_position_bias": True}, {"relative_position_bias": True, "layer_scale": 0.1}
FAST = {"layer_scale": 0.1}


def places(depths: tuple[int, int, int], prefix: str = "") -> list[str]:
    """One parameter of each place, from the stem upwards."""
    stages = [[f"stage{s}.{i}.mlp.fc1.weight" for i in range(depths[s - 1])] for s in (1, 2, 3)]
    merges = [[f"merge{s}.reduce.weight"] for s in (1, 2)]
    backbone = ["stem_proj.weight", *stages[0], *merges[0], *stages[1], *merges[1], *stages[2]]
    return [f"{prefix}backbone.{name}" for name in backbone] + ["pyramid.align.weight", "head.weight"]


@pytest.mark.parametrize(
    ("table", "size", "fields", "rule"),
    [
        ("pixel_itpn_base_ft_ld0.60", "itpn_base", PIXEL, "itpn"),
        ("pixel_itpn_large_ft_ld0.55", "itpn_large", PIXEL, "itpn"),
        ("clip_itpn_base_ft_ld0.60", "itpn_base", CLIP, "itpn"),
        ("clip_itpn_large_ft_ld0.55", "itpn_large", CLIP, "itpn"),
        ("fast_tiny_ld0.80", "fast_itpn_tiny", FAST, "fast"),
        ("fast_small_ld0.90", "fast_itpn_small", FAST, "fast"),
        ("fast_base_ld0.90", "fast_itpn_base", FAST, "fast"),
        ("fast_large_ld0.95", "fast_itpn_large", FAST, "fast"),
    ],
)
def test_fine_tuning_as_published(table, size, fields, rule):
    """Layer, scale and weight decay of every parameter, and the number of groups."""
    published = json.loads((RULES / f"{table}.json").read_text())
    style = "fast" if rule == "fast" else "official"
    rows = list(published["params"].items())
    numbered = {key: torch.tensor([i]) for i, (key, _) in enumerate(rows)}
    translated, unknown = to_ours(numbered, style, "mean-norm")
    assert not unknown

    with torch.device("meta"):
        model = Classifier(HiViT(HiViTConfig(size=size, **fields)), ClassifierConfig(num_classes=1000))
    names, depths = [name for name, _ in model.named_parameters()], model.backbone.config.shape.depths
    assert set(names) == set(translated)
    ids = layer_ids(names, depths, rule)
    scales = lr_scales(names, depths, LayerDecayConfig(rate=published["layer_decay"], rule=rule))
    groups = parameter_groups(model, AdamWConfig(weight_decay=0.05), scales)
    assert len(groups) == published["n_groups"]
    ours = {name: group for group in groups for name, _ in group["params"]}
    for name, numbers in translated.items():
        for i in numbers.tolist():
            row = rows[i][1]
            assert ids[name] == row["layer_id"], name
            assert ours[name]["lr_scale"] == pytest.approx(row["lr_scale"], rel=1e-9, abs=0), name
            assert ours[name]["weight_decay"] == row["weight_decay"], name


def test_timm_puts_the_sound_layers_on_the_same_models():
    model = TimmModel("itpn_nano", features="stages")
    names, depths = [name for name, _ in model.named_parameters()], model.backbone.config.shape.depths
    groups = param_groups_layer_decay(model, layer_decay=0.7)
    expected = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    scales = lr_scales(names, depths, LayerDecayConfig(rate=0.7))
    for name, parameter in model.named_parameters():
        assert scales[name] == pytest.approx(expected[id(parameter)], rel=1e-12), name


@pytest.mark.parametrize(
    ("rule", "rate", "depths", "stem", "last"),
    [
        ("detection", 0.90, BASE, 0.038, 1.111),
        ("detection", 0.95, LARGE, 0.95**45, 1.053),
        ("segmentation", 0.90, BASE, 0.90 ** (13 * 31 / 32), 1.044),
        ("segmentation", 0.95, LARGE, 0.95 ** (13 * 45 / 46), 1.015),
    ],
)
def test_detection_and_segmentation_as_published(rule, rate, depths, stem, last):
    """The last block overtakes the head, which is at 1: the merges are counted, but not below the head."""
    names = [*places(depths), "backbone.position"]
    config = LayerDecayConfig(rate=rate, rule=rule)
    scales = lr_scales(names, depths, config)
    assert scales["backbone.stem_proj.weight"] == pytest.approx(stem, rel=0.02)
    assert scales[f"backbone.stage3.{depths[2] - 1}.mlp.fc1.weight"] == pytest.approx(last, abs=5e-4)
    assert scales["head.weight"] == scales["pyramid.align.weight"] == 1
    expected = 1 if rule == "detection" else scales["backbone.stem_proj.weight"]
    assert scales["backbone.position"] == expected
    if rule == "detection":
        assert scales[f"backbone.stage3.{depths[2] - 2}.mlp.fc1.weight"] == 1


@given(
    depths=st.tuples(*[st.integers(1, 12)] * 3),
    rate=st.floats(0.05, 0.999) | st.just(1.0),
    rule=st.sampled_from(["sound", "itpn", "fast"]),
    prefix=st.sampled_from(["", "model.", "backbone.body."]),
)
def test_scales_grow_from_the_stem_to_the_head(depths, rate, rule, prefix):
    names = places(depths, prefix)
    scales = lr_scales(names, depths, LayerDecayConfig(rate=rate, rule=rule))
    assert list(scales) == names
    in_order = list(scales.values())
    assert in_order == sorted(in_order)
    assert in_order[0] > 0
    assert in_order[-1] == 1
    blocks = [scale for name, scale in scales.items() if ".stage" in name]
    assert rate == 1 or max(blocks) < 1


@given(depths=st.tuples(*[st.integers(1, 12)] * 3), rate=st.floats(0.05, 0.99))
def test_a_sound_step_is_one_rate(depths, rate):
    """Residual blocks alone are layers: each is one rate below the next, and the last below the head."""
    names = [name for name in places(depths) if "merge" not in name and "pyramid" not in name]
    scales = list(lr_scales(names, depths, LayerDecayConfig(rate=rate)).values())
    assert scales == pytest.approx([rate ** (len(scales) - 1 - i) for i in range(len(scales))])


def test_rates_compare_as_their_help_says():
    names = ["backbone.stage3.0.attn.proj.weight", "backbone.stage3.1.attn.proj.weight"]
    for rule, rate, depths, step in [
        ("sound", 0.75, BASE, 0.75),
        ("itpn", 0.60, BASE, 0.807),
        ("itpn", 0.55, LARGE, 0.841),
        ("segmentation", 0.90, BASE, 0.958),
        ("fast", 0.90, BASE, 0.90),
        ("detection", 0.90, BASE, 0.90),
    ]:
        lower, upper = lr_scales(names, depths, LayerDecayConfig(rate=rate, rule=rule)).values()
        assert lower / upper == pytest.approx(step, abs=5e-4), rule


def test_an_objective_with_pyramid_and_decoder():
    """Everything but the backbone is on top, under the names that training has."""
    objective = toy_objective()
    names = [name for name, _ in objective.named_parameters()]
    scales = lr_scales(names, (1, 1, 2), LayerDecayConfig(rate=0.5))
    assert {name for name, scale in scales.items() if scale == 1} == {
        name for name in names if not name.startswith("model.backbone.")
    }
    assert scales["model.backbone.position"] == scales["model.backbone.stem_norm.bias"] == 0.5**5
    assert (
        scales["model.backbone.merge2.norm.weight"] == scales["model.backbone.stage2.0.norm.bias"] == 0.5**3
    )


def test_names_without_a_backbone():
    with pytest.raises(UserError, match="no parameter's name contains backbone"):
        lr_scales(["encoder.stage1.0.norm.weight"], BASE, LayerDecayConfig(rate=0.5))


def test_depths_of_another_backbone():
    with pytest.raises(ValueError, match=r"stage1\.3.*no such block"):
        layer_ids(["backbone.stage1.3.norm.weight"], BASE)


@pytest.mark.parametrize("rate", [0.0, 1.5])
def test_a_rate_that_is_none(rate):
    with pytest.raises(UserError, match=r"layer_decay\.rate"):
        LayerDecayConfig(rate=rate)
