"""Fine-tuning and testing a classifier at toy size: what a run leaves, how exact it is, what stops it."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import itpn
from itpn import cli
from itpn.data.loader import DataConfig
from itpn.engine.loop import LoopConfig
from itpn.engine.optim import AdamWConfig
from itpn.engine.schedule import ScheduleConfig
from itpn.errors import UserError
from itpn.heads.classify import ClassifierConfig
from itpn.heads.finetune import FinetuneConfig
from itpn.heads.mixing import MixConfig
from itpn.models import ClassifierModel
from itpn.nn.depth import LayerDecayConfig
from itpn.nn.pyramid import Model, ModelConfig
from itpn.objectives.pixel import PixelConfig
from itpn.recipes.classify import Classify
from itpn.show.curves import read_metrics
from itpn.tasks.classify import classify
from itpn.tasks.common import config_of
from itpn.weights import files
from tests.launch import torchrun
from tests.toys import STEADY, toy_backbone, toy_model

PLAIN = FinetuneConfig(mix=MixConfig(mixup=0.0, cutmix=0.0, erasing=0.0, smoothing=0.0))


def write_images(root, split, classes, count, seed=0):
    """Noise, in each class with another colour."""
    pixels = np.random.default_rng(seed)
    for number, name in enumerate(classes):
        (root / split / name).mkdir(parents=True)
        colour = np.random.default_rng(number).uniform(0.2, 1, 3)
        for i in range(count):
            picture = pixels.integers(0, 256, (70, 80, 3)) * colour
            Image.fromarray(picture.astype(np.uint8)).save(root / split / name / f"{i}.png")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    write_images(root, "train", ("ant", "bee", "cow"), 8)
    write_images(root, "val", ("ant", "bee", "cow"), 3, seed=1)
    return root


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A file as pre-training leaves it, of a backbone with a pyramid and without relative positions."""
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("weights") / "pretrained.safetensors"
    model = toy_model(layer_scale=0.1)
    config = {"model": model, "objective": PixelConfig(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))}
    files.save(path, Model(model).state_dict(), json.loads(json.dumps(plain(config))))
    return path


def plain(config):
    return {name: asdict(value) for name, value in config.items()}


def recipe(root, run_dir, loop=None, **fields):
    given = Classify(
        name="toy",
        model=ModelConfig(backbone=toy_backbone(relative_position_bias=True, drop_path=0.2), pyramid=None),
        image_size=(64, 64),
        data=DataConfig(root=root, workers=0, randaugment="rand-m9-mstd0.5-inc1"),
        finetune=FinetuneConfig(average=0.99),
        layer_decay=LayerDecayConfig(rate=0.8),
        optim=AdamWConfig(eps=STEADY),
        schedule=ScheduleConfig(),
        loop=LoopConfig(
            **{"epochs": 2, "batch_size": 8, "device": "cpu", "log_every": 1, "run_dir": run_dir}
            | (loop or {})
        ),
        eval_batch=4,
    )
    return replace(given, **fields)


@pytest.fixture(scope="module")
def run(images, pretrained, tmp_path_factory):
    return classify(recipe(images, tmp_path_factory.mktemp("runs") / "run", init=pretrained))


def same_weights(ours, theirs):
    first, second = files.read(ours).tensors, files.read(theirs).tensors
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_what_a_run_leaves(run):
    metrics = read_metrics(run / "metrics.jsonl")
    assert [step for step, line in metrics.items() if "val_top1" in line] == [3, 6]
    assert all({"loss", "accuracy"} <= metrics[step].keys() for step in range(1, 7))
    for name in ("best.safetensors", "last.safetensors", "report.json", "pictures/confusion.png"):
        assert (run / name).is_file()
    report = json.loads((run / "report.json").read_text())
    assert report["images"] == 9
    assert [row["images"] for row in report["classes"]] == [3, 3, 3]
    assert report["val_top1"] == metrics[6]["val_top1"]


def test_the_architecture_and_the_normalisation_are_the_file_s(run, pretrained):
    weights = files.read(run / "last.safetensors")
    backbone = weights.part("model", ModelConfig).backbone
    assert (backbone.layer_scale, backbone.drop_path, backbone.relative_position_bias) == (0.1, 0.2, True)
    assert weights.config["input"] == {
        "mean": [0.4, 0.5, 0.6],
        "std": [0.2, 0.3, 0.4],
        "image_size": [64, 64],
    }
    assert weights.config["classes"] == ["ant", "bee", "cow"]


