"""Trackers' checkpoints, and others with additions of their own: the backbone comes out with its numbers."""

import re
import shlex
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file

import itpn
from itpn import cli
from itpn.nn.hivit import HiViT, HiViTConfig
from itpn.nn.pyramid import ModelConfig
from itpn.weights import files
from itpn.weights.files import Weights
from itpn.weights.translate import write_back
from tests.weights.released import load

WIDTH = 64


def toy_backbone(**more):
    torch.manual_seed(0)
    config = HiViTConfig(
        size="fast_itpn_nano", width=WIDTH, depths=(1, 1, 2), num_heads=1, layer_scale=0.1, **more
    )
    backbone = HiViT(config).eval()
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return backbone


@pytest.fixture(scope="module")
def backbone():
    return toy_backbone()


def theirs(backbone):
    """The state of a backbone under the names of Fast-iTPN's authors."""
    tensors = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    config = {"model": asdict(ModelConfig(backbone=backbone.config, pyramid=None))}
    return write_back(Weights(files.NOWHERE, tensors, config), "official-fast")


@pytest.fixture
def state(backbone):
    return theirs(backbone)


def tracker(state, prefix="encoder.body.", entry="net"):
    """A file as a tracker's training saves it, with heads of its own."""
    heads = {"decoder.conv1_ctr.0.weight": torch.randn(4, 4, 3, 3), "task_decoder.weight": torch.randn(4, 4)}
    net = {f"{prefix}{key}": value for key, value in state.items()} | heads
    if entry is None:
        return net
    return {entry: net, "epoch": 180, "optimizer": {}, "stats": {}, "net_type": "SUTRACK"}


def table(state, *sides, first=0):
    """Positions of several square grids in one table, the first of them the state's own."""
    own = state["pos_embed"]
    others = [torch.randn(1, side * side, WIDTH) for side in sides]
    return {"pos_embed": torch.cat([torch.randn(1, first, WIDTH), own, *others], 1)}


def six_channels(state):
    half = state["patch_embed.proj.weight"] / 2
    return {"patch_embed.proj.weight": torch.cat([half, half], 1)}


def tokens(*names):
    return {name: torch.randn(1, 1, WIDTH) for name in names}


def ones(*names):
    return {name: torch.ones(WIDTH) for name in names}


TYPES = ("template_background_token", "template_foreground_token", "search_token")


def convert(tmp_path, content, *options):
    torch.save(content, tmp_path / "tracker.pth.tar")
    out = tmp_path / "out.safetensors"
    assert cli.main(["convert", str(tmp_path / "tracker.pth.tar"), str(out), *map(str, options)]) == 0
    return files.read(out)


def refusal(tmp_path, capsys, content, *options):
    torch.save(content, tmp_path / "tracker.pth.tar")
    source, out = str(tmp_path / "tracker.pth.tar"), tmp_path / "out.safetensors"
    assert cli.main(["convert", source, str(out), *map(str, options)]) == 2
    assert not out.exists()
    return capsys.readouterr().err


