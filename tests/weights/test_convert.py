"""`itpn convert` and `itpn info FILE` as a user meets them."""

import argparse
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from itpn import cli
from itpn.nn.hivit import HiViTConfig
from itpn.nn.pyramid import Model, ModelConfig
from itpn.weights import files
from itpn.weights.files import Weights
from itpn.weights.translate import write_back
from tests.weights.released import family_of, load, released

HEADS = ["--num-heads", "2", "--decoder-heads", "2"]


def state_of(name):
    return dict(load(name)[1])


def convert(*arguments):
    return cli.main(["convert", *map(str, arguments)])


def fails(capsys, *arguments):
    """The one line that a failing command prints."""
    assert convert(*arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and len(said) < 1200
    return said


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "pixel.pth"
    content = {"model": state_of("pixel_pretrain_p16"), "epoch": 7, "args": argparse.Namespace(lr=1e-3)}
    torch.save(content, path)
    return path


def test_it_says_what_it_found_and_left_out(source, tmp_path, capsys):
    assert convert(source, tmp_path / "out.safetensors", *HEADS) == 0
    said = capsys.readouterr().out
    for part in (
        "the authors' iTPN, pixels (official-pixel)",
        "unwrapped: model",
        "left out: epoch: training state",
        "objects of argparse.Namespace: not needed, and not imported",
        "32 wide, blocks 1 + 1 + 1, 2 heads",
        "wrote ",
    ):
        assert part in said
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert set(file.metadata()) == {"format", "config", "source"}


@pytest.mark.parametrize("written", [False, True])
def test_info_tells_the_same_of_the_source_and_of_what_was_written(source, tmp_path, capsys, written):
    source = tmp_path / "clip.pth"  # whose bias tables tell the number of heads
    torch.save(state_of("clip_pretrain"), source)
    assert convert(source, tmp_path / "out.safetensors") == 0
    capsys.readouterr()
    assert cli.main(["info", str(tmp_path / "out.safetensors" if written else source)]) == 0
    said = capsys.readouterr().out
    sha256 = files.read(tmp_path / "out.safetensors").source["sha256"]
    for part in ("official-clip", sha256, "34,663", "16 wide, blocks 1 + 1 + 5", "multiply-adds (434,688)"):
        assert part in said
    assert "left out: relative_position_index: computed from the grid" in said


def test_info_of_the_bundled_weights(capsys):
    assert cli.main(["info", str(files.NANO)]) == 0
    said = capsys.readouterr().out
    assert "backbone itpn_nano: 192 wide" in said and "3,870,232" in said


def test_there_and_back_by_files(source, tmp_path):
    assert convert(source, tmp_path / "ours.safetensors", *HEADS) == 0
    assert (
        convert(tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors", "--to", "official-pixel") == 0
    )
    state, back = state_of("pixel_pretrain_p16"), load_file(tmp_path / "theirs.safetensors")
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)
    assert convert(tmp_path / "theirs.safetensors", tmp_path / "again.safetensors", *HEADS) == 0
    first, second = files.read(tmp_path / "ours.safetensors"), files.read(tmp_path / "again.safetensors")
    assert first.config == second.config


def test_averaged_weights_are_taken_when_asked_for(tmp_path):
    plain = state_of("clip_finetune")
    averaged = {key: value + 1 if value.is_floating_point() else value for key, value in plain.items()}
    torch.save({"model": plain, "model_ema": averaged}, tmp_path / "both.pth")
    assert convert(tmp_path / "both.pth", tmp_path / "plain.safetensors") == 0
    assert convert(tmp_path / "both.pth", tmp_path / "averaged.safetensors", "--ema") == 0
    first, second = (files.read(tmp_path / f"{name}.safetensors").tensors for name in ("plain", "averaged"))
    assert torch.equal(second["head.bias"], first["head.bias"] + 1)


def test_ranks_and_encoders_in_front_of_the_names(tmp_path):
    state = {f"module.encoder.{key}": value for key, value in state_of("clip_finetune").items()}
    torch.save({"module": state}, tmp_path / "wrapped.pth")
    assert convert(tmp_path / "wrapped.pth", tmp_path / "out.safetensors") == 0
    assert "classifier" in files.read(tmp_path / "out.safetensors").config


def test_values_that_are_not_finite_are_reported(tmp_path, capsys):
    state = state_of("clip_finetune")
    state["head.bias"] = state["head.bias"].clone().fill_(float("nan"))
    torch.save(state, tmp_path / "nan.pth")
    assert convert(tmp_path / "nan.pth", tmp_path / "out.safetensors") == 0
    assert "warning: head.bias has 10 values that are NaN or infinite" in capsys.readouterr().out


def test_what_is_ours_already_says_so(tmp_path, capsys):
    assert "is already an itpn file" in fails(capsys, files.NANO, tmp_path / "out.safetensors")


def test_mistakes_are_told_in_one_line(source, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    assert "must end in .safetensors" in fails(capsys, source, tmp_path / "out.pth")
    assert "there is no folder" in fails(capsys, source, tmp_path / "nowhere" / "out.safetensors")
    assert "the source itself" in fails(capsys, out, out)
    assert "no such file" in fails(capsys, tmp_path / "nothing.pth", out)
    assert "there is no family 'pixels'" in fails(capsys, source, out, "--family", "pixels")
    assert "there is no family 'pixels'" in fails(capsys, files.NANO, out, "--to", "pixels")
    assert "--num-heads" in fails(capsys, source, out)
    assert "does not divide by 4 and by 3 heads" in fails(capsys, source, out, "--num-heads", "3")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    assert "none of the known families" in fails(capsys, tmp_path / "other.safetensors", out)
    assert not out.exists()


def test_an_older_output_is_replaced_only_by_a_whole_one(source, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    assert convert(source, out, *HEADS) == 0
    before = out.read_bytes()
    fails(capsys, tmp_path / "nothing.pth", out)
    assert out.read_bytes() == before
    assert convert(source, out, *HEADS) == 0
    assert files.read(out).parts >= {"backbone", "pyramid", "decoder"}


def test_a_file_of_the_users_is_kept(source, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    out.write_text("kept")
    assert f"{out} is not replaced" in fails(capsys, source, out, *HEADS)
    assert out.read_text() == "kept"


MEASURE = """
import resource, sys
from itpn import cli
import itpn.commands.convert
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert cli.main(["convert", sys.argv[1], sys.argv[2]]) == 0
print("grown", 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


def test_memory_stays_within_two_and_a_half_times_the_file(tmp_path):
    """Plus 30 MB for what Python and torch load or compile on the way, whatever the file."""
    config = ModelConfig(backbone=HiViTConfig(size="fast_itpn_tiny", layer_scale=0.1), pyramid=None)
    weights = Weights(tmp_path, Model(config).state_dict(), {"model": asdict(config)})
    torch.save(write_back(weights, "official-fast"), tmp_path / "source.pth")
    size = (tmp_path / "source.pth").stat().st_size
    assert size > 80e6
    command = [sys.executable, "-c", MEASURE, tmp_path / "source.pth", tmp_path / "out.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert int(done.stdout.split("grown ")[1]) < 2.5 * size + 30e6


@pytest.mark.parametrize("name", ["clip_finetune", "mm_hivit_classifier", "mm_clip_rpe", "seg_outs4"])
def test_files_with_bias_tables_are_written_back_with_their_buffers(tmp_path, name):
    family = family_of(name)
    torch.save(released(name, state_of(name)), tmp_path / "source.pth")
    assert convert(tmp_path / "source.pth", tmp_path / "ours.safetensors") == 0
    assert convert(tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors", "--to", family) == 0
    state, back = state_of(name), load_file(tmp_path / "theirs.safetensors")
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)


def test_a_trackers_backbone(tmp_path):
    """Their names after `backbone.`, beside a head of its own."""
    for name in ("clip_finetune", "fast_finetune_meanpool"):
        state = {f"backbone.{key}": value for key, value in state_of(name).items() if "head" not in key}
        torch.save({"net": state | {"box_head.conv.weight": torch.zeros(2)}}, tmp_path / "tracker.pth")
        arguments = ["--leave-out", "fc_norm.*", *HEADS[:2]]
        assert convert(tmp_path / "tracker.pth", tmp_path / "out.safetensors", *arguments) == 0
        weights = files.read(tmp_path / "out.safetensors")
        assert weights.parts == {"backbone"}
        assert weights.source["left_out"]["box_head.* (1 tensors)"] == "no part of the backbone"


def test_hivits_own_mae_gives_its_backbone(tmp_path, capsys):
    """Its decoder reads the three stages side by side, 7 C channels, and is no model here."""
    state = {key: value for key, value in state_of("clip_finetune").items() if "fc_norm" not in key}
    state = {key: value for key, value in state.items() if not key.startswith("head.")}
    state |= {"norm.weight": torch.ones(7 * 32), "norm.bias": torch.ones(7 * 32)}
    state |= {"decoder_embed.weight": torch.zeros(16, 7 * 32), "decoder_embed.bias": torch.zeros(16)}
    state |= {"mask_token": torch.zeros(1, 1, 16), "decoder_pred.weight": torch.zeros(768, 16)}
    torch.save({"model": state}, tmp_path / "mae.pth")
    assert convert(tmp_path / "mae.pth", tmp_path / "out.safetensors") == 0
    assert files.read(tmp_path / "out.safetensors").parts == {"backbone"}
    assert "HiViT's own MAE decoder" in capsys.readouterr().out


def test_what_would_be_ignored_or_lost_is_refused(source, tmp_path, capsys):
    ours, out = tmp_path / "ours.safetensors", tmp_path / "out.safetensors"
    assert convert(source, ours, *HEADS) == 0
    assert "leave out --num-heads" in fails(capsys, ours, out, "--to", "official-pixel", "--num-heads", "2")
    assert "no key matches" in fails(capsys, source, out, "--leave-out", "nosuch.*")
    assert "hold no pixel decoder" in fails(capsys, ours, out, "--to", "official-detection")
    (tmp_path / "folder.safetensors").mkdir()
    assert "cannot write" in fails(capsys, source, tmp_path / "folder.safetensors", *HEADS)
    state = state_of("fast_finetune_meanpool")
    torch.save(state | {"absolute_pos_embed": state["pos_embed"]}, tmp_path / "twice.pth")
    said = fails(capsys, tmp_path / "twice.pth", out, "--num-heads", "2")
    assert "both become backbone.position" in said
    assert not out.exists()


def test_metadata_that_is_no_config_is_one_line(tmp_path, capsys):
    for text in ("{", "[]", '"x"', "[" * 100_000):
        save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors", {"config": text})
        assert cli.main(["info", str(tmp_path / "x.safetensors")]) == 2
        assert capsys.readouterr().err.count("\n") == 1
