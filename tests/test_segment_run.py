"""Fine-tuning, testing and predicting with a segmenter at toy size: what a run leaves, how exact it is, what
stops it."""

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
from itpn.data.labels import Labelling, read_labels
from itpn.data.segmentation import SegmentationDataConfig
from itpn.engine.loop import LoopConfig
from itpn.engine.optim import AdamWConfig
from itpn.engine.schedule import ScheduleConfig
from itpn.errors import UserError
from itpn.heads.upernet import SegmenterConfig
from itpn.heads.windows import InferenceConfig
from itpn.models import FeatureModel, SegmenterModel
from itpn.nn.depth import LayerDecayConfig
from itpn.nn.pyramid import Model, ModelConfig, PyramidConfig
from itpn.objectives.pixel import PixelConfig
from itpn.recipes.segment import Segment
from itpn.show.curves import read_metrics
from itpn.tasks.segment import segment
from itpn.weights import files
from tests.data.segmented import write_masks
from tests.launch import torchrun
from tests.toys import STEADY, toy_backbone, toy_model

NAMES = ("red", "green", "blue", "yellow")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_masks(tmp_path_factory.mktemp("images"), {"train": 10, "val": 3})


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A file as pre-training leaves it, with another pyramid than the recipe's and no relative positions."""
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("weights") / "pretrained.safetensors"
    model = toy_model(layer_scale=0.1)
    config = {"model": asdict(model), "objective": asdict(PixelConfig(mean=(0.4, 0.5, 0.6)))}
    files.save(path, Model(model).state_dict(), json.loads(json.dumps(config)))
    return path


def recipe(root, run_dir, loop=None, **fields):
    """Six steps of four images, of which an epoch has two and a half."""
    given = Segment(
        name="toy",
        model=ModelConfig(backbone=toy_backbone(relative_position_bias=True, drop_path=0.2)),
        segmenter=SegmenterConfig(width=16, auxiliary_width=8, norm="group"),
        inference=InferenceConfig(crop=(32, 32), stride=(16, 16)),
        data=SegmentationDataConfig(
            root=root, format="masks", short=40, long=160, ratio=(0.75, 1.5), crop=(32, 32), workers=0
        ),
        optim=AdamWConfig(lr=1e-3, betas=(0.9, 0.999), eps=STEADY),
        layer_decay=LayerDecayConfig(rate=0.8),
        schedule=ScheduleConfig(shape="poly", warmup_iterations=2, start_factor=1e-6),
        loop=LoopConfig(
            **{"iterations": 6, "batch_size": 4, "device": "cpu", "log_every": 1, "run_dir": run_dir,
               "picture_every": 4} | (loop or {})
        ),
        eval_every=3,
    )  # fmt: skip
    return replace(given, **fields)


@pytest.fixture(scope="module")
def run(images, pretrained, tmp_path_factory):
    return segment(recipe(images, tmp_path_factory.mktemp("runs") / "run", init=pretrained))


def same_weights(ours, theirs):
    first, second = files.read(ours).tensors, files.read(theirs).tensors
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_what_a_run_leaves(run):
    metrics = read_metrics(run / "metrics.jsonl")
    assert [step for step, line in metrics.items() if "miou" in line] == [3, 6]
    assert all({"loss", "decode", "auxiliary", "accuracy"} <= metrics[step].keys() for step in range(1, 7))
    assert [metrics[step]["lr"] for step in (1, 3, 6)] == pytest.approx([1e-9, 1e-3 * 4 / 6, 1e-3 / 6])
    report = json.loads((run / "report.json").read_text())
    assert (report["images"], report["left_out"], report["miou"]) == (3, 0, metrics[6]["miou"])
    assert [row["name"] for row in report["classes"]] == list(NAMES)
    assert sum(row["num_pixels"] for row in report["classes"]) == 3 * 40 * 55  # a column has no label
    pictures = {path.name for path in (run / "pictures").iterdir()}
    assert pictures == {"segmentation-0004.png", "segmentation-0006.png", "curves.png"}


def test_the_architecture_the_pyramid_and_the_normalisation_are_the_file_s(run, pretrained):
    weights, there = files.read(run / "last.safetensors"), files.read(pretrained)
    model = weights.part("model", ModelConfig)
    assert model.pyramid == there.part("model", ModelConfig).pyramid
    assert (model.backbone.layer_scale, model.backbone.drop_path) == (0.1, 0.2)
    assert (model.backbone.image_size, model.backbone.relative_image_size) == (64, 32)
    assert weights.config["classes"] == list(NAMES)
    given = weights.config["input"]
    assert (given["mean"], given["image_size"], given["scale"]) == ([0.4, 0.5, 0.6], [32, 32], [40, 160])


