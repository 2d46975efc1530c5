import json
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from itpn.engine.distributed import World
from itpn.engine.log import Log
from itpn.engine.run import Run


def written(run: Run, start: int, end: int, offset: float = 0.0, state: dict | None = None) -> dict:
    """Logs steps; the state that a checkpoint at step 3 would keep."""
    log = Log(run, num_steps=6, steps_per_epoch=2, period=2, batch_size=8, log_every=2)
    if state:
        log.load_state_dict(state)
    log.begin(start)
    with log:
        for step in range(start + 1, end + 1):
            log.step(step, {"loss": step + offset}, waited=0.0)
            if step == 3:
                state = log.state_dict()
    return state


def test_the_first_the_last_and_every_nth_step(tmp_path: Path) -> None:
    run = Run(tmp_path, {}, World(0, 1, torch.device("cpu")))
    written(run, 0, 6)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["epoch"], line["loss"]) for line in lines] == [
        (1, 0.5, 1.0), (2, 1.0, 2.0), (4, 2.0, 4.0), (6, 3.0, 6.0)
    ]  # fmt: skip
    speed = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines()]
    assert [line["step"] for line in speed] == [1, 2, 4, 6]
    assert all(line["images_per_s"] > 0 and line["data_wait"] == 0 for line in speed)
    assert all(0 < line["memory_gb"] <= line["memory_peak_gb"] for line in speed)


def test_going_back_forgets_later_steps(tmp_path: Path) -> None:
    run = Run(tmp_path, {}, World(0, 1, torch.device("cpu")))
    state = written(run, 0, 5)
    written(run, 3, 6, offset=0.5, state=state)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 2.0), (4, 4.5), (6, 6.5)]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [
        (1, 1),
        (2, 2),
        (4, 4.5),
        (6, 6.5),
    ]


def test_numbers_that_json_does_not_know(tmp_path: Path) -> None:
    run = Run(tmp_path, {}, World(0, 1, torch.device("cpu")))
    log = Log(run, num_steps=6, steps_per_epoch=2, period=2, batch_size=8, log_every=2)
    log.begin(0)
    log.write(1, {"loss": float("nan"), "grad_norm": float("inf"), "lr": 0.5})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert line == '{"step": 1, "epoch": 0.5, "loss": null, "grad_norm": null, "lr": 0.5}\n'


def test_plain_lines_without_a_terminal(tmp_path: Path, capsys) -> None:
    written(Run(tmp_path, {}, World(0, 1, torch.device("cpu"))), 0, 6)
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[-1].startswith("step 6/6  epoch 3.0  loss 6  ")
        and "images/s" in lines[-1]
        and "ETA" in lines[-1]
    )
