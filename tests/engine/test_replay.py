import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch

from itpn.engine import replay
from itpn.engine.distributed import World
from itpn.errors import UserError
from tests.engine.test_loop import metrics, same
from tests.engine.toy import STEPS_PER_EPOCH, Toy, toy_batches, toy_train


class Diverging(Toy):
    """Its loss is not finite at the steps named."""

    bad_steps: tuple[int, ...] = (5,)
    value = math.nan

    def begin_step(self, step: int, num_steps: int) -> None:
        super().begin_step(step, num_steps)
        self.factor = self.value if step in self.bad_steps else 1.0

    def forward(self, batch):
        outputs = super().forward(batch)
        return {**outputs, "loss": outputs["loss"] * self.factor}


def diverging(*steps: int, value: float = math.nan) -> Diverging:
    toy = Diverging()
    toy.bad_steps, toy.value = steps, value
    return toy


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_step_is_kept_and_can_be_taken_again(tmp_path: Path, value: float) -> None:
    toy = diverging(5, value=value)
    with pytest.raises(UserError, match=rf"the loss is {value} at step 6 on rank 0; `itpn replay .*replay`"):
        toy_train(tmp_path, toy=toy)
    kept = replay.read(tmp_path / "replay")
    assert (kept.step, kept.num_steps, kept.micro_batch) == (5, 2 * STEPS_PER_EPOCH, 6)
    assert json.loads((tmp_path / "replay/step.json").read_text())["precision"] == "float32"
    world = World(0, 1, torch.device("cpu"))
    batches = toy_batches(world, 12)
    now = replay.again(
        diverging(5, value=value), tmp_path / "replay", lambda rank: batches(5, 6), world.device
    )
    assert repr(now) == repr(kept)


def test_the_same_finite_values_come_out_again(tmp_path: Path) -> None:
    """The second micro-step goes wrong; the first one's loss, with its dropout, must be the same number."""

    class HalfBad(Diverging):
        calls = 0

        def forward(self, batch):
            self.calls += 1
            outputs = super().forward(batch)
            return outputs if self.calls % 2 == 0 else {**outputs, "loss": outputs["fit"].requires_grad_()}

    toy = diverging(5)
    toy.__class__ = HalfBad
    with pytest.raises(UserError, match="at step 6"):
        toy_train(tmp_path, toy=toy)
    kept = replay.read(tmp_path / "replay")
    assert math.isfinite(kept.losses[0][0]) and math.isnan(kept.losses[0][1])
    toy = diverging(5)
    toy.__class__ = HalfBad
    batches = toy_batches(World(0, 1, torch.device("cpu")), 12)
    now = replay.again(toy, tmp_path / "replay", lambda rank: batches(5, 6), torch.device("cpu"))
    assert repr(now.losses) == repr(kept.losses)


def test_bad_steps_in_a_row_are_left_out_up_to_a_number(tmp_path: Path) -> None:
    train = partial(toy_train, skip_bad_steps=2)
    train(tmp_path / "two", toy=diverging(1, 2, 5, 6))
    skipped = [line.get("skipped") for line in metrics(tmp_path / "two")]
    assert skipped == [None, 1, 2, None, None, 1, 2, None]
    assert metrics(tmp_path / "two")[1]["loss"] is None
    with pytest.raises(UserError, match="the loss is nan at step 4"):
        train(tmp_path / "three", toy=diverging(1, 2, 3))


def test_a_step_that_was_left_out_changes_no_weight(tmp_path: Path) -> None:
    toy_train(tmp_path / "before", max_steps=1)
    toy_train(tmp_path / "after", toy=diverging(1), max_steps=2, skip_bad_steps=1)
    files = [
        tmp_path / f"{name}/checkpoints/0000000{n}/model.safetensors"
        for name, n in (("before", 1), ("after", 2))
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_count_of_steps_left_out_survives_a_restart(tmp_path: Path) -> None:
    for name, stops in (("whole", [None]), ("parts", [3, None])):
        for stop in stops:
            toy_train(tmp_path / name, toy=diverging(2, 3), skip_bad_steps=2, max_steps=stop)
    assert same(tmp_path / "whole", tmp_path / "parts")
    with pytest.raises(UserError, match="at step 4"):
        toy_train(tmp_path / "x", toy=diverging(2, 3), skip_bad_steps=1, max_steps=3)
        toy_train(tmp_path / "x", toy=diverging(2, 3), skip_bad_steps=1)


def test_nothing_to_replay(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no step to replay"):
        replay.read(tmp_path)
