"""Runs on tar shards: what is measured and learned is what folders give."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from itpn import cli
from itpn.data.images import find_images
from itpn.data.loader import DataConfig
from itpn.data.sample_cutouts import load_cutouts
from itpn.engine.loop import LoopConfig
from itpn.engine.schedule import ScheduleConfig
from itpn.evaluate.gather import Pass
from itpn.evaluate.knn import KnnConfig, knn
from itpn.recipes.pretrain import Pretrain
from itpn.show.curves import read_metrics
from itpn.tasks.pretrain import pretrain
from itpn.weights import files
from tests.toys import toy_objective


def features(images: Tensor) -> Tensor:
    return adaptive_avg_pool2d(images.double(), 8).flatten(1) - 127


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Some of the bundled sample as folder and as shards."""
    root = tmp_path_factory.mktemp("sample")
    for split in ("train", "val"):
        for cutout in load_cutouts(split)[::6]:
            path = root / "folder" / split / str(cutout.label) / f"{cutout.name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            cutout.image.save(path)
    assert cli.main(["shard", str(root / "folder"), str(root / "shards"), "--per-shard", "10"]) == 0
    return root / "folder", root / "shards"


def test_knn_on_shards_equals_knn_on_folders(sample: tuple[Path, Path]) -> None:
    through = Pass(image_size=(32, 32), device=torch.device("cpu"), workers=0)
    folder, shards = (
        knn(features, find_images(root), find_images(root, "val"), KnnConfig(k=5), through) for root in sample
    )
    assert folder == shards and 0 < shards["knn_top5"] < 1


def test_pretraining_on_shards_and_exact_resume(sample: tuple[Path, Path], tmp_path: Path) -> None:
    toy = toy_objective({})
    loop = LoopConfig(
        epochs=1,
        batch_size=16,
        device="cpu",
        log_every=1,
        picture_every=1,
        max_steps=4,
        run_dir=tmp_path / "whole",
    )
    recipe = Pretrain(
        name="toy",
        model=toy.model.config,
        objective=toy.config,
        data=DataConfig(root=sample[1], workers=0),
        schedule=ScheduleConfig(),
        loop=loop,
        knn=KnnConfig(every=1, k=3),
    )
    whole = pretrain(recipe)
    for max_steps in (2, 4):
        parts = pretrain(replace(recipe, loop=replace(loop, max_steps=max_steps, run_dir=tmp_path / "parts")))
    metrics = [read_metrics(run / "metrics.jsonl") for run in (whole, parts)]
    assert [line["pixel"] for _, line in sorted(metrics[0].items()) if "pixel" in line] == [
        line["pixel"] for _, line in sorted(metrics[1].items()) if "pixel" in line
    ]
    assert metrics[0][0]["knn_top1"] == metrics[1][0]["knn_top1"]
    ours, theirs = files.read(parts).tensors, files.read(whole).tensors
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_reconstruct_takes_pictures_from_shards(
    sample: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "picture.png"
    given = [str(files.NANO), str(sample[1]), "--num", "2", "--device", "cpu", "--out", str(out)]
    assert cli.main(["reconstruct", *given]) == 0
    assert "2 images" in capsys.readouterr().out


@pytest.mark.parametrize("num", ["0", "-2"])
def test_reconstruct_takes_at_least_one_picture(num: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reconstruct", "run", "images", "--num", num]) == 2
    message = capsys.readouterr().err
    assert f"--num is {num}" in message and message.count("\n") == 1
