"""A whole pre-training at toy size: what it leaves behind, and what can be done with it afterwards."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from itpn import cli
from itpn.data.loader import DataConfig
from itpn.engine.loop import LoopConfig
from itpn.engine.schedule import ScheduleConfig, lr_at
from itpn.errors import UserError
from itpn.evaluate.knn import KnnConfig
from itpn.nn.pyramid import Model, ModelConfig
from itpn.recipes.pretrain import Pretrain, demo
from itpn.show.curves import read_metrics
from itpn.tasks.common import _completed, config_of
from itpn.tasks.pretrain import build, pretrain
from itpn.weights import files
from tests.toys import toy_objective


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


def recipe(root, run_dir, **fields):
    toy = toy_objective({})
    given = Pretrain(
        name="toy",
        model=toy.model.config,
        objective=toy.config,
        data=DataConfig(root=root, workers=0),
        schedule=ScheduleConfig(),
        loop=LoopConfig(epochs=2, batch_size=8, device="cpu", log_every=1, picture_every=1, run_dir=run_dir),
        knn=KnnConfig(every=1, k=3),
    )
    return replace(given, **fields)


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    return pretrain(recipe(images, tmp_path_factory.mktemp("runs") / "run"))


def test_a_run_leaves_what_it_promises(run):
    journals = "metrics.jsonl speed.jsonl"
    promised = f"config.json run.json {journals} tensorboard pictures checkpoints pretrained.safetensors lock"
    assert {path.name for path in run.iterdir()} == set(promised.split())
    pictures = sorted(path.name for path in (run / "pictures").iterdir())
    assert pictures == ["curves.png", *(f"reconstruction-000{epoch}.png" for epoch in range(3))]
    metrics = read_metrics(run / "metrics.jsonl")
    assert [step for step, line in metrics.items() if "knn_top1" in line] == [0, 2, 4]
    parts = {"pixel", "feature", "feature_c4", "variance_c8", "position_share_c16", "lr", "grad_norm"}
    assert all(parts <= metrics[step].keys() for step in (1, 2, 3, 4))
    assert json.loads((run / "config.json").read_text())["objective"]["features"]["weight"] == 0.3


def test_pretrained_weights_are_the_students_backbone_and_pyramid(run):
    weights = files.read(run / "pretrained.safetensors")
    model = Model(weights.part("model", ModelConfig))
    model.load_state_dict(weights.tensors)
    trained = files.read(run)  # its last checkpoint
    assert trained.parts == {"backbone", "pyramid", "embed", "mask_token", "decoder", "head", "features"}
    assert all(torch.equal(value, trained.tensors[name]) for name, value in weights.tensors.items())


def test_a_finished_run_is_left_alone(run, images, capsys):
    before = (run / "metrics.jsonl").read_bytes()
    assert pretrain(recipe(images, run)) == run
    assert "is finished" in capsys.readouterr().out
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_finished_run_goes_on_to_more_epochs(run, images, tmp_path):
    """With the learning rates that a run of so many epochs has from there on."""
    shutil.copytree(run, longer := tmp_path / "run")
    given = recipe(images, longer)
    loop = replace(given.loop, epochs=4)
    with pytest.raises(UserError, match=r"is finished: --force extends it"):
        pretrain(replace(given, loop=loop))
    assert pretrain(replace(given, loop=replace(loop, force=True))) == longer
    metrics, peak = read_metrics(longer / "metrics.jsonl"), given.optim.peak_lr(8)
    rates = [metrics[step]["lr"] for step in range(5, 9)]
    schedule = {"peak": peak, "epochs": 4, "steps_per_epoch": 2}
    assert rates == [lr_at(step, given.schedule, **schedule) for step in range(4, 8)]
    assert [step for step, line in metrics.items() if "knn_top1" in line] == [0, 2, 4, 6, 8]
    assert json.loads((longer / "run.json").read_text())["finished_step"] == 8
    assert pretrain(replace(given, loop=loop)) == longer  # which is finished now


def test_a_new_run_starts_from_a_finished_one(run, images, tmp_path, capsys):
    pretrain(recipe(images, tmp_path / "new", init=run))
    assert f"from {run}" in capsys.readouterr().out


def test_a_run_that_began_before_a_field_existed_is_no_other_run(run, images, capsys):
    path, given = run / "config.json", recipe(images, run)
    config = json.loads(path.read_text())
    del config["optim"]["weight_decay_rule"], config["model"]["backbone"]["relative_resampling"]
    path.write_text(json.dumps(config))
    pretrain(given)
    assert "changes" not in capsys.readouterr().out
    config["optim"]["weight_decay"] = 0.1
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"began with another optim\.weight_decay: "):
        pretrain(given)
    path.write_text(json.dumps(config_of(given)))


def test_interrupted_and_resumed_equals_uninterrupted(run, images, tmp_path):
    given = recipe(images, tmp_path / "run")
    pretrain(replace(given, loop=replace(given.loop, max_steps=3)))
    assert not (tmp_path / "run/pretrained.safetensors").exists()
    pretrain(given)
    ours, theirs = files.read(tmp_path / "run"), files.read(run)
    assert all(torch.equal(ours.tensors[name], value) for name, value in theirs.tensors.items())


def test_init_goes_on_from_a_run_and_from_its_weights(run, images, tmp_path, capsys):
    for number, source in enumerate((run, run / "pretrained.safetensors")):
        given = recipe(images, tmp_path / str(number), init=source)
        # After one step at a learning rate of 0 the weights are still those that were loaded.
        pretrain(replace(given, loop=replace(given.loop, max_steps=1, picture_every=0), knn=KnnConfig()))
        said = capsys.readouterr().out
        assert ("anew" in said) == (number == 1)
        loaded, source_weights = files.read(tmp_path / str(number)), files.read(source)
        for name, value in source_weights.tensors.items():
            assert "teacher" in name or "averages" in name or torch.equal(loaded.tensors[name], value)


def test_the_start_depends_on_the_seed_alone(images, tmp_path):
    given = recipe(images, tmp_path)
    torch.manual_seed(99)
    first, second = build(given), build(given)
    other = build(replace(given, loop=replace(given.loop, seed=1)))
    assert torch.equal(first.head.weight, second.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)


def test_labels_are_checked_before_the_first_step(images, tmp_path):
    (tmp_path / "flat").mkdir()
    shutil.copy(images / "train/red/0.png", tmp_path / "flat")
    with pytest.raises(UserError, match="val"):
        pretrain(recipe(images, tmp_path / "run", knn=KnnConfig(every=1, root=tmp_path / "flat")))


def test_reconstruct_writes_a_picture(run, images, tmp_path, capsys):
    out = tmp_path / "new/picture.png"
    one = str(images / "val/red/0.png")
    assert cli.main(["reconstruct", str(run), str(images), one, "--num", "2", "--out", str(out)]) == 0
    assert "3 images, 4 of 16 units visible" in capsys.readouterr().out
    assert np.asarray(Image.open(out)).std() > 10
    assert cli.main(["reconstruct", str(run), one, "--mask-ratio", "0.5", "--out", str(out)]) == 0
    assert "8 of 16 units" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("RUN/pretrained.safetensors IMAGE", "no decoder"),
        ("RUN/none.safetensors IMAGE", "no file"),
        ("RUN/pictures IMAGE", "no run directory"),
        ("RUN RUN/config.json", "config.json"),
        ("RUN none.png", "none.png"),
        ("RUN IMAGE --mask-ratio 2", "mask_ratio"),
        ("RUN IMAGE --out RUN/config.json/a.png", "cannot write"),
        ("RUN", "name one or more images"),
        ("RUN IMAGE --out RUN/a.xyz", "cannot write"),
    ],
)
def test_reconstruct_names_what_is_wrong(run, images, capsys, arguments, words):
    given = arguments.replace("RUN", str(run)).replace("IMAGE", str(images / "val/red/0.png")).split()
    assert cli.main(["reconstruct", *given]) == 2
    complaint = capsys.readouterr().err
    assert words in complaint
    assert complaint.count("\n") == 1


def test_demo_from_nothing_to_pictures(tmp_path, capsys):
    arguments = ["demo", "--directory", str(tmp_path / "demo"), "--epochs", "1"]
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    assert "k-NN top-1" in said
    assert "Look first at" in said
    assert (tmp_path / "demo/run/pictures/reconstruction-0001.png").is_file()
    assert cli.main(arguments) == 0
    assert "is finished" in capsys.readouterr().out


def test_a_ratio_that_used_to_be_written_out_is_no_change():
    config = config_of(demo())
    config["model"]["backbone"]["mlp_ratio"] = 4.0
    assert _completed(Pretrain, config) == config_of(demo())
    config["model"]["backbone"]["mlp_ratio"] = 3.0
    assert _completed(Pretrain, config)["model"]["backbone"]["mlp_ratio"] == 3.0
