"""Every published model's keys and shapes: strictly converted, counted, and written back as they were."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from itpn import cli
from itpn.errors import UserError
from itpn.nn.hivit import HiViTConfig
from itpn.nn.layers import to_map
from itpn.nn.pyramid import ModelConfig, PyramidConfig
from itpn.objectives.distill import DistillConfig, DistillObjective
from itpn.weights import files
from itpn.weights.families import FAMILIES, Given
from itpn.weights.files import Weights
from itpn.weights.translate import summary, translate, write_back
from tests.weights.released import REFERENCE, converted, family_of, load

MANIFESTS = sorted(path.stem for path in (REFERENCE / "manifests").glob("*__*.json"))
FIXTURES = sorted(path.stem for path in REFERENCE.glob("*.safetensors") if path.stem != "clip_teacher")
CALLS = ("forward (incl. head)", "forward (incl. heads)", "forward_features(no mask, incl. FPN)")


def manifest(name):
    return json.loads((REFERENCE / "manifests" / f"{name}.json").read_text())


def state_of(name):
    """Keys and shapes as published; each tensor is one random number, expanded, which takes no memory."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        key: value if isinstance(value, list) else value["shape"]
        for key, value in manifest(name)["state_dict"].items()
    }
    return {
        key: torch.zeros(1, dtype=torch.long).expand(shape)
        if key.endswith("_index")
        else torch.rand((), generator=generator).expand(shape)
        for key, shape in shapes.items()
    }


def on_meta(translated):
    with torch.device("meta"):
        return files.module_of(Weights(Path("x"), translated.tensors, translated.config))


@pytest.mark.parametrize("name", MANIFESTS)
def test_published_models_convert_strictly_and_have_their_parameters(name):
    published, state = manifest(name), state_of(name)
    translated = translate(state)
    assert translated.left_out.keys() == {
        key for key in translated.left_out if "relative_position_index" in key or "target_generator" in key
    }
    total = sum(parameter.numel() for parameter in on_meta(translated).parameters())
    if "counts" in published:
        assert total == published["counts"]["total"] - published["counts"].get("teacher", 0)
    else:
        assert total == published["meta"]["num_parameters"]
    weights = Weights(Path("x"), translated.tensors, translated.config)
    back = write_back(weights, translated.family)
    shapes = {key: value.shape for key, value in state.items() if not key.startswith("target_generator")}
    assert {key: value.shape for key, value in back.items()} == shapes


