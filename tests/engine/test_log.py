import json
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from itpn.engine.distributed import World
from itpn.engine.log import Log, forget_after
from itpn.engine.run import Run


def written(run: Run, start: int, end: int, offset: float = 0.0) -> None:
    with Log(run, start, num_steps=6, steps_per_epoch=2, batch_size=8, log_every=2) as log:
        for step in range(start + 1, end + 1):
            log.step(step, {"loss": step + offset}, waited=0.0)


def test_the_first_the_last_and_every_nth_step(tmp_path: Path) -> None:
    run = Run(tmp_path, {}, World(0, 1, torch.device("cpu")))
    written(run, 0, 6)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["epoch"], line["loss"]) for line in lines] == [
        (1, 0.5, 1.0), (2, 1.0, 2.0), (4, 2.0, 4.0), (6, 3.0, 6.0)
    ]  # fmt: skip
    assert all(line["images_per_s"] > 0 and line["data_wait"] == 0 for line in lines)


def test_going_back_forgets_later_steps(tmp_path: Path) -> None:
    run = Run(tmp_path, {}, World(0, 1, torch.device("cpu")))
    written(run, 0, 5)
    written(run, 3, 6, offset=0.5)
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


def test_a_line_cut_short_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    forget_after(path, 5)
    assert path.read_text() == '{"step": 1}\n'


def test_plain_lines_without_a_terminal(tmp_path: Path, capsys) -> None:
    written(Run(tmp_path, {}, World(0, 1, torch.device("cpu"))), 0, 6)
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[-1].startswith("step 6/6  epoch 3.0  loss 6  ")
        and "images/s" in lines[-1]
        and "ETA" in lines[-1]
    )