def test_how_much_is_loaded_is_said(images, pretrained, tmp_path, capsys):
    segment(recipe(images, tmp_path / "all", {"max_steps": 1}, init=pretrained))
    model = Model(toy_model(layer_scale=0.1))
    total = sum(parameter.numel() for parameter in model.pyramid.parameters())
    assert f"and {total:,} of the pyramid's {total:,} parameters" in capsys.readouterr().out
    segment(recipe(images, tmp_path / "half", {"max_steps": 1}, init=pretrained, init_pyramid=False))
    assert "and 0 of the pyramid's" in capsys.readouterr().out


def test_a_run_directory_is_a_segmenter(run):
    model = itpn.load(run)
    assert isinstance(model, SegmenterModel)
    assert (model.classes, model.scale, model.inference.stride) == (NAMES, (40, 160), (16, 16))
    assert model(torch.zeros(1, 3, 40, 56)).shape == (1, 4, 40, 56)
    assert isinstance(itpn.load(run, features="pyramid"), FeatureModel)


def test_a_segmenter_is_saved_and_loaded_again(run, tmp_path):
    model = itpn.load(run)
    model.save_pretrained(tmp_path / "folder")
    again = itpn.load(tmp_path / "folder")
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(model(images), again(images))
    assert (again.classes, again.scale, again.mean) == (NAMES, (40, 160), (0.4, 0.5, 0.6))
    assert "image-segmentation" in (tmp_path / "folder/README.md").read_text()


def test_interrupted_and_resumed_equals_uninterrupted(run, images, pretrained, tmp_path):
    segment(recipe(images, tmp_path / "run", {"max_steps": 4}, init=pretrained))
    segment(recipe(images, tmp_path / "run", init=pretrained))
    assert same_weights(tmp_path / "run" / "last.safetensors", run / "last.safetensors")
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()


def test_a_run_counted_in_epochs_with_batch_norm(images, tmp_path, capsys):
    given = recipe(images, tmp_path / "run", {"epochs": 2, "iterations": None, "picture_every": 0})
    segmenter = replace(given.segmenter, norm="batch")
    schedule = ScheduleConfig()
    run = segment(replace(given, segmenter=segmenter, schedule=schedule, eval_every=0))
    assert [step for step, line in read_metrics(run / "metrics.jsonl").items() if "miou" in line] == [4]
    stored = files.read(run / "checkpoints" / (run / "checkpoints/last").read_text())
    kept = files.read(run / "last.safetensors")
    assert same_weights(stored.path, kept.path)
    assert any("running_mean" in name for name in kept.tensors)
    assert cli.main(["info", str(run)]) == 0
    assert "segmenter: UPerNet, 16 wide, 4 classes" in capsys.readouterr().out


def test_it_learns_eight_images_by_heart(tmp_path):
    root = write_masks(tmp_path / "images", {"train": 8})
    for kind in ("images", "labels"):
        shutil.copytree(root / kind / "train", root / kind / "val")
    given = recipe(root, tmp_path / "run", {"iterations": 80, "batch_size": 8, "picture_every": 0})
    plain = {name: 0.0 for name in ("flip", "brightness", "contrast", "saturation", "hue")}
    given = replace(
        given,
        model=ModelConfig(backbone=toy_backbone(), pyramid=PyramidConfig(width=24, depth=1)),
        segmenter=replace(given.segmenter, width=32, dropout=0.0),
        inference=InferenceConfig(mode="whole"),
        data=replace(given.data, ratio=(1.0, 1.0), crop=(64, 64), max_class_share=1.0, **plain),
        optim=AdamWConfig(lr=3e-3, betas=(0.9, 0.999)),
        layer_decay=LayerDecayConfig(rate=1.0),
        schedule=ScheduleConfig(shape="poly", warmup_iterations=10, start_factor=0.01),
        eval_every=0,
    )
    report = json.loads((segment(given) / "report.json").read_text())
    assert report["images"] == 8
    assert report["miou"] > 0.9


