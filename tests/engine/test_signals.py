"""Ctrl-C and SIGTERM at every kind of moment: a message, a checkpoint, the exit status; nothing is lost."""

import re
import signal
from pathlib import Path

from tests.engine.processes import Ended, outcome, train

INT, TERM = int(signal.SIGINT), int(signal.SIGTERM)
RARELY = ("--checkpoint-minutes", 10)


def stopped_cleanly(ended: Ended, number: int, step: int) -> None:
    print(f"{ended.seconds_since_signal:.1f} s from {signal.Signals(number).name} to the exit at step {step}")
    assert f"{signal.Signals(number).name}: saving, then stopping ..." in ended.output
    assert f"stopped at step {step} of 60; the same command resumes from step {step}" in ended.output
    assert "Traceback" not in ended.output


def test_interrupted_again_and_again_equals_uninterrupted(images: Path, tmp_path: Path, whole: Path) -> None:
    run = tmp_path / "run"

    def train_until(*trap: object, workers: int = 1, fields: tuple[object, ...] = RARELY) -> Ended:
        return train(images, run, [(0, *trap)], *fields, "--data.workers", workers)

    starting = train_until("start", 2, "interrupt", INT)
    assert starting.status == 130 and starting.output.splitlines()[-1] == "itpn: interrupted"

    in_a_step = train_until("forward", 14, "interrupt", INT)  # the second micro-step of the seventh step
    assert in_a_step.status == 130, in_a_step.output
    stopped_cleanly(in_a_step, INT, 7)

    with_workers = train_until("step", 15, "interrupt_group", TERM, workers=2)
    assert with_workers.status == 143, with_workers.output
    stopped_cleanly(with_workers, TERM, 15)

    evaluating = train_until("knn", 1, "interrupt_group", TERM)
    assert evaluating.status == 143, evaluating.output
    stopped_cleanly(evaluating, TERM, 20)

    saving = train_until("save", 3, "interrupt", INT, fields=("--checkpoint-minutes", 0))
    assert saving.status == 130, saving.output
    stopped_cleanly(saving, INT, 21)

    weights = run / "checkpoints/00000021/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    finished = train(images, run)
    assert finished.status == 0, finished.output
    assert "00000021 is damaged (model.safetensors: its hash differs): going back to" in finished.output
    assert "step 20 of 60" in finished.output
    assert outcome(run) == outcome(whole)


def test_a_scheduler_may_end_a_start(images: Path, tmp_path: Path) -> None:
    """Nothing has to be saved yet, so the signal does what it does to any process."""
    ended = train(images, tmp_path / "run", [(0, "start", 2, "interrupt", TERM)])
    assert ended.status == -TERM and "Traceback" not in ended.output


def test_under_torchrun(images: Path, tmp_path: Path, whole_on_2_ranks: Path) -> None:
    """torchrun passes on what it receives; its own exit status is its own."""
    run = tmp_path / "run"
    for trap, number, step in [
        ((0, "step", 6, "interrupt_torchrun", INT), INT, 6),
        ((0, "knn", 1, "interrupt_everything", TERM), TERM, 20),
        ((1, "step", 25, "interrupt", TERM), TERM, 25),  # one rank alone: all of them stop
    ]:
        ended = train(images, run, [trap], *RARELY, "--data.workers", 1, ranks=2)
        assert ended.status != 0
        print(f"{ended.seconds_since_signal:.1f} s from {signal.Signals(number).name} to torchrun's exit")
        found = re.search(r"stopped at step (\d+) of 60", ended.output)
        assert found, ended.output
        stopped = int(found[1])
        # torchrun takes a moment to pass a signal on, in which steps may end; but no evaluation.
        assert stopped == step or (trap[2] == "interrupt_torchrun" and step < stopped <= 20)
        assert (run / "checkpoints/last").read_text() == f"{stopped:08d}"
    assert train(images, run, ranks=2).status == 0
    assert outcome(run) == outcome(whole_on_2_ranks)