def has_numbers_of(weights, backbone, images=None):
    """What a converted file computes is what the tracker's trunk does without the tracker's additions."""
    side = backbone.config.image_size
    images = torch.randn(1, 3, side, side) if images is None else images
    found = itpn.load(weights.path, features="stages")
    seen = images if found.config.backbone.in_channels == 3 else torch.cat([images, images], 1)
    with torch.no_grad():
        for ours, expected in zip(found.backbone(seen), backbone(images), strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


LAYOUTS = {
    "plain": lambda state: {},
    "positions of two grids": lambda state: table(state, 7),
    "a stem of six channels": six_channels,
    "type tokens": lambda state: tokens(*TYPES),
    "all of these": lambda state: table(state, 7) | six_channels(state) | tokens(*TYPES),
    "a class token": lambda state: tokens("cls_token"),
    "a class token with a position": lambda state: table(state, first=1) | tokens("cls_token"),
    "a class token and two grids": lambda state: table(state, 7, first=1) | tokens("cls_token"),
    "a norm that starts anew": lambda state: ones("fc_norm.weight", "fc_norm.bias"),
    "a norm of all tokens": lambda state: ones("norm.weight", "norm.bias"),
    "tables of their own": lambda state: {
        "pos_embed_x": state["pos_embed"],
        **dict.fromkeys(["pos_embed", "pos_embed_z"], torch.randn(1, 49, WIDTH)),
    },
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_backbone_has_the_numbers_of_the_trunk_on_the_search_image(tmp_path, backbone, state, layout):
    weights = convert(tmp_path, tracker(state | layout(state)))
    assert weights.parts == {"backbone"}
    has_numbers_of(weights, backbone)


@pytest.mark.parametrize(
    ("entry", "prefix"),
    [
        ("net", "backbone."), ("model", "backbone.body."), ("module", "encoder."), (None, "encoder.body."),
        ("state_dict", "net._orig_mod.body."), ("network", "module.encoder.body."), ("net", "body.0."),
    ],
)  # fmt: skip
def test_entries_and_prefixes_of_trackers(tmp_path, backbone, state, entry, prefix):
    has_numbers_of(convert(tmp_path, tracker(state | table(state, 7), prefix, entry)), backbone)


@pytest.mark.parametrize(("search", "template"), [(16, 8), (24, 12), (4, 2), (18, 8), (20, 10)])
def test_grids_of_two_images_are_told_by_the_number_of_rows(tmp_path, search, template):
    backbone = toy_backbone(image_size=16 * search)
    state = theirs(backbone)
    weights = convert(tmp_path, tracker(state | table(state, template)))
    assert torch.equal(weights.tensors["backbone.position"], state["pos_embed"][0])
    said = weights.source["left_out"][f"pos_embed[{search**2}:{search**2 + template**2}]"]
    assert f"--position-rows {template**2} {search**2 + template**2}" in said


def test_tables_for_each_image_without_one_for_all(tmp_path, backbone, state):
    """Of a tracker on Fast-iTPN, and a prefix without a dot."""
    split = {key: value for key, value in state.items() if key != "pos_embed"}
    split |= {"pos_embed_x": state["pos_embed"], "pos_embed_z": torch.randn(1, 49, WIDTH)}
    weights = convert(tmp_path, tracker(split, prefix="net_"), "--prefix", "net_")
    has_numbers_of(weights, backbone)


def test_a_template_that_comes_first_is_skipped_as_the_message_says(tmp_path, backbone, state):
    swapped = state | {"pos_embed": torch.cat([torch.randn(1, 49, WIDTH), state["pos_embed"]], 1)}
    said = convert(tmp_path, tracker(swapped)).source["left_out"]["pos_embed[196:245]"]
    rows = re.search(r"--position-rows (\d+) (\d+)", said).groups()
    has_numbers_of(convert(tmp_path, tracker(swapped), "--position-rows", *rows), backbone)


@pytest.mark.parametrize(("rows", "choices"), [(221, [(0, 196), (0, 121)]), (197, [(1, 197)]), (392, [])])
def test_rows_that_tell_no_grid_are_named_by_an_option(tmp_path, capsys, state, rows, choices):
    content = tracker(state | {"pos_embed": torch.randn(1, rows, WIDTH)})
    said = refusal(tmp_path, capsys, content)
    assert f"pos_embed has {rows} rows, which is no square grid" in said
    found = [tuple(map(int, pair)) for pair in re.findall(r"(?:--position-rows|or) (\d+) (\d+)", said)]
    assert found == choices
    for first, last in found or [(196, 392)]:
        weights = convert(tmp_path, content, "--position-rows", first, last)
        expected = content["net"]["encoder.body.pos_embed"][0, first:last]
        assert torch.equal(weights.tensors["backbone.position"], expected)


def test_rows_that_are_no_grid_are_refused(tmp_path, capsys, state):
    for first, last in ((0, 195), (100, 300), (9, 9), (-1, 195)):
        said = refusal(tmp_path, capsys, tracker(state), "--position-rows", first, last)
        assert "of the 196 rows of pos_embed they must be a square number" in said


def test_a_stem_of_six_channels_stays_or_becomes_one_for_rgb(tmp_path, capsys, backbone, state):
    both = state | {"patch_embed.proj.weight": torch.randn(WIDTH // 4, 6, 4, 4)}
    content, weight = tracker(both), both["patch_embed.proj.weight"]
    images = torch.randn(1, 3, 64, 64)
    weights = convert(tmp_path, content)
    assert "its images have 6 channels; for RGB images alone give --stem sum" in capsys.readouterr().out
    six = itpn.load(weights.path).backbone
    with pytest.raises(itpn.errors.UserError, match="image of 3 channels: the model takes 6"):
        six(images)
    for how, kept, second in [
        ("sum", weight[:, :3] + weight[:, 3:], images),
        ("first", weight[:, :3], 0 * images),
    ]:
        narrow = convert(tmp_path, content, "--stem", how)
        assert torch.equal(narrow.tensors["backbone.stem_proj.weight"], kept.permute(0, 2, 3, 1).flatten(1))
        with torch.no_grad():
            expected = six(torch.cat([images, second], 1)).c16
            found = itpn.load(narrow.path).backbone(images).c16
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_stem_that_has_no_threes_to_add_up(tmp_path, capsys, state):
    said = refusal(tmp_path, capsys, tracker(state), "--stem", "sum")
    assert "--stem sum: the stem takes 3 channels, no more than three" in said
    four = tracker(state | {"patch_embed.proj.weight": torch.randn(WIDTH // 4, 4, 4, 4)})
    said = refusal(tmp_path, capsys, four, "--stem", "sum")
    assert "4 channels are no multiple of three; --stem first keeps the first three" in said
    assert convert(tmp_path, four, "--stem", "first").config["model"]["backbone"]["in_channels"] == 3


def test_what_was_left_out_is_named(tmp_path, capsys, state):
    convert(tmp_path, tracker(state | tokens(*TYPES)))
    said = capsys.readouterr().out
    for name in TYPES:
        assert f"left out: {name}: a tracker's token; the backbone is read without it" in said


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_16_bits(tmp_path, state, dtype):
    half = {key: value.to(dtype) for key, value in (state | table(state, 7) | six_channels(state)).items()}
    weights = convert(tmp_path, tracker(half), "--stem", "sum")
    assert {tensor.dtype for tensor in weights.tensors.values()} == {dtype}
    rounded = toy_backbone()
    rounded.load_state_dict({key: value.to(dtype).float() for key, value in rounded.state_dict().items()})
    has_numbers_of(weights, rounded)


def test_a_trunk_that_keeps_the_first_blocks_alone(tmp_path, backbone, state):
    cut = {key: value for key, value in state.items() if not key.startswith("blocks.5.")}
    weights = convert(tmp_path, tracker(cut))
    assert weights.config["model"]["backbone"]["depths"] == [1, 1, 1]
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        _, _, before = backbone.local(backbone.stem(images))
        _, [expected] = backbone.context(backbone.embed(before, (14, 14)), taps=[0])
        torch.testing.assert_close(itpn.load(weights.path).backbone(images).c16, expected)


def test_modules_inside_the_blocks_are_left_out_as_the_message_says(tmp_path, capsys, backbone, state):
    names = [f"blocks.{i}.adapter.down.weight" for i in (4, 5)] + ["blocks.5.attn.lora.a.weight", "prompt"]
    content = tracker(state | dict.fromkeys(names, torch.ones(4, WIDTH)))
    said = refusal(tmp_path, capsys, content)
    named = re.search(r"no place for (.*?); to ignore them, give --leave-out", said)[1]
    patterns = re.sub(r" \(\d+\)", "", named).split(", ")
    assert len(patterns) == 3
    options = [option for pattern in patterns for option in ("--leave-out", pattern)]
    has_numbers_of(convert(tmp_path, content, *options), backbone)
    shorter = ["--leave-out", "*adapter*", "encoder.body.prompt", "--leave-out", "*.lora.*"]
    has_numbers_of(convert(tmp_path, content, *shorter), backbone)


def test_two_models_of_one_file_are_converted_each_as_the_message_says(tmp_path, capsys, backbone, state):
    other = {key: value + 1 for key, value in state.items()}
    for content in (
        {"student": state, "teacher": other},
        tracker(state, "student.body.")["net"] | tracker(other, "teacher.body.")["net"],
    ):
        said = refusal(tmp_path, capsys, content)
        option, value = re.search(r"--(entry|prefix) (\S+)", said).groups()
        assert value.startswith("student")
        has_numbers_of(convert(tmp_path, content, f"--{option}", value), backbone)
        assert cli.main(["info", str(tmp_path / "tracker.pth.tar"), f"--{option}", value]) == 0
        capsys.readouterr()
        (tmp_path / "out.safetensors").unlink()


def test_a_trackers_backbone_goes_back_to_its_authors_names(tmp_path, state):
    weights = convert(tmp_path, tracker(state | table(state, 7) | tokens(*TYPES)))
    back = tmp_path / "back.safetensors"
    assert cli.main(["convert", str(weights.path), str(back), "--to", "official-fast"]) == 0
    found = load_file(back)
    assert found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state)


def test_buffers_of_saratr_x_have_a_rule(tmp_path, capsys):
    _, state = load("pixel_finetune_norpe")
    filters = {
        f"sarfeature{i}.weight_{axis}{j}": torch.ones(1, 1, 9, 9)
        for i in (1, 2, 3)
        for axis in "xy"
        for j in (1, 2)
    }
    kept = {key: value for key, value in state.items() if not key.startswith(("head.", "fc_norm."))}
    weights = convert(tmp_path, {"model": kept | filters}, "--num-heads", 2)
    assert weights.parts == {"backbone"}
    out = weights.source["left_out"]
    assert out == dict.fromkeys(filters, "fixed filters, from which SARATR-X computes its targets")
    assert "classifier" in convert(tmp_path, {"model": state | filters}, "--num-heads", 2).config


def test_a_decoder_of_other_targets_is_left_out_as_the_message_says(tmp_path, capsys):
    _, state = load("pixel_pretrain_p16")
    state = state | {"decoder_pred.weight": torch.ones(5, 32), "decoder_pred.bias": torch.ones(5)}
    said = refusal(tmp_path, capsys, {"model": state}, "--num-heads", 2, "--decoder-heads", 2)
    options = shlex.split(said.partition("without its head: ")[2])
    weights = convert(tmp_path, {"model": state}, "--num-heads", 2, *options)
    assert weights.parts == {"backbone", "pyramid"}