def test_an_unfinished_run_knows_its_classes_and_images(images, pretrained, tmp_path, run):
    given = recipe(images, tmp_path / "run", loop={"max_steps": 1}, init=pretrained)
    weights, finished = files.read(classify(given)), files.read(run / "last.safetensors")
    assert weights.path.parent.parent.name == "checkpoints"
    assert all(weights.config[name] == finished.config[name] for name in ("classes", "input"))
    model = itpn.load(weights.path.parent)
    assert isinstance(model, ClassifierModel) and model.classes == ("ant", "bee", "cow")
    assert torch.equal(model.head.weight, weights.tensors["average.head.weight"])


def test_what_is_kept_is_the_average(run):
    trained = files.read(run / "checkpoints" / (run / "checkpoints/last").read_text()).tensors
    kept = files.read(run / "last.safetensors").tensors
    assert all(torch.equal(kept[name], trained[f"average.{name}"]) for name in kept)
    assert not torch.equal(kept["head.weight"], trained["head.weight"])


def test_a_run_directory_is_a_classifier(run):
    model = itpn.load(run)
    assert isinstance(model, ClassifierModel)
    assert model.classes == ("ant", "bee", "cow")


def test_interrupted_and_resumed_equals_uninterrupted(run, images, pretrained, tmp_path):
    classify(recipe(images, tmp_path / "run", {"max_steps": 4}, init=pretrained))
    classify(recipe(images, tmp_path / "run", init=pretrained))
    assert same_weights(tmp_path / "run" / "last.safetensors", run / "last.safetensors")
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()


def test_the_number_of_workers_changes_nothing(run, images, pretrained, tmp_path):
    given = recipe(images, tmp_path / "run", init=pretrained)
    classify(replace(given, data=replace(given.data, workers=2)))
    assert same_weights(tmp_path / "run" / "last.safetensors", run / "last.safetensors")


