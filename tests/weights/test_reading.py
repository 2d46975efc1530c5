"""Foreign files: weights under plain names, whatever was wrapped around them, and all else accounted for."""

import argparse
import collections
import enum
import hashlib
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from itpn.errors import UserError
from itpn.weights.convert import read_foreign
from itpn.weights.wrappings import MAX_LISTED, Wanted

STATE = {
    "patch_embed.proj.weight": torch.randn(2, 3, 4, 4),
    "absolute_pos_embed": torch.randn(1, 4, 8),
    "blocks.0.mlp.fc1.weight": torch.randn(6, 8),
    "blocks.0.mlp.fc1.bias": torch.randn(6),
}
HEADS = {
    "rpn_head.conv.weight": torch.ones(2),
    "rpn_head.conv.bias": torch.ones(2),
    "roi_head.fc": torch.ones(1),
}


def prefixed(prefix, state=STATE):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def read(tmp_path, content, name="file.pth", *, leave_out=(), wanted=None, **save):
    torch.save(content, tmp_path / name, **save)
    return read_foreign(tmp_path / name, Wanted(**(wanted or {})), leave_out)


def is_state(found, state=STATE):
    return found.tensors.keys() == state.keys() and all(
        torch.equal(found.tensors[k], state[k]) for k in state
    )


class Metric:
    """An object of a class that a reader does not have."""

    def __init__(self, value):
        self.value, self.history = value, [1, 2]


class EasyDict(dict):
    """As trackers use: items, and the same as attributes."""

    def __init__(self, **items):
        super().__init__(**items)
        self.__dict__ = dict(items)


class History(list):
    pass


class Mode(enum.Enum):
    TRAIN = 1


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["a.pth", "a.bin", "a.ckpt", "a", "a.safetensors"])
def test_both_formats_of_torch_under_any_name(tmp_path, name, zipped):
    found = read(tmp_path, STATE, name, _use_new_zipfile_serialization=zipped)
    assert is_state(found)
    assert (found.wrapping, found.left_out, found.placeholders, found.nonfinite) == ((), {}, (), {})
    assert found.sha256 == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
def test_safetensors_under_any_name(tmp_path, name):
    save_file(STATE, tmp_path / name)
    assert is_state(read_foreign(tmp_path / name))