@pytest.mark.parametrize("name", [name for name in MANIFESTS if manifest(name).get("meta", {}).get("flops")])
def test_published_models_have_their_multiply_adds(name):
    meta = manifest(name)["meta"]
    [call] = [call for call in CALLS if call in meta["flops"]]
    model = on_meta(translate(state_of(name)))
    side = meta["input_size"]
    images = torch.empty(1, 3, side, side, device="meta")
    hidden = torch.zeros(1, (side // 16) ** 2, dtype=torch.bool, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        if "FPN" in call:
            model.model(images)
        else:
            model.predict(images, hidden) if isinstance(model, DistillObjective) else model(images)
    published = meta["flops"][call]["torch_flop_counter_MACs"]
    assert counter.get_total_flops() / 2 == pytest.approx(published, rel=1e-3)


@pytest.mark.parametrize("name", FIXTURES)
def test_a_round_trip_is_bitwise_equal(name):
    _, state = load(name)
    weights = converted(name)
    back = write_back(weights, family_of(name))
    assert back.keys() == state.keys()
    for key, value in state.items():
        assert back[key].dtype == value.dtype
        assert torch.equal(back[key], value), key


def fast_student():
    backbone = HiViTConfig(size="fast_itpn_base", layer_scale=0.1)
    pyramid = PyramidConfig(layers="fast", depth=1, mlp_ratio=8 / 3)
    config = DistillConfig(target_width=768, mask_token="after-stem", fuse="units", auxiliary=False)
    with torch.device("meta"):
        return DistillObjective(ModelConfig(backbone=backbone, pyramid=pyramid), config)


def test_the_fast_student_has_the_parameters_of_its_published_log():
    student = fast_student()
    assert sum(parameter.numel() for parameter in student.parameters()) == 90_235_602
    assert len(student.mask_token) == 2048


def toy_fast_student():
    torch.manual_seed(0)
    backbone = HiViTConfig(
        size="fast_itpn_nano", width=32, depths=(1, 1, 2), num_heads=2, image_size=64, layer_scale=0.1
    )
    pyramid = PyramidConfig(width=24, layers="fast", depth=1, mlp_ratio=8 / 3)
    config = DistillConfig(target_width=20, mask_token="after-stem", fuse="units", auxiliary=False)
    student = DistillObjective(ModelConfig(backbone=backbone, pyramid=pyramid), config)
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return student.eval()


def test_a_fast_pyramid_is_convolutions_and_transposed_convolutions():
    """Written back in the shapes of convolutions, its layers give the same numbers as torch's own."""
    student = toy_fast_student()
    tensors = {name.removeprefix("model."): value for name, value in student.state_dict().items()}
    model = student.model.config
    config = {"model": asdict(model), "objective": asdict(student.config)}
    theirs = write_back(Weights(Path("x"), tensors, config), "official-fast")
    grid = (2, 3)
    for layer, key, convolution, stride, x in [
        (student.model.backbone.merge1, "blocks.1.reduction", F.conv2d, 2, torch.randn(2, 6, 4, 4, 8)),
        (
            student.model.pyramid.split4,
            "split_8to4.reduction",
            F.conv_transpose2d,
            2,
            torch.randn(2, 6, 2, 2, 24),
        ),
        (student.embed.p4, "decoder_embed.2.1", F.conv2d, 4, torch.randn(2, 6, 4, 4, 24)),
    ]:
        normed = to_map(layer.norm(x), grid)
        expected = convolution(normed, theirs[f"{key}.weight"], theirs[f"{key}.bias"], stride=stride)
        torch.testing.assert_close(to_map(layer(x), grid), expected, atol=1e-5, rtol=0)


BLOCK = ("norm2", "mlp.fc1", "mlp.fc2")
LAYERS = {
    "align_dim_16tofpn", "align_dim_16to8", "align_dim_8to4", "split_16to8.norm", "split_16to8.reduction",
    "split_8to4.norm", "split_8to4.reduction", "norm", "lm_head",
    *(f"{block}.0.{layer}" for block in ("block_16to8", "block_8to4") for layer in BLOCK),
    *(f"fpn_modules.{level}.{layer}" for level in range(3) for layer in BLOCK),
    *(f"decoder_embed.{level}.{layer}" for level in range(3) for layer in (0, 1)),
}  # fmt: skip
"""What Fast-iTPN's pre-training has beside the trunk, by the names of a published log."""


def fast_pretraining():
    """A file's state under exactly these names, each with weight and bias."""
    student = toy_fast_student()
    tensors = {name.removeprefix("model."): value for name, value in student.state_dict().items()}
    config = {"model": asdict(student.model.config), "objective": asdict(student.config)}
    state = write_back(Weights(Path("x"), tensors, config), "official-fast")
    beside = {key for key in state if not key.startswith(("patch_embed.", "pos_embed", "blocks."))}
    assert beside == {f"{layer}.{kind}" for layer in LAYERS for kind in ("weight", "bias")} | {"mask_token"}
    return state


def test_a_file_of_fast_itpns_pre_training_goes_there_and_back(tmp_path):
    state = fast_pretraining()
    torch.save({"model": state, "epoch": 1}, tmp_path / "fast.pth")
    ours, back = tmp_path / "ours.safetensors", tmp_path / "back.safetensors"
    assert cli.main(["convert", str(tmp_path / "fast.pth"), str(ours), "--num-heads", "2"]) == 0
    assert files.read(ours).parts == {"backbone", "pyramid", "embed", "mask_token", "head"}
    assert files.read(ours).source["left_out"] == {"epoch": "training state"}
    assert cli.main(["convert", str(ours), str(back), "--to", "official-fast"]) == 0
    found = load_file(back)
    assert found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state)


def test_a_classifier_among_the_names_of_its_pre_training():
    """What is not asked for is left out, and either can be asked for."""
    student = fast_pretraining()
    head = {"fc_norm.weight": torch.ones(32), "fc_norm.bias": torch.ones(32)}
    head |= {"head.weight": torch.ones(3, 32), "head.bias": torch.ones(3)}
    both = student | head
    with pytest.raises(
        UserError, match=r"no place for fc_norm\.weight, fc_norm\.bias, head\.weight, head\.bias"
    ):
        translate(both, given=Given(num_heads=2))
    classifier = translate(without(both, "lm_head.weight", "lm_head.bias"), given=Given(num_heads=2))
    assert classifier.kind == "mean-norm" and "norm.weight" in classifier.left_out
    assert {name.split(".")[0] for name in classifier.tensors} == {"backbone", "norm", "head"}
    assert translate(without(both, *head), given=Given(num_heads=2)).kind == "distill"


def test_a_fast_student_goes_there_and_back():
    student = toy_fast_student()
    tensors = {name.removeprefix("model."): value for name, value in student.state_dict().items()}
    config = {"model": asdict(student.model.config), "objective": asdict(student.config)}
    theirs = write_back(Weights(Path("x"), tensors, config), "official-fast")
    assert theirs["split_16to8.reduction.weight"].shape == (32, 24, 2, 2)
    again = translate(theirs, given=Given(num_heads=2))
    assert (again.family, again.kind) == ("official-fast", "distill")
    assert again.tensors.keys() == tensors.keys()
    assert all(torch.equal(again.tensors[name], tensors[name]) for name in tensors)
    assert again.config["objective"] == config["objective"]
    assert (
        again.config["model"]["pyramid"]["mlp_ratio"] == 64 / 24
    )  # 8 / 3 truncated, which is all that shows


def test_an_mae_decoder_loses_and_regains_its_class_position():
    """mmpretrain's MAE-HiViT has no pyramid, one embedding, and a row for a class token that it never has."""
    _, state = load("mm_pixel_p16")
    state = {
        key: value
        for key, value in state.items()
        if not any(part in key for part in ("align", "split", "block_", "fpn", "decoder_embed"))
    }
    state |= {"neck.decoder_embed.weight": torch.rand(16, 16), "neck.decoder_embed.bias": torch.rand(16)}
    positions = torch.cat([torch.zeros(1, 1, 16), state["neck.decoder_pos_embed"]], 1)
    state["neck.decoder_pos_embed"] = positions
    translated = translate(state, given=Given(num_heads=2, decoder_heads=2))
    assert translated.config["model"]["pyramid"] is None
    assert translated.tensors["decoder.position"].shape == (16, 16)
    back = write_back(Weights(Path("x"), translated.tensors, translated.config), "mmpretrain-itpn")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def without(state, *keys):
    return {key: value for key, value in state.items() if key not in keys}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: {}, "none of the known families"),
        (lambda state: {"layer1.0.conv1.weight": torch.zeros(2)}, "has layer1.0.conv1.weight"),
        (lambda state: state | {"mystery.weight": torch.zeros(2)}, "no place for mystery.weight"),
        (
            lambda state: state | {f"x.{i}.{i}.weight": torch.zeros(1) for i in range(10_000)},
            r"no place for x\.\*\.\*\.weight \(10000\)",
        ),
        (lambda state: without(state, "absolute_pos_embed"), "nothing that becomes backbone.position"),
        (lambda state: without(state, "blocks.0.mlp.fc2.bias"), r"stage1.0.mlp.fc2.bias is missing there"),
        (
            lambda state: state | {"blocks.4.attn.proj.weight": torch.zeros(32, 31)},
            r"stage3.0.attn.proj.weight is \[32, 31\] there, \[32, 32\] here",
        ),
        (
            lambda state: state | {"absolute_pos_embed": torch.zeros(1, 15, 32)},
            "15 rows, which is no square grid",
        ),
        (lambda state: state | {"absolute_pos_embed": torch.zeros(())}, "nothing that becomes"),
        (
            lambda state: state | {"patch_embed.proj.weight": torch.zeros(8, 3, 4, 5)},
            "no square convolution",
        ),
        (lambda state: state | {"blocks.0.mlp.fc1.weight": torch.zeros(0, 8)}, r"the shape \[0, 8\]"),
        (
            lambda state: {f"blocks.{key}": value for key, value in state.items()},
            "none of the known families",
        ),
    ],
)
def test_what_makes_no_whole_model_is_refused(change, said):
    _, state = load("pixel_finetune_rpe")
    with pytest.raises(UserError, match=said) as caught:
        translate(change(dict(state)))
    assert len(str(caught.value)) < 1000


def test_heads_that_no_shape_tells_must_be_given():
    _, state = load("pixel_finetune_norpe")
    with pytest.raises(UserError, match="--num-heads"):
        translate(state)
    assert translate(state, given=Given(num_heads=2)).config["model"]["backbone"]["num_heads"] == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_writing_back_for_the_wrong_family_says_so(family):
    weights = converted("fast_finetune_meanpool")
    if FAMILIES[family].style == "fast":
        assert "pos_embed" in write_back(weights, family)
    else:
        with pytest.raises(UserError, match="has fast layers"):
            write_back(weights, family)


def test_summaries_stay_short():
    assert summary(["a.1.b", "a.2.b", "c"]) == "a.*.b (2), c"
    assert summary(f"key{chr(97 + i)}" for i in range(20)).endswith(" and 15 more")