def test_accumulation_changes_rounding_alone(run, images, pretrained, tmp_path):
    classify(recipe(images, tmp_path / "run", {"device_batch": 4}, init=pretrained))
    ours, theirs = (read_metrics(path / "metrics.jsonl") for path in (run, tmp_path / "run"))
    losses = [[line["loss"] for line in metrics.values() if "loss" in line] for metrics in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_it_learns_32_images_by_heart(tmp_path):
    for split in ("train", "val"):  # the same images
        write_images(tmp_path / "images", split, [f"class {i}" for i in range(4)], 8)
    given = recipe(
        tmp_path / "images",
        tmp_path / "run",
        {"epochs": 90, "batch_size": 16, "device_batch": 16},
        model=ModelConfig(backbone=toy_backbone(), pyramid=None),
        finetune=PLAIN,
        data=DataConfig(root=tmp_path / "images", workers=0, min_scale=1.0),
        classifier=ClassifierConfig(init_std=0.02),
        optim=AdamWConfig(lr=3e-3, weight_decay=0.0),
        layer_decay=LayerDecayConfig(rate=1.0),
        eval_every=0,
    )
    run = classify(given)
    assert json.loads((run / "report.json").read_text())["val_top1"] == 1.0


@pytest.mark.parametrize("size", [(32, 96), (128, 64), (96, 96)])
def test_other_image_sizes(images, pretrained, tmp_path, size):
    run = classify(recipe(images, tmp_path / "run", {"epochs": 1}, init=pretrained, image_size=size))
    weights = files.read(run / "last.safetensors")
    side = size[0] if size[0] == size[1] else 64
    assert weights.part("model", ModelConfig).backbone.image_size == side
    assert itpn.load(run)(torch.zeros(1, 3, *size)).shape == (1, 3)


def test_a_share_is_held_out_where_there_is_no_val(images, tmp_path, capsys):
    shutil.copytree(images / "train", tmp_path / "images")
    run = classify(recipe(tmp_path / "images", tmp_path / "run", {"epochs": 1}, val_share=0.25))
    assert json.loads((run / "report.json").read_text())["images"] == 6
    assert "18 of 24 images" in capsys.readouterr().out


def test_the_start_tells_the_classes_apart(images, tmp_path, capsys):
    classify(recipe(images, tmp_path / "run", {"epochs": 1}))
    assert "3 classes" in capsys.readouterr().out


def outcome(capsys, *arguments):
    status = cli.main(["test", *map(str, arguments)])
    return status, capsys.readouterr()


@pytest.fixture
def config(images, tmp_path, monkeypatch):
    """A config file of the toy, and the folder it lies in as the current one."""
    (tmp_path / "toy.py").write_text(
        "from pathlib import Path\nfrom tests.test_classify_run import recipe\n"
        f"config = recipe(Path({str(images)!r}), Path('nowhere'))\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path / "toy.py"


def test_testing_a_run_repeats_its_own_numbers(run, config, capsys):
    status, printed = outcome(capsys, config, run, "--save-predictions", "predictions.jsonl")
    assert status == 0
    own = json.loads((run / "report.json").read_text())
    best = files.read(run / "best.safetensors").config["measured"]
    found = json.loads((config.parent / "evaluation/report.json").read_text())
    assert found["val_top1"] == best["val_top1"]
    assert found["images"] == own["images"] == 9
    assert f"top-1 {found['val_top1']:.2%}" in printed.out
    lines = [json.loads(line) for line in (config.parent / "predictions.jsonl").read_text().splitlines()]
    assert len({line["path"] for line in lines}) == 9
    right = [line["guesses"][0] == line["label"] for line in lines]
    assert np.mean(right) == pytest.approx(found["val_top1"])


@pytest.mark.parametrize("protocol", ["knn", "linear"])
def test_frozen_features(pretrained, config, capsys, protocol):
    status, printed = outcome(capsys, config, pretrained, "--protocol", protocol)
    assert status == 0
    found = json.loads((config.parent / "evaluation/report.json").read_text())
    assert 0 <= found[f"{protocol}_top1"] <= found[f"{protocol}_top5"] <= 1
    assert f"{protocol}_top1" in printed.out


def test_two_ranks_find_what_one_finds(run, config, tmp_path, capsys):
    assert outcome(capsys, config, run)[0] == 0
    torchrun("itpn", "test", config, run, "--out", "two", "--eval-batch", 2, directory=tmp_path)
    one, two = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("evaluation", "two"))
    assert one.pop("val_loss") == pytest.approx(two.pop("val_loss"), abs=1e-5)
    assert one.pop("val_ece") == pytest.approx(two.pop("val_ece"), abs=1e-5)
    assert one == two


def test_a_file_without_classifier(pretrained, config, capsys):
    status, printed = outcome(capsys, config, pretrained)
    assert status == 2
    assert "holds no classifier; fine-tune it first" in printed.err


def test_a_classifier_of_other_classes(run, images, config, tmp_path, capsys):
    shutil.copytree(images, tmp_path / "others")
    for split in ("train", "val"):
        (tmp_path / "others" / split / "cow").rename(tmp_path / "others" / split / "dog")
    status, printed = outcome(capsys, config, run, "--data.root", tmp_path / "others")
    assert status == 2
    assert "only in the file: cow; only in the images: dog" in printed.err


def test_a_later_version_of_a_run_goes_on(images, tmp_path):
    given = recipe(images, tmp_path / "run", {"max_steps": 1})
    classify(given)
    before = config_of(replace(given, val_share=0.3))
    path = tmp_path / "run/config.json"
    kept = json.loads(path.read_text())
    del kept["val_share"]
    path.write_text(json.dumps(kept))
    assert before["val_share"] == 0.3
    classify(given)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"loop": {"batch_size": 6, "device_batch": 3}}, "--device-batch"),
        ({"data": {"randaugment": "rand-x"}}, "--data.randaugment"),
        ({"data": {"root": Path("nowhere")}}, "nowhere"),
        ({"init": Path("nowhere.safetensors")}, "nowhere.safetensors"),
    ],
)
def test_mistakes(images, tmp_path, fields, words):
    given = recipe(images, tmp_path / "run", fields.pop("loop", None))
    with pytest.raises(UserError, match=words):
        data = replace(given.data, **fields.pop("data", {}))
        classify(replace(given, data=data, **fields))


def test_classes_that_differ_between_the_splits(images, tmp_path):
    shutil.copytree(images, tmp_path / "images")
    shutil.rmtree(tmp_path / "images/val/bee")
    with pytest.raises(UserError, match="bee"):
        classify(recipe(tmp_path / "images", tmp_path / "run"))


def test_images_without_classes(tmp_path, images):
    shutil.copytree(images / "train" / "ant", tmp_path / "images")
    with pytest.raises(UserError, match="make a folder there for each class"):
        classify(recipe(tmp_path / "images", tmp_path / "run"))
