"""What fine-tuning keeps of a run, on one rank and from shards."""

import pytest
import torch
from torch import nn

import itpn
from itpn.engine.distributed import World
from itpn.show.curves import read_metrics
from itpn.tasks.finetuning import Kept
from itpn.weights import files
from tests.data.segmented import write_masks
from tests.detecting import write_splits
from tests.launch import torchrun
from tests.sharded_finetuning import TASKS, recipes
from tests.test_classify_run import write_images
from tests.test_detect_run import saved
from tests.toys import toy_model


def kept(folder, *scores):
    """The epoch of the best of models that were measured one after the other; None: nothing was measured."""
    keeper = Kept(folder, "score", len(scores), World(0, 1, torch.device("cpu")))
    for epoch, score in enumerate(scores, 1):
        numbers = {} if score is None else {"score": score}
        keeper.offer(nn.Linear(1, 1), {}, float(epoch), epoch, {"loss": 1.0, **numbers})
    return keeper.best["epoch"]


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([0.2, 0.4, 0.3], 2),
        ([0.2, 0.2], 1),
        ([None, None, None], 3),
        ([None, 0.0, None], 2),
        ([0.5, None, 0.6], 3),
    ],
)
def test_what_was_not_measured_is_never_better(tmp_path, scores, best):
    assert kept(tmp_path, *scores) == best


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """Every task fine-tuned on two ranks under FSDP, stopped and resumed: data and runs."""
    directory = tmp_path_factory.mktemp("sharded")
    write_images(directory / "classify", "train", ("ant", "bee"), 8)
    write_images(directory / "classify", "val", ("ant", "bee"), 3, seed=1)
    write_splits(directory / "detect")
    write_masks(directory / "segment", {"train": 10, "val": 3})
    saved(directory / "pretrained.safetensors", toy_model(layer_scale=0.1))
    torchrun("tests.sharded_finetuning", directory, directory=directory)
    return directory


@pytest.mark.parametrize("name", TASKS)
def test_shards_learn_and_leave_what_one_rank_does(sharded, name):
    one = TASKS[name](recipes(sharded, "one")[name])
    two = sharded / "two" / name
    ours, theirs = (read_metrics(run / "metrics.jsonl") for run in (one, two))
    assert ours.keys() == theirs.keys()
    for step in ours:
        assert theirs[step]["loss"] == pytest.approx(ours[step]["loss"], abs=2e-5)
    for kept in ("best.safetensors", "last.safetensors"):
        first, second = files.read(one / kept), files.read(two / kept)
        assert first.config["measured"]["epoch"] == second.config["measured"]["epoch"]
        assert first.tensors.keys() == second.tensors.keys()
        for key, tensor in first.tensors.items():
            torch.testing.assert_close(second.tensors[key], tensor, atol=1e-4, rtol=1e-3)
    assert isinstance(itpn.load(two), nn.Module)
