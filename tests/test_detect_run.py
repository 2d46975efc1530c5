"""Detectors at toy size: what a run leaves, how exact it is, what stops it, testing and predicting."""

import json
from dataclasses import asdict

import pytest
import torch
from torch import nn

import itpn
from itpn import cli
from itpn.errors import UserError
from itpn.models import DetectorModel
from itpn.nn.pyramid import Model, ModelConfig
from itpn.objectives.pixel import PixelConfig
from itpn.show.curves import read_metrics
from itpn.tasks.detect import detect
from itpn.weights import files
from tests.detecting import CATEGORIES, recipe, write_splits
from tests.launch import torchrun
from tests.toys import toy_model, toy_scenes

NUMBERS = {
    f"{kind}_{name}"
    for kind in ("box", "mask")
    for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_splits(tmp_path_factory.mktemp("coco"))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A file as pre-training leaves it."""
    return saved(tmp_path_factory.mktemp("weights") / "pretrained.safetensors", toy_model(layer_scale=0.1))


def saved(path, model):
    torch.manual_seed(5)
    seen = PixelConfig(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    config = {"model": asdict(model), "objective": asdict(seen)}
    files.save(path, Model(model).state_dict(), json.loads(json.dumps(config)))
    return path


@pytest.fixture(scope="module")
def run(images, pretrained, tmp_path_factory):
    return detect(recipe(images, tmp_path_factory.mktemp("runs") / "run", init=pretrained))


def same_weights(ours, theirs):
    first, second = files.read(ours).tensors, files.read(theirs).tensors
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_what_a_run_leaves(run):
    metrics = read_metrics(run / "metrics.jsonl")
    assert [step for step, line in metrics.items() if "box_AP" in line and "mask_AP" in line] == [2, 4]
    assert all({"loss", "class", "box", "mask", "rpn_box"} <= metrics[step].keys() for step in range(1, 5))
    for name in ("best.safetensors", "last.safetensors", "pictures/curves.png"):
        assert (run / name).is_file()
    assert {path.name for path in (run / "pictures").glob("detections-*")} == {
        "detections-0001.png",
        "detections-0002.png",
    }
    report = json.loads((run / "report.json").read_text())
    assert report.keys() == NUMBERS | {"images", "warnings", "classes"}
    assert (report["images"], report["box_AP"]) == (5, metrics[4]["box_AP"])
    assert [(row["id"], row["name"]) for row in report["classes"]] == [(3, "red"), (5, "green"), (9, "blue")]
    assert all(row.keys() == NUMBERS | {"id", "name"} for row in report["classes"])
    assert report["box_APl"] is None, "no object is so large"


def test_the_file_says_what_it_is(run, pretrained):
    weights, given = files.read(run / "last.safetensors"), files.read(pretrained)
    model = weights.part("model", ModelConfig)
    assert model.pyramid == given.part("model", ModelConfig).pyramid, "depth and width are the file's"
    assert (model.backbone.layer_scale, model.backbone.drop_path) == (0.1, 0.2)
    assert weights.config["classes"] == ["red", "green", "blue"]
    assert weights.config["category_ids"] == [3, 5, 9]
    assert weights.config["detector"]["num_classes"] == 3
    assert weights.config["input"]["mean"] == [0.4, 0.5, 0.6]
    assert not [name for name in weights.tensors if name.endswith("num_batches_tracked")]


def test_a_run_directory_is_a_detector(run, tmp_path):
    model = itpn.load(run)
    assert isinstance(model, DetectorModel)
    assert (model.classes, model.category_ids) == (("red", "green", "blue"), (3, 5, 9))
    pixels = toy_scenes(1)["images"]
    (found,) = model(model.normalise(pixels))
    (same,) = model.predict(pixels, torch.tensor([[64, 64]]))
    assert torch.equal(found.boxes, same.boxes)
    model.save_pretrained(tmp_path / "folder")
    again = DetectorModel.from_pretrained(tmp_path / "folder")
    assert (again.classes, again.views, again.config) == (model.classes, model.views, model.config)
    assert "object-detection" in (tmp_path / "folder" / "README.md").read_text()
    assert itpn.load(run, features="pyramid").out_channels == 24


def test_a_checkpoint_is_a_detector_too(run):
    newest = run / "checkpoints" / (run / "checkpoints/last").read_text().strip() / "model.safetensors"
    assert isinstance(itpn.load(newest), DetectorModel)


def test_all_of_the_pyramid_is_said_to_come_from_the_file(run, images, pretrained, tmp_path, capsys):
    detect(recipe(images, tmp_path / "run", {"max_steps": 1, "picture_every": 0}, init=pretrained))
    said = capsys.readouterr().out
    total = sum(
        tensor.numel()
        for name, tensor in files.read(pretrained).tensors.items()
        if name.startswith("pyramid")
    )
    assert f"{total:,} of the pyramid's {total:,} parameters" in said
    assert "8 images with" in said and "objects of 3 classes" in said


def test_the_pyramid_can_start_anew(images, pretrained, tmp_path, capsys):
    given = recipe(images, tmp_path / "run", {"max_steps": 1}, init=pretrained, init_pyramid=False)
    detect(given)
    assert "0 of the pyramid's" in capsys.readouterr().out


def test_weights_without_a_pyramid(images, tmp_path):
    path = saved(tmp_path / "mae.safetensors", toy_model(pyramid=False))
    with pytest.raises(UserError, match=r"holds no pyramid.*--no-init-pyramid"):
        detect(recipe(images, tmp_path / "run", init=path))


def test_a_pyramid_that_does_not_fit_its_own_config(images, pretrained, tmp_path):
    weights = files.read(pretrained)
    tensors = {name: tensor for name, tensor in weights.tensors.items() if name != "pyramid.lateral4.weight"}
    files.save(tmp_path / "damaged.safetensors", tensors, weights.config)
    with pytest.raises(UserError, match=r"1 tensors do not fit .*pyramid.lateral4.weight is missing there"):
        detect(recipe(images, tmp_path / "run", init=tmp_path / "damaged.safetensors"))


def test_interrupted_and_resumed_equals_uninterrupted(run, images, pretrained, tmp_path):
    for steps in (3, None):
        detect(recipe(images, tmp_path / "run", {"max_steps": steps}, init=pretrained))
    assert same_weights(tmp_path / "run" / "last.safetensors", run / "last.safetensors")
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()


def test_own_data_without_images_to_validate_on(images, config, tmp_path, capsys):
    (tmp_path / "objects.json").write_bytes((images / "annotations/instances_train2017.json").read_bytes())
    own = ("--data.root", "nowhere", "--data.train-images", images / "train2017")
    own += ("--data.train-annotations", "objects.json", "--val-share", "0.25", "--device", "cpu")
    short = ("--run-dir", "run", "--epochs", "1", "--batch-size", "3", "--picture-every", "0")
    status, printed = outcome(capsys, "train", config, *own, *short)
    assert status == 0, printed.err
    assert "training images: 6 of 8 images" in printed.out
    assert "validation images: 2 of 8 images" in printed.out
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["images"] == 2
    assert outcome(capsys, "test", config, "run", *own)[0] == 0
    assert json.loads((tmp_path / "evaluation/report.json").read_text()) == report


@pytest.fixture
def config(images, tmp_path, monkeypatch):
    """A config file of the toy, and the folder it lies in as the current one."""
    (tmp_path / "toy.py").write_text(
        "from pathlib import Path\nfrom tests.detecting import recipe\n"
        f"config = recipe(Path({str(images)!r}), Path('nowhere'))\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path / "toy.py"


def outcome(capsys, *arguments):
    status = cli.main([*map(str, arguments)])
    return status, capsys.readouterr()


def test_testing_a_run_on_one_and_on_two_ranks(run, config, tmp_path, capsys):
    status, printed = outcome(capsys, "test", config, run, "--save-predictions", "found.json")
    assert status == 0, printed.err
    assert "all classes" in printed.out and "AP50" in printed.out
    best = files.read(run / "best.safetensors").config["measured"]
    one = json.loads((tmp_path / "evaluation/report.json").read_text())
    assert {name: one[name] for name in best if name != "epoch"} == {
        name: value for name, value in best.items() if name != "epoch"
    }
    results = json.loads((tmp_path / "found.json").read_text())
    assert all({"image_id", "category_id", "bbox", "score", "segmentation"} == row.keys() for row in results)
    assert (tmp_path / "evaluation/pictures/detections.png").is_file()
    saving = ("--out", "two", "--save-predictions", "found-two.json")
    torchrun("itpn", "test", config, run, *saving, directory=tmp_path)
    assert json.loads((tmp_path / "two/report.json").read_text()) == one
    others = json.loads((tmp_path / "found-two.json").read_text())
    assert [row["score"] for row in others] == pytest.approx([row["score"] for row in results], abs=1e-5)


def test_ranks_on_cpus_keep_the_same_statistics(images, config, tmp_path):
    fields = ("--run-dir", "run", "--epochs", 1, "--picture-every", 0)
    said = torchrun("itpn", "train", config, *fields, directory=tmp_path)
    assert "each rank normalises its own samples" in said
    kept = files.read(tmp_path / "run" / "last.safetensors").tensors
    means = [tensor for name, tensor in kept.items() if name.endswith("running_mean")]
    assert means and all(tensor.abs().sum() > 0 for tensor in means)


def test_predicting(run, images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"no image")
    folder = images / "val2017"
    status, printed = outcome(
        capsys, "predict", run, folder, "broken.png", "--min-score", "0", "--json", "found.json"
    )
    assert status == 0, printed.err
    assert "broken.png" in printed.err and "1 of 6 images cannot be read" in printed.err
    assert sorted(path.name for path in (tmp_path / "predictions").glob("*.png")) == [
        f"{i}.png" for i in range(5)
    ]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["categories"] == CATEGORIES
    assert [image["file_name"] for image in found["images"]] == [str(folder / f"{i}.png") for i in range(5)]
    assert found["annotations"]
    for annotation in found["annotations"]:
        x, y, width, height = annotation["bbox"]
        assert min(x, y) >= -1e-3 and x + width <= 64.01 and y + height <= 64.01
        assert annotation["segmentation"]["size"] == [64, 64]
        assert 0 < annotation["score"] <= 1 and annotation["area"] >= 0


def test_what_predicting_refuses(run, images, capsys):
    status, printed = outcome(
        capsys, "predict", run, images / "val2017", "--embeddings", "found.npy", "--device", "cpu"
    )
    assert status == 2
    assert "is a detector: leave out --embeddings" in printed.err


def test_a_file_without_detector(pretrained, config, capsys):
    status, printed = outcome(capsys, "test", config, pretrained)
    assert status == 2
    assert "holds no detector; fine-tune it first" in printed.err


def test_a_detector_of_other_classes(run, images, config, tmp_path, capsys):
    content = json.loads((images / "annotations/instances_val2017.json").read_text())
    content["categories"][0]["name"] = "pink"
    (tmp_path / "val.json").write_text(json.dumps(content))
    status, printed = outcome(capsys, "test", config, run, "--data.val-annotations", tmp_path / "val.json")
    assert status == 2
    assert "only in the file: red; only in the images: pink" in printed.err


def test_what_info_says(run, capsys):
    status, printed = outcome(capsys, "info", run / "best.safetensors")
    assert status == 0
    assert "detector: Mask R-CNN, 3 classes" in printed.out and "regions" in printed.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data.root", "nowhere"], "there is no nowhere/train2017"),
        (["--eval-batch", "0"], "--eval-batch 1 or more"),
        (["--batch-size", "64"], "8 images are fewer than one global batch of 64"),
        (["--schedule.milestones", "9", "11"], "shares of the run"),
        (["--init", "nothing.safetensors"], "there is no file nothing.safetensors"),
    ],
)
def test_mistakes_are_told_in_a_line(config, capsys, arguments, words):
    status, printed = outcome(capsys, "train", config, "--run-dir", "run", *arguments)
    assert status == 2
    assert words in printed.err and printed.err.count("\n") == 1


def test_batch_norms_are_synchronised_on_gpus_alone():
    from itpn.engine.distributed import World

    for kind, expected in (("cuda", nn.SyncBatchNorm), ("cpu", nn.BatchNorm2d)):
        module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        World(0, 2, torch.device(kind))._synchronise_norms(module)
        assert type(module[1]) is expected
