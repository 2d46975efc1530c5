"""Kill -9 of real processes, and the same command again: nothing is lost.

The moments are drawn from a seed that is printed; KILL_SEED=n repeats one.
"""

import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch

from itpn.engine import checkpoint
from itpn.engine.optim import AdamWConfig, adamw
from tests.engine.processes import outcome, train

SEED = int(os.environ.get("KILL_SEED", random.SystemRandom().randrange(1_000_000)))
EVERY_STEP = ("--checkpoint-minutes", 0)
EVERY_EPOCH = ("--checkpoint-every", 1)


def killed(source: random.Random, kind: str, images: Path, run: Path, ranks: int) -> None:
    """An attempt that ends at a moment of this kind: while it starts, at a step, in a save, at some time."""
    last = run / "checkpoints" / "last"
    step = int(last.read_text()) if last.is_file() else 0
    match kind:
        case "start":
            trap, fields = (0, "start", source.randint(1, 9), "kill_all", 0), EVERY_STEP
        case "step":
            trap, fields = (0, "step", step + source.randint(1, 7), "kill_all", 0), EVERY_EPOCH
        case "save":
            trap, fields = (0, "save", source.randint(1, 36), "kill_all", 0), EVERY_STEP
        case _:
            trap, fields = (0, "step", step + 1, "kill_all", source.uniform(0, 0.1)), EVERY_STEP
    workers = source.choice([0, 1, 2])
    print(f"killed at {trap}, having {step} steps, with {fields} and {workers} workers")
    ended = train(images, run, [trap], *fields, "--data.workers", workers, ranks=ranks)
    assert ended.status == -signal.SIGKILL, ended.output


@pytest.mark.parametrize(
    ("ranks", "kinds"),
    [(1, ["start", "step", "step", "save", "save", "save", "time", "time"]), (2, ["step", "save", "time"])],
)
def test_killed_and_resumed_equals_uninterrupted(
    images: Path, tmp_path: Path, request: pytest.FixtureRequest, ranks: int, kinds: list[str]
) -> None:
    source, run = random.Random(SEED), tmp_path / "run"
    print(f"KILL_SEED={SEED}")
    for kind in source.sample(kinds, len(kinds)):
        killed(source, kind, images, run, ranks)
    ended = train(images, run, [], *EVERY_STEP, ranks=ranks)
    assert ended.status == 0, ended.output
    uninterrupted = request.getfixturevalue("whole" if ranks == 1 else "whole_on_2_ranks")
    assert outcome(run) == outcome(uninterrupted)


def test_killed_while_it_finishes(images: Path, tmp_path: Path, whole: Path) -> None:
    """After the twelve operations of its last save, while it marks the run as finished."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "run.json").unlink()
    (run / "checkpoints/last").write_text("00000050")
    ended = train(images, run, [(0, "save", 13, "kill_all", 0)], "--checkpoint-minutes", 10)
    assert ended.status == -signal.SIGKILL and "finished" not in (run / "run.json").read_text()
    again = train(images, run)
    assert again.status == 0 and "step 60 of 60" in again.output, again.output
    assert outcome(run) == outcome(whole)


def test_torchrun_restarts_after_a_rank_was_killed(
    images: Path, tmp_path: Path, whole_on_2_ranks: Path
) -> None:
    trap = (1, "step", 13, "kill_rank", None)
    ended = train(images, tmp_path / "run", [trap], *EVERY_EPOCH, ranks=2, max_restarts=1)
    assert ended.status == 0, ended.output
    assert "step 10 of 60" in ended.output
    assert outcome(tmp_path / "run") == outcome(whole_on_2_ranks)


def test_killed_at_any_point_of_a_save_the_previous_one_loads(tmp_path: Path) -> None:
    points: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "passed", points.append)
        save(tmp_path / "counted", 1)
    assert len(points) == 9
    for number in range(1, len(points) + 1):
        root = tmp_path / str(number)
        save(root, 1)
        save_killed_at(root, 2, number)
        said: list[str] = []
        found = checkpoint.latest(root, said.append)
        assert not any("damaged" in line for line in said)
        assert found == (2 if points[:number].count("rename last") else 1), points[:number]
        assert weight(root, found) == found
        save(root, 2)  # as the resumed run does
        checkpoint.prune(root, 2, keep_last=2, keep_every=None)
        assert sorted(path.name for path in root.iterdir()) == ["00000001", "00000002", "last"]
        assert weight(root, checkpoint.latest(root, pytest.fail)) == 2


def save(root: Path, step: int) -> None:
    """A checkpoint whose only weight is the step."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, step)
    optimizer = adamw(model, AdamWConfig())
    tensors = checkpoint.model_tensors(model), checkpoint.optimizer_tensors(optimizer)
    checkpoint.save(root, step, *tensors, config={}, portable={}, progress={})


def weight(root: Path, step: int | None) -> float:
    model = torch.nn.Linear(1, 1, bias=False)
    checkpoint.load_model(root / f"{step:08d}", model)
    return model.weight.item()


def save_killed_at(root: Path, step: int, number: int) -> None:
    """In a process of its own, killed at the `number`-th fsync or rename."""
    child = os.fork()
    if child == 0:
        try:
            calls = iter(range(1, 100))
            checkpoint.passed = lambda point: next(calls) == number and os.kill(os.getpid(), signal.SIGKILL)
            save(root, step)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