def test_a_share_is_held_out_where_there_is_no_val(images, tmp_path, capsys):
    shutil.copytree(images, tmp_path / "images")
    shutil.rmtree(tmp_path / "images/images/val")
    segment(recipe(tmp_path / "images", tmp_path / "run", {"max_steps": 1}, val_share=0.3))
    said = capsys.readouterr().out
    assert "training images: 7 of 10 images" in said
    assert "validation images: 3 of 10 images" in said


@pytest.fixture
def config(images, tmp_path, monkeypatch):
    """A config file of the toy, and the folder it lies in as the current one."""
    (tmp_path / "toy.py").write_text(
        "from pathlib import Path\nfrom tests.test_segment_run import recipe\n"
        f"config = recipe(Path({str(images)!r}), None)\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path / "toy.py"


def outcome(capsys, *arguments):
    status = cli.main([*map(str, arguments)])
    return status, capsys.readouterr()


def numbers(folder):
    return json.loads((folder / "report.json").read_text())


def test_testing_a_run_repeats_its_own_numbers(run, config, capsys):
    status, printed = outcome(capsys, "test", config, run)
    assert status == 0
    found, best = numbers(Path("evaluation")), files.read(run / "best.safetensors").config["measured"]
    assert found["miou"] == best["miou"]
    assert f"mIoU {found['miou']:.2%}" in printed.out
    assert "yellow" in printed.out
    assert Path("evaluation/pictures/segmentation.png").is_file()
    more = ("--inference.mode", "whole", "--inference.flip", "--inference.scales", "1.0", "1.5")
    assert outcome(capsys, "test", config, run, *more, "--out", "more")[0] == 0
    assert numbers(Path("more"))["images"] == 3


def test_two_ranks_learn_and_find_what_one_does(run, images, config, pretrained, tmp_path):
    """Without dropout, which is drawn by rank."""
    given = recipe(images, tmp_path / "one", init=pretrained)
    segment(replace(given, segmenter=replace(given.segmenter, dropout=0.0)))
    fields = ("--init", pretrained, "--run-dir", "two", "--segmenter.dropout", "0")
    torchrun("itpn", "train", config, *fields, directory=tmp_path)
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    for step, line in one.items():
        assert two[step]["loss"] == pytest.approx(line["loss"], abs=2e-6)
        assert two[step].get("miou", 0) == pytest.approx(line.get("miou", 0), abs=0.01)
    torchrun("itpn", "test", config, run, "--out", "evaluated", directory=tmp_path)
    assert numbers(tmp_path / "evaluated")["miou"] == files.read(run).config["measured"]["miou"]


def test_predict_leaves_pictures_and_labels(run, images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd.png").write_bytes(b"no image")
    shown = images / "images/val"
    status, printed = outcome(
        capsys, "predict", run, shown, tmp_path / "odd.png", "--json", "shares.jsonl", "--device", "cpu"
    )
    assert status == 0
    assert "odd.png" in printed.err
    labels = read_labels(tmp_path / "predictions/labels/01.png", Labelling(NAMES), (40, 56))
    lines = [json.loads(line) for line in Path("shares.jsonl").read_text().splitlines()]
    share = lines[1]["shares"].get("green", 0)
    assert share == pytest.approx(float(np.mean(labels == 1)), abs=1e-6)
    assert sum(lines[1]["shares"].values()) == pytest.approx(1, abs=1e-5)
    assert Image.open("predictions/01.png").width > 2 * 56
    assert outcome(capsys, "predict", run, shown, "--embeddings", "a.npy")[0] == 2


def test_info_of_a_config(capsys):
    status, printed = outcome(capsys, "info", "segment_demo")
    assert status == 0
    assert "UPerNet" in printed.out
    assert "auxiliary head" in printed.out


def test_a_file_without_segmenter(pretrained, config, capsys):
    status, printed = outcome(capsys, "test", config, pretrained)
    assert status == 2
    assert "holds no segmenter; fine-tune it first" in printed.err


def test_a_segmenter_of_other_classes(run, images, config, tmp_path, capsys):
    shutil.copytree(images, tmp_path / "others")
    (tmp_path / "others/classes.txt").write_text("red\ngreen\nblue\nblack\n")
    status, printed = outcome(capsys, "test", config, run, "--data.root", tmp_path / "others")
    assert status == 2
    assert "only in the file: yellow; only in the images: black" in printed.err


def test_weights_without_pyramid(images, pretrained, tmp_path):
    weights = files.read(pretrained).without("pyramid")
    config = weights.config | {"model": weights.config["model"] | {"pyramid": None}}
    files.save(tmp_path / "backbone.safetensors", weights.tensors, config)
    given = recipe(images, tmp_path / "run", {"max_steps": 1}, init=tmp_path / "backbone.safetensors")
    with pytest.raises(UserError, match="holds no pyramid"):
        segment(given)
    segment(replace(given, init_pyramid=False))


def test_weights_that_lack_a_part_of_the_pyramid(images, pretrained, tmp_path):
    weights = files.read(pretrained)
    del weights.tensors["pyramid.out4.mlp.fc1.weight"]
    files.save(tmp_path / "odd.safetensors", weights.tensors, weights.config)
    with pytest.raises(UserError, match=r"1 tensors do not fit.*out4.mlp.fc1.weight is missing there"):
        segment(recipe(images, tmp_path / "run", init=tmp_path / "odd.safetensors"))


def test_bad_labels_stop_a_run_unless_they_are_left_out(images, tmp_path):
    shutil.copytree(images, tmp_path / "images")
    for name in ("03", "04"):
        (tmp_path / f"images/labels/train/{name}.png").write_bytes(b"no labels")
    given = recipe(tmp_path / "images", tmp_path / "run", {"picture_every": 0})
    with pytest.raises(UserError, match=r"labels/train/0\d.png.*--data.skip-bad"):
        segment(given)
    segment(replace(given, data=replace(given.data, skip_bad=True, max_bad_share=1.0)))
    assert len((tmp_path / "run/bad_images.jsonl").read_text().splitlines()) == 2


def renumbered(images, folder, split, number):
    """A copy in which the label pictures of a split have 0 and another number, by columns."""
    shutil.copytree(images, folder)
    for path in (folder / "labels" / split).iterdir():
        Image.fromarray(np.resize([0, number], (40, 56)).astype(np.uint8)).save(path)
    return folder


def test_masks_of_0_and_255_train_with_the_option_that_the_refusal_names(images, tmp_path, capsys):
    root = renumbered(images, tmp_path / "images", "train", 255)
    (root / "classes.txt").write_text("background\nbuilding\n")
    shutil.rmtree(root / "images/val")
    given = recipe(root, tmp_path / "run", {"iterations": 3, "batch_size": 2, "picture_every": 0})
    with pytest.raises(
        UserError, match=r"all labels are of one class, 'background'.*--data\.values 0 255, in the order"
    ):
        segment(given)
    assert not (tmp_path / "run").exists()
    segment(replace(given, data=replace(given.data, values=(0, 255))))
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert [row["num_pixels"] for row in report["classes"]] == [1120, 1120] and report["warnings"] == []


def test_validation_labels_of_one_class_are_no_measure(images, tmp_path, capsys):
    root = renumbered(images, tmp_path / "images", "val", 0)
    given = recipe(root, tmp_path / "run", {"iterations": 3, "batch_size": 2, "picture_every": 0})
    segment(replace(given, eval_every=2))
    printed = capsys.readouterr().out
    assert "warning: val: all labels are of one class, 'red', in the 3 label pictures" in printed
    assert "is not known to be best" in printed and "mIoU" not in printed
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert (report["miou"], report["pixel_accuracy"]) == (None, None)
    assert report["warnings"][0].startswith("val: all labels are of one class")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"loop": {"batch_size": 6, "device_batch": 4}}, "--device-batch"),
        ({"loop": {"iterations": 2}}, "warm-up takes 2 steps"),
        ({"data": {"root": Path("nowhere")}}, "nowhere"),
        ({"data": {"crop": (40, 40)}}, "multiple of 32"),
        ({"init": Path("nowhere.safetensors")}, r"nowhere\.safetensors"),
        (
            {"segmenter": {"norm": "batch"}, "loop": {"device_batch": 1}},
            "batch norm cannot train on one image",
        ),
    ],
)
def test_mistakes(images, tmp_path, fields, words):
    given = recipe(images, tmp_path / "run", fields.get("loop"))
    data, segmenter = (
        replace(getattr(given, name), **fields.get(name, {})) for name in ("data", "segmenter")
    )
    with pytest.raises(UserError, match=words) as error:
        segment(replace(given, data=data, segmenter=segmenter, init=fields.get("init")))
    assert "\n" not in str(error.value)