@pytest.mark.parametrize("length", range(60))
def test_safetensors_with_headers_of_any_length(tmp_path, length):
    state = {"a" * (length * 8 + 1): torch.ones(3)}
    save_file(state, tmp_path / "a")
    assert is_state(read_foreign(tmp_path / "a"), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_kinds_of_numbers_stay(tmp_path, dtype):
    found = read(tmp_path, {"a": torch.ones(3, 2).to(dtype)})
    assert found.tensors["a"].dtype == dtype


def test_parameters_views_ties_and_empty_tensors(tmp_path):
    weight = torch.randn(4, 6)
    state = {
        "a": nn.Parameter(weight),
        "b": weight.T,
        "c": weight[1:3, 2:],
        "d": weight,
        "e": torch.ones(0, 3),
    }
    found = read(tmp_path, state)
    assert is_state(found, {name: tensor.detach() for name, tensor in state.items()})
    assert not found.tensors["a"].requires_grad


@pytest.mark.parametrize("entry", ["model", "module", "state_dict", "model_state_dict", "net"])
def test_entries_that_hold_the_weights(tmp_path, entry):
    content = {entry: STATE, "optimizer": {"state": {}}, "lr_scheduler": {}, "epoch": 3, "args": {"lr": 1}}
    found = read(tmp_path, content)
    assert is_state(found)
    assert found.wrapping == (entry,)
    training = dict.fromkeys(["optimizer", "lr_scheduler", "epoch"], "training state")
    assert found.left_out == training | {"args": "settings"}


def test_wrappings_inside_one_another(tmp_path):
    found = read(tmp_path, {"state_dict": {"model": prefixed("module.model.")}})
    assert is_state(found)
    assert found.wrapping == ("state_dict", "model", "module.model.")


@pytest.mark.parametrize("entry", ["model_ema", "state_dict_ema", "ema", "net_ema", "EMA_weights"])
def test_averaged_weights_only_where_asked_for_or_alone(tmp_path, entry):
    plain = {name: tensor + 1 for name, tensor in STATE.items()}
    both = {"model": plain, entry: STATE}
    found = read(tmp_path, both)
    assert is_state(found, plain)
    assert "averaged" in found.left_out[entry]
    found = read(tmp_path, both, wanted={"ema": True})
    assert is_state(found)
    assert found.wrapping == (entry,)
    assert "plain" in found.left_out["model"]
    found = read(tmp_path, {entry: STATE})
    assert is_state(found)
    assert found.wrapping == (entry,)
    with pytest.raises(UserError, match="no averaged weights"):
        read(tmp_path, {"model": plain}, wanted={"ema": True})


def test_what_averaging_counts_is_no_weight(tmp_path):
    found = read(tmp_path, {"ema_state_dict": prefixed("module.") | {"steps": torch.tensor(7)}})
    assert is_state(found)
    assert found.left_out == {"steps": "training state"}


def test_a_prefix_of_some_names_only_stays_where_it_is_no_models(tmp_path):
    state = prefixed("module.", {"conv1.weight": torch.ones(2)}) | {"head.weight": torch.ones(2)}
    assert is_state(read(tmp_path, state), state)


@pytest.mark.parametrize(
    "prefix", ["model.", "net._orig_mod.", "module.", "a.b.0.", "model._orig_mod.module."]
)
def test_a_metric_beside_the_model_is_left_out(tmp_path, prefix):
    metrics = {
        "train_acc.correct": torch.ones(1),
        "train_acc.total": torch.ones(1),
        "loss.weight": torch.ones(2),
    }
    found = read(tmp_path, {"state_dict": prefixed(prefix) | metrics, "epoch": 1})
    assert is_state(found)
    out = dict.fromkeys(["train_acc.* (2 tensors)", "loss.* (1 tensors)"], "no part of the backbone")
    assert found.left_out == out | {"epoch": "training state"}


def test_what_torch_puts_into_names_comes_off_everywhere(tmp_path):
    wrapped = {
        name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module._orig_mod."): value
        for name, value in prefixed("_fsdp_wrapped_module.").items()
    }
    found = read(tmp_path, wrapped)
    assert is_state(found)
    assert found.wrapping == ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
    twice = STATE | prefixed("_orig_mod.", {"absolute_pos_embed": torch.ones(1)})
    assert is_state(read(tmp_path, twice, leave_out=["_orig_mod.*"]))


TWO = {
    "entries": {"student": STATE, "teacher": {k: v + 1 for k, v in STATE.items()}},
    "entries in an entry": {"checkpoint": {"net": STATE, "model": prefixed("encoder."), "epoch": 1}},
    "prefixes": prefixed("student.backbone.") | prefixed("teacher.backbone.") | {"loss.a": torch.ones(1)},
    "prefixes in a prefix": {"state_dict": prefixed("module.a.") | prefixed("module.b._orig_mod.encoder.")},
}


@pytest.mark.parametrize("content", TWO.values(), ids=TWO.keys())
def test_of_two_models_each_is_read_as_the_message_says(tmp_path, content):
    with pytest.raises(UserError, match="holds 2 models; save one alone, or say which with --") as caught:
        read(tmp_path, content)
    options = re.findall(r"--(entry|prefix) (\S+)", str(caught.value))
    assert len(options) == 2
    first, second = (read(tmp_path, content, wanted={name: value}) for name, value in options)
    assert is_state(first) and second.tensors.keys() == STATE.keys()
    assert {"plain weights, not asked for", "no part of the backbone"} & set(first.left_out.values())


def test_a_model_under_an_entry_of_any_name_is_found(tmp_path):
    optimizer = {"state": {"exp_avg": STATE}}
    found = read(
        tmp_path,
        {"run": {"generator": prefixed("a."), "epoch": 1}, "optimizer": optimizer, "model": {"depth": 3}},
    )
    assert is_state(found)
    assert found.wrapping == ("run", "generator", "a.")


def test_an_entry_and_a_prefix_that_are_not_there(tmp_path):
    content = {"net": prefixed("encoder.body.") | {"decoder.a": torch.ones(1)}, "epoch": 3}
    with pytest.raises(UserError, match="--entry nte: there is no nte in 2 entries: net, epoch"):
        read(tmp_path, content, wanted={"entry": "nte"})
    with pytest.raises(
        UserError, match=r"--prefix body: no tensor's name starts so; models start with encoder.body."
    ):
        read(tmp_path, content, wanted={"prefix": "body"})
    assert is_state(read(tmp_path, content, wanted={"entry": "net", "prefix": "encoder.body."}))
    with pytest.raises(UserError, match="holds a value of type int, no weights by name"):
        read(tmp_path, content, wanted={"entry": "epoch"})


def test_averaged_weights_under_a_prefix(tmp_path):
    content = {
        "state_dict": prefixed("model.") | prefixed("ema_model.module.", {k: v + 1 for k, v in STATE.items()})
    }
    assert is_state(read(tmp_path, content))
    averaged = read(tmp_path, content, wanted={"ema": True})
    assert torch.equal(averaged.tensors["absolute_pos_embed"], STATE["absolute_pos_embed"] + 1)
    assert averaged.wrapping == ("state_dict", "ema_model.module.")


def test_leaving_out_by_names_in_the_file_and_by_plain_names(tmp_path):
    content = {"net": prefixed("student.") | prefixed("teacher.")}
    found = read(tmp_path, content, leave_out=["teacher.*", "*.fc1.bias", "absolute_pos_embed"])
    assert found.tensors.keys() == {"patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"}
    assert found.left_out == dict.fromkeys(
        ["teacher.* (4)", "*.fc1.bias (2)", "absolute_pos_embed (1)"], "as asked"
    )
    with pytest.raises(UserError, match=r"--leave-out norm.\*: no key matches"):
        read(tmp_path, content, leave_out=["teacher.*", "norm.*"])


def test_entries_that_hold_one_another_many_times_take_no_time(tmp_path):
    """As entries of entries they would be too many to look at one by one."""
    inside = dict(STATE)
    for _ in range(40):
        inside = {"a": inside, "b": inside}
    with pytest.raises(UserError, match="or say which with --entry a or --entry b"):
        read(tmp_path, inside)


@pytest.mark.parametrize("prefix", ["encoder.", "encoder.body.", "backbone.body."])
def test_the_encoder_alone_is_kept(tmp_path, prefix):
    rest = {"decoder.a": torch.ones(1), "decoder.b": torch.ones(1), "mask_token": torch.ones(1)}
    found = read(tmp_path, {"net": prefixed(prefix) | rest})
    assert is_state(found)
    assert found.wrapping == ("net", prefix)
    assert found.left_out == dict.fromkeys(["decoder.* (2 tensors)", "mask_token"], "no part of the backbone")


@pytest.mark.parametrize("rest", [{"neck.ln1.weight": torch.ones(1)}, {"head.fc.weight": torch.ones(1)}, {}])
def test_files_of_mmpretrain_keep_their_names(tmp_path, rest):
    stem = {"patch_embed.proj.weight": torch.ones(2, 3, 4, 4)}
    state = prefixed("backbone.", {"pos_embed": torch.ones(1, 4, 8)} | stem) | rest
    found = read(tmp_path, {"meta": {}, "state_dict": state})
    assert is_state(found, state)
    assert found.left_out == {"meta": "settings"}


@pytest.mark.parametrize("position", ["absolute_pos_embed", "pos_embed"])
def test_detectors_and_segmentors(tmp_path, position):
    stem = {"patch_embed.proj.weight": torch.ones(2, 3, 4, 4)}
    state = {position: torch.ones(1, 4, 8), "blocks.0.norm2.weight": torch.ones(8)} | stem
    found = read(tmp_path, {"state_dict": prefixed("backbone.", state) | HEADS})
    assert is_state(found, state)
    assert found.wrapping == ("state_dict", "backbone.", "detector heads")
    assert found.left_out.keys() == {"rpn_head.* (2 tensors)", "roi_head.* (1 tensors)"}
    assert all(reason.startswith("detector head:") for reason in found.left_out.values())
    heads = {"decode_head.conv_seg.weight": torch.ones(2), "auxiliary_head.conv.weight": torch.ones(2)}
    assert read(tmp_path, prefixed("backbone.", state) | heads).wrapping == ("backbone.", "segmentor heads")


def test_of_two_detectors_each_is_still_one(tmp_path):
    content = {f"{who}.{name}": value for who in ("student", "teacher") for name, value in
               (prefixed("backbone.") | HEADS).items()}  # fmt: skip
    with pytest.raises(UserError, match=r"--prefix student\.backbone\. or --prefix teacher\.backbone\."):
        read(tmp_path, content)
    for prefix in ("student.", "student.backbone."):
        found = read(tmp_path, content, wanted={"prefix": prefix})
        assert is_state(found) and found.wrapping == ("student.backbone.", "detector heads")


def test_a_prefix_in_front_of_mmpretrains_names(tmp_path):
    state = prefixed(
        "backbone.", {"pos_embed": torch.ones(1, 4, 8), "patch_embed.proj.weight": torch.ones(1)}
    )
    state |= {"neck.ln1.weight": torch.ones(1)}
    for given in (None, "model", "model.backbone"):
        found = read(tmp_path, prefixed("model.", state) | {"a": torch.ones(1)}, wanted={"prefix": given})
        assert is_state(found, state) and found.wrapping == ("model.",)


def test_a_detectors_backbone_alone(tmp_path):
    assert is_state(read(tmp_path, prefixed("backbone.")))


def test_what_is_no_tensor_is_left_out(tmp_path):
    found = read(tmp_path, STATE | {"version": 3, "names": ["a"], 7: torch.ones(1)})
    assert is_state(found)
    assert found.left_out.keys() == {"version", "names", "a value of type int"}
    assert found.left_out["version"] == "a value of type int, no tensor"


def test_what_is_left_out_stays_short(tmp_path):
    many = {f"extra{i}": i for i in range(5000)} | {f"deep.{i}": i for i in range(5000)}
    found = read(tmp_path, STATE | many)
    assert is_state(found)
    assert len(found.left_out) == MAX_LISTED + 1
    assert "4,961 more" in found.left_out


def test_ten_thousand_unknown_tensors_are_read(tmp_path):
    state = {f"unknown{i}.weight": torch.ones(1) for i in range(10_000)}
    assert is_state(read(tmp_path, state), state)


@pytest.mark.parametrize("zipped", [True, False])
def test_objects_of_a_training_run_become_placeholders(tmp_path, zipped):
    content = {
        "model": STATE,
        "args": argparse.Namespace(lr=1.0, path=pathlib.PurePosixPath("/a")),
        "stats": {"loss": Metric(np.float64(3.5)), "curve": np.arange(4.0), "mode": Mode.TRAIN},
        "settings": EasyDict(a=1, b=EasyDict(c=2)),
        "history": History([1, 2, 3]),
        "table": collections.defaultdict(list, {"a": [1]}),
        "kind": Metric,
    }
    allowed = set(torch.serialization.get_safe_globals())
    found = read(tmp_path, content, _use_new_zipfile_serialization=zipped)
    assert is_state(found)
    assert set(torch.serialization.get_safe_globals()) == allowed
    expected = {"argparse.Namespace", "pathlib.PurePosixPath", "collections.defaultdict", "builtins.list"}
    own = {f"{kind.__module__}.{kind.__name__}" for kind in (Metric, EasyDict, History, Mode)}
    assert expected | own <= set(found.placeholders)
    assert any(name.endswith("multiarray.scalar") for name in found.placeholders)
    assert list(found.placeholders) == sorted(found.placeholders)
    assert not any(name.startswith("torch") for name in found.placeholders)
    assert found.left_out.keys() == content.keys() - {"model"}


def test_classes_that_others_allowed_are_not_used_either(tmp_path):
    made = []

    class Loud:
        def __setstate__(self, state):
            made.append(state)

    Loud.__qualname__ = "Metric"
    Loud.__module__ = Metric.__module__
    with torch.serialization.safe_globals([Loud]):
        found = read(tmp_path, {"model": STATE, "metric": Metric(1)})
        assert Loud in torch.serialization.get_safe_globals()
    assert is_state(found)
    assert not made


def test_values_that_are_not_finite_are_counted(tmp_path):
    nan, inf = float("nan"), float("inf")
    state = {
        "a": torch.tensor([[1.0, nan], [inf, -inf]]),
        "b": torch.full((3,), nan, dtype=torch.float16),
        "c": torch.ones(3),
        "d": torch.tensor([1, 2]),
        "e": torch.tensor([1.0, nan, 2.0, 3.0]).view(2, 2).T,
        "f": torch.tensor([1.0, nan]).to(torch.float8_e4m3fn),
    }
    assert read(tmp_path, state).nonfinite == {"a": 3, "b": 3, "e": 1, "f": 1}


PEAK = r"""
import re, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from itpn.weights.convert import read_foreign
def kilobytes(field):
    return int(re.search(field + r":\s+(\d+)", Path("/proc/self/status").read_text())[1])
read_foreign(Path(sys.argv[2]))
before = kilobytes("VmRSS")
found = read_foreign(Path(sys.argv[1]))
save_file({name: tensor.contiguous() for name, tensor in found.tensors.items()}, sys.argv[1] + ".again")
print((kilobytes("VmHWM") - before) * 1024)
"""
FIXED = 24 << 20
"""Temporaries of a chunk (its comparison, magnitude and mask: 10 MB), and libraries' pages first touched."""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of a process since its start")
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_memory_stays_within_the_files_size(tmp_path, kind):
    state = {f"blocks.{i}.weight": torch.randn(1024, 1024) for i in range(16)}
    path, small = tmp_path / "large", tmp_path / "small"
    if kind == "safetensors":
        save_file(state, path)
        save_file(STATE, small)
    else:
        torch.save({"model": state}, path, _use_new_zipfile_serialization=kind == "zip")
        torch.save({"model": STATE}, small, _use_new_zipfile_serialization=kind == "zip")
    command = [sys.executable, "-c", PEAK, str(path), str(small)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    print(kind, int(ran.stdout) / path.stat().st_size)
    assert int(ran.stdout) <= 2.5 * path.stat().st_size + FIXED
