"""A whole distillation at toy size, its teacher in a file: what it leaves behind, and what stops it early."""

import os
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from itpn.data.loader import DataConfig
from itpn.engine.loop import LoopConfig
from itpn.engine.schedule import ScheduleConfig
from itpn.errors import UserError
from itpn.evaluate.knn import KnnConfig
from itpn.nn.pyramid import Model, ModelConfig
from itpn.objectives.distill import DistillConfig
from itpn.objectives.stages import FrozenConfig
from itpn.recipes.pretrain import Pretrain
from itpn.show.curves import read_metrics
from itpn.show.sheet import GAP, MARGIN
from itpn.tasks.pretrain import load_objective, pretrain
from itpn.weights import files
from tests.toys import toy_model, toy_objective


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes, one of them red."""
    root, pixels = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for name, red in (("grey", 1.0), ("red", 0.2)):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                picture = pixels.integers(0, 256, (80, 70, 3)) * np.array([1.0, red, red])
                Image.fromarray(picture.astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random ones of timm's smallest vision transformer, 64 wide and made for 10 x 10 tokens."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "test_vit.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), path)
    return path


def recipe(root, run_dir, weights, teacher="test_vit", **choices):
    few = {"target": "tokens", "target_width": 64, "num_hidden": 6, "min_block": 2}
    return Pretrain(
        name="toy",
        model=toy_model(layer_scale=0.1, relative_position_bias=True, drop_path=0.2),
        objective=DistillConfig(teacher=teacher, teacher_weights=weights, **(few | choices)),
        data=DataConfig(root=root, workers=0, colour_jitter=0.4),
        schedule=ScheduleConfig(),
        loop=LoopConfig(epochs=2, batch_size=8, device="cpu", log_every=1, run_dir=run_dir),
        knn=KnnConfig(every=1, k=3),
    )


@pytest.fixture(scope="module")
def run(images, weights, tmp_path_factory):
    return pretrain(recipe(images, tmp_path_factory.mktemp("runs") / "run", weights))


def same_weights(ours, theirs):
    first, second = files.read(ours).tensors, files.read(theirs).tensors
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_logs_both_branches(run):
    metrics = read_metrics(run / "metrics.jsonl")
    for step in (1, 2, 3, 4):
        line = metrics[step]
        assert line["loss"] == pytest.approx(line["fused"] + line["auxiliary"], abs=1e-5)
    assert [step for step, line in metrics.items() if "knn_top1" in line] == [0, 2, 4]


def test_a_run_leaves_pictures(run):
    pictures = [path.name for path in sorted((run / "pictures").iterdir())]
    assert pictures == ["curves.png", "distillation-0000.png", "distillation-0002.png"]
    picture = np.asarray(Image.open(run / "pictures/distillation-0002.png"))
    assert picture.shape[1] == 8 * 256 + 7 * GAP + 2 * MARGIN  # 64 pixels are shown as 256


def by_both(root, run_dir, weights):
    """Pixels, with the moving average and a frozen teacher beside them."""
    objective = toy_objective({}, layer_scale=0.1).config
    frozen = {"teacher": "test_vit", "teacher_weights": weights, "frozen": FrozenConfig(weight=0.5, width=64)}
    return replace(recipe(root, run_dir, weights), objective=replace(objective, **frozen), knn=KnnConfig())


def test_pixels_with_both_teachers(images, weights, tmp_path, capsys):
    given = by_both(images, tmp_path / "run", weights)
    pretrain(replace(given, loop=replace(given.loop, max_steps=3)))
    pretrain(given)
    assert "teacher test_vit: 4 x 4 tokens of 64 x 64 pixels" in capsys.readouterr().out
    lines = read_metrics(tmp_path / "run/metrics.jsonl")
    for step in (1, 2, 3, 4):
        line = lines[step]
        parts = line["pixel"] + 0.3 * line["feature"] + 0.5 * line["frozen"]
        assert line["loss"] == pytest.approx(parts, abs=1e-5)
    pretrain(by_both(images, tmp_path / "whole", weights))
    assert same_weights(tmp_path / "run", tmp_path / "whole")
    assert (tmp_path / "run/pictures/reconstruction-0002.png").is_file()
    shown = load_objective(tmp_path / "run")  # needs no teacher
    assert shown.features is shown.frozen is None


def test_a_run_says_who_teaches_it(images, weights, tmp_path, capsys):
    given = recipe(images, tmp_path / "run", weights)
    pretrain(replace(given, loop=replace(given.loop, max_steps=1), knn=KnnConfig()))
    assert "teacher test_vit: 4 x 4 tokens of 64 x 64 pixels, targets 64 wide" in capsys.readouterr().out


def test_the_teacher_is_in_no_file(run):
    parts = {"backbone", "pyramid", "embed", "mask_token", "norm", "head", "auxiliary"}
    trained = files.read(run)
    assert trained.parts == parts
    student = sum(tensor.numel() * tensor.element_size() for tensor in trained.tensors.values())
    for path in trained.path.parent.rglob("*"):  # weights, and AdamW's two numbers for each of them
        assert path.stat().st_size < 2 * student + 100_000


def test_pretrained_weights_are_backbone_and_pyramid(run):
    weights = files.read(run / "pretrained.safetensors")
    assert weights.parts == {"backbone", "pyramid"}
    Model(weights.part("model", ModelConfig)).load_state_dict(weights.tensors)


def test_interrupted_and_resumed_equals_uninterrupted(run, images, weights, tmp_path):
    given = recipe(images, tmp_path / "run", weights)
    pretrain(replace(given, loop=replace(given.loop, max_steps=3)))
    assert not (tmp_path / "run/pretrained.safetensors").exists()
    pretrain(given)
    assert same_weights(tmp_path / "run", run)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()


def test_the_number_of_workers_changes_nothing(run, images, weights, tmp_path):
    given = recipe(images, tmp_path / "run", weights)
    pretrain(replace(given, data=replace(given.data, workers=2)))
    assert same_weights(tmp_path / "run", run)


def test_a_run_on_pixels_starts_from_it(run, images, weights, tmp_path, capsys):
    given = recipe(images, tmp_path / "run", weights)
    # After one step at a learning rate of 0 the weights are still those that were loaded.
    loop = replace(given.loop, max_steps=1, picture_every=0)
    pretrain(replace(given, objective=toy_objective().config, init=run, loop=loop, knn=KnnConfig()))
    assert "loaded backbone, pyramid from" in capsys.readouterr().out
    loaded = files.read(tmp_path / "run").tensors
    source = files.read(run / "pretrained.safetensors").tensors
    assert all(torch.equal(loaded[name], value) for name, value in source.items())


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def refused(given, words):
    with pytest.raises(UserError, match=words) as raised:
        pretrain(given)
    assert "\n" not in str(raised.value)
    assert not (given.loop.run_dir / "metrics.jsonl").exists()
    assert not list((given.loop.run_dir / "checkpoints").glob("*"))


@pytest.mark.parametrize(
    ("teacher", "choices", "words"),
    [
        ("test_vti", {}, "--objective.teacher test_vti: Unknown model .*nearest are .*test_vit"),
        ("test_resnet", {}, "--objective.teacher: test_resnet .ResNet. is no plain vision transformer"),
        ("../test_vit", {}, "--objective.teacher ../test_vit: .*nearest are test_vit"),
        ("test_vit2", {}, "--objective.teacher-weights: they do not fit test_vit2"),
        ("test_vit", {"target_width": 32}, "target.width is 32, but the teacher's targets have 64"),
        ("test_vit", {"frozen": FrozenConfig(weight=1.0, width=32)}, "frozen.width is 32, but .* have 64"),
        ("test_vit", {"target": "projected"}, "target.width is 64, but the teacher's targets have 1000"),
        ("", {}, "--objective.teacher-weights: no vision transformer under OpenAI's names"),
    ],
)
def test_a_teacher_that_does_not_fit_stops_a_run_before_its_first_step(
    images, weights, tmp_path, teacher, choices, words
):
    refused(recipe(images, tmp_path / "run", weights, teacher, **choices), words)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("patch_embed.proj.weight", (3, 5)),
        ("patch_embed.proj.weight", (1, 2, 3, 4, 5)),
        ("blocks.0.attn.qkv.weight", (64, 64)),
        ("pos_embed", (0,)),
        ("head.bias", (10,)),
        ("model", (2,)),
    ],
)
def test_weights_of_the_wrong_shape(images, tmp_path, name, shape):
    state = timm.create_model("test_vit").state_dict()
    save_file(state | {name: torch.zeros(shape)}, tmp_path / "wrong.safetensors")
    words = "--objective.teacher-weights: they do not fit test_vit: ."
    refused(recipe(images, tmp_path / "run", tmp_path / "wrong.safetensors"), words)


def test_weights_that_are_not_finite(images, tmp_path):
    state = timm.create_model("test_vit").state_dict()
    save_file(state | {"norm.bias": torch.full((64,), torch.nan)}, tmp_path / "nan.safetensors")
    given = recipe(images, tmp_path / "run", tmp_path / "nan.safetensors")
    refused(given, "--objective.teacher-weights: norm.bias has values that are NaN")


def test_without_file_and_network_both_ways_are_named(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    given = recipe(images, tmp_path / "run", None, "test_vit.r160_in1k")
    refused(given, r"test_vit.r160_in1k could not be downloaded from the Hub .*--objective\.teacher-weights")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("beside", [True, False])
def test_a_payload_does_not_run(images, tmp_path, beside):
    payload = Payload(tmp_path / "ran")
    state = timm.create_model("test_vit").state_dict()
    torch.save({"model": state, "payload": payload} if beside else payload, tmp_path / "evil.pth")
    refused(recipe(images, tmp_path / "run", tmp_path / "evil.pth"), r"evil.pth: asks for posix\.mkdir")
    assert not (tmp_path / "ran").exists()
