from pathlib import Path

import pytest

from tests.engine.ranks import taught
from tests.engine.sharded import pretrain
from tests.engine.test_fsdp import ONE
from tests.engine.test_loop import metrics, same
from tests.engine.toy import Toy, toy_train
from tests.launch import torchrun


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("two_ranks")
    torchrun("tests.engine.ranks", directory, "resume", "compare", "diverge", "distill", directory=directory)
    return directory


def test_resuming_on_three_ranks_is_exact(tmp_path: Path) -> None:
    """From three numbers on, the order in which they are added shows."""
    torchrun("tests.engine.ranks", tmp_path, "resume", ranks=3, directory=tmp_path)
    assert same(tmp_path / "whole", tmp_path / "parts")


def test_resuming_on_two_ranks_is_exact(two_ranks: Path) -> None:
    assert same(two_ranks / "whole", two_ranks / "parts")


def test_two_ranks_train_as_one_does(two_ranks: Path, tmp_path: Path) -> None:
    toy_train(tmp_path, toy=Toy(dropout=0.0), device_batch=3)
    one, two = metrics(tmp_path), metrics(two_ranks / "plain")
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], abs=1e-6)
    assert [line["grad_norm"] for line in two] == pytest.approx([line["grad_norm"] for line in one], rel=1e-4)


@pytest.mark.parametrize("device_batch", [2, 4])
def test_two_ranks_distil_as_one_does(two_ranks: Path, tmp_path: Path, device_batch: int) -> None:
    pretrain(tmp_path, ONE, taught(), device_batch=device_batch)
    runs = (tmp_path, two_ranks / "taught", two_ranks / "taught_fsdp")
    steps = [[line for line in metrics(run) if "loss" in line] for run in runs]
    losses = [[line["loss"] for line in lines] for lines in steps]
    assert len(losses[0]) == 12 and steps[0][-1]["fused"] < steps[0][0]["fused"]
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    assert losses[2] == pytest.approx(losses[0], abs=1e-5)


def test_resuming_distillation_on_two_ranks_is_exact(two_ranks: Path) -> None:
    assert same(two_ranks / "taught", two_ranks / "taught_parts")


def test_the_rank_that_diverged_is_named_on_all(two_ranks: Path) -> None:
    for rank in (0, 1):
        assert "the loss is nan at step 1 on rank 1" in (two_ranks / f"error{rank}").read_text()
