import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from itpn.engine import checkpoint, device_batch
from itpn.engine.distributed import World, whole
from itpn.engine.replay import read
from itpn.engine.run import Run
from itpn.errors import UserError
from itpn.nn.pyramid import Model, ModelConfig
from itpn.weights import files
from tests.engine.sharded import STOP, objective, pretrain
from tests.engine.test_loop import metrics, same
from tests.launch import torchrun

ONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("sharded")
    pixels = np.random.default_rng(0)
    for split, counts in (("train", (5, 4)), ("val", (3, 2))):  # odd numbers: a rank has one image more
        for name, count in zip(("left", "right"), counts, strict=True):
            (directory / "images" / split / name).mkdir(parents=True)
            for i in range(count):
                picture = pixels.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(picture).save(directory / "images" / split / name / f"{i}.png")
    torchrun("tests.engine.sharded", directory, directory=directory)
    return directory


def column(directory: Path, name: str = "loss") -> list[float]:
    return [line[name] for line in metrics(directory) if name in line]


def tensors(directory: Path, name: str) -> dict[str, torch.Tensor]:
    last = (directory / "checkpoints/last").read_text()
    return load_file(directory / "checkpoints" / last / name)


@pytest.mark.parametrize("name", ["loss", "pixel", "feature", "score"])
def test_the_same_as_ddp(runs: Path, name: str) -> None:
    assert len(column(runs / "fsdp")) == 12
    assert column(runs / "fsdp", name) == pytest.approx(column(runs / "ddp", name), abs=1e-5)


def test_the_same_gradient_as_ddp(runs: Path) -> None:
    expected = column(runs / "ddp", "grad_norm")
    assert column(runs / "fsdp", "grad_norm") == pytest.approx(expected, rel=1e-3)
    assert min(expected) > 0.04  # so it was clipped


def test_each_rank_holds_half(runs: Path) -> None:
    shares = [json.loads((runs / f"share{rank}.json").read_text()) for rank in (0, 1)]
    assert sum(shares) == pytest.approx(1)
    assert shares == pytest.approx([0.5, 0.5], abs=0.01)


@pytest.mark.parametrize("name", [checkpoint.MODEL, checkpoint.OPTIMIZER])
def test_one_format_of_checkpoints(runs: Path, name: str) -> None:
    sharded, replicated = (tensors(runs / strategy, name) for strategy in ("fsdp", "ddp"))
    described = [{key: (t.shape, t.dtype) for key, t in held.items()} for held in (sharded, replicated)]
    assert described[0] == described[1]
    if name == checkpoint.MODEL:
        own = {key: (t.shape, t.dtype) for key, t in objective().state_dict().items()}
        assert described[0] == own
        assert all(torch.allclose(sharded[key], replicated[key], atol=1e-4) for key in own)
        teacher, student = (
            "features.teacher.stage1.0.mlp.fc1.weight",
            "model.backbone.stage1.0.mlp.fc1.weight",
        )
        assert not sharded[teacher].equal(sharded[student])


def test_resuming_is_exact(runs: Path) -> None:
    assert same(runs / "parts", runs / "fsdp")


@pytest.mark.parametrize("name", ["from_ddp", "from_fsdp"])
def test_a_checkpoint_of_the_other_strategy(runs: Path, name: str) -> None:
    assert column(runs / name) == pytest.approx(column(runs / "ddp"), abs=1e-5)


def test_saved_on_two_and_loaded_on_one(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "to_one", tmp_path / "run")
    before = tensors(tmp_path / "run", checkpoint.MODEL)
    model = objective()
    checkpoint.load_model(tmp_path / f"run/checkpoints/{STOP:08d}", model)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    # World of one: the same strategy is a plain module there.
    pretrain(tmp_path / "run", ONE, strategy="fsdp")
    assert column(tmp_path / "run") == pytest.approx(column(runs / "fsdp"), abs=1e-5)


def test_fp16_with_its_scaler(runs: Path) -> None:
    sharded, replicated = (column(runs / f"fp16_{strategy}") for strategy in ("fsdp", "ddp"))
    assert sharded == pytest.approx(replicated, rel=2e-3)
    assert sharded != column(runs / "fsdp")[:3]


def test_recomputed_blocks(runs: Path) -> None:
    assert column(runs / "recomputing") == pytest.approx(column(runs / "fsdp")[:3], abs=1e-6)


def test_a_bad_step_is_kept_whole(runs: Path) -> None:
    assert read(runs / "nan/replay").step == 2
    kept = load_file(runs / "nan/replay/model.safetensors")
    assert {name: t.shape for name, t in kept.items()} == {
        name: t.shape for name, t in objective().state_dict().items()
    }
    assert column(runs / "nan")[:2] == column(runs / "fsdp")[:2]


def test_the_command_line_from_start_to_end(runs: Path) -> None:
    run = runs / "run"
    assert json.loads((run / "config.json").read_text())["loop"]["strategy"] == "fsdp"
    assert len(column(run)) == 3
    assert len(column(run, "knn_top1")) == 4
    assert (run / "pictures/reconstruction-0003.png").is_file()
    weights = files.read(run / "pretrained.safetensors")
    model = Model(weights.part("model", ModelConfig))
    model.load_state_dict(weights.tensors)
    with safe_open(run / "checkpoints/00000003/model.safetensors", framework="pt") as file:
        assert all(file.get_tensor(f"model.{name}").equal(t) for name, t in weights.tensors.items())


def test_a_plain_module_is_whole_already() -> None:
    model = torch.nn.Linear(2, 2)
    with whole(model):
        assert model(torch.zeros(1, 2)).shape == (1, 2)


def test_what_fits_is_not_looked_for_with_shards(tmp_path: Path, monkeypatch) -> None:
    class Sharded(torch.nn.Module):
        pass

    monkeypatch.setattr(device_batch, "FSDPModule", Sharded)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    run = Run(tmp_path, {}, World(0, 1, torch.device("cuda")))
    settings = {"share": 8, "precision": torch.float32}
    with pytest.raises(UserError, match="--strategy fsdp needs --device-batch"):
        device_batch.settle(Sharded(), lambda size: {}, run, given=None, **settings)
    assert device_batch.settle(Sharded(), lambda size: {}, run, given=4, **settings) == 4
    assert device_batch.settle(Sharded(), lambda size: {}, run, given=None, **settings) == 4
