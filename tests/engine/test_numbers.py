"""Numbers that go wrong in a real run and their replay; a directory that is another run's, or in use."""

import math
import re
from pathlib import Path

from itpn import cli
from itpn.engine import replay
from tests.engine.processes import TINY, losses, train
from tests.engine.test_loop import metrics, same
from tests.engine.toy import Toy, toy_train

HOSTILE = ("--optim.lr", "1e30", "--schedule.warmup-epochs", 0)


def test_a_diverging_run_stops_and_its_step_can_be_replayed(images: Path, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    ended = train(images, run, [], *HOSTILE, "--skip-bad-steps", 2)
    assert ended.status == 2 and "Traceback" not in ended.output, ended.output
    left_out = re.findall(
        r"^the (?:loss|norm).* is (?:nan|inf) at step (\d+) on .* left out", ended.output, re.M
    )
    complaint = ended.output.splitlines()[-1]
    last = int(
        re.search(r"^itpn: .* at step (\d+) on .*; `itpn replay .*/replay` repeats the step", complaint)[1]
    )
    assert [int(step) for step in left_out] == [last - 2, last - 1]
    lines = {line["step"]: line for line in metrics(run)}
    assert [lines[step]["skipped"] for step in (last - 2, last - 1)] == [1, 2] and last not in lines
    assert not all(map(math.isfinite, replay.read(run / "replay").losses[0]))
    assert cli.main(["replay", str(run)]) == 0
    said = capsys.readouterr().out
    kept = replay.read(run / "replay")
    assert all(said.count(repr(loss)) >= 2 for loss in kept.losses[0])  # then and now

    stopped = tmp_path / "stopped"  # the same, and killed between the two that are left out
    trap = (0, "step", last - 2, "kill_all", 0)
    fields = ("--checkpoint-minutes", 0, *HOSTILE, "--skip-bad-steps", 2)
    assert train(images, stopped, [trap], *fields).status == -9
    assert train(images, stopped, [], *fields).status == 2
    assert (stopped / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()


def test_an_fp16_overflow_is_not_a_bad_step(tmp_path: Path) -> None:
    """The scaler leaves the step out by itself, and scales less from then on."""

    class Overflowing(Toy):
        def forward(self, batch):
            outputs = super().forward(batch)
            factor = 1e38 if self.share == 0 else 1.0
            outputs["loss"].register_hook(lambda gradient: gradient * factor)
            return outputs

    toy_train(tmp_path, toy=Overflowing(), precision="fp16")
    lines = metrics(tmp_path)
    assert lines[0]["grad_norm"] is None and "skipped" not in lines[0] and len(lines) == 8
    assert not (tmp_path / "replay").exists()


def test_losses_that_stand_out_are_noted_also_across_a_restart(tmp_path: Path, capsys) -> None:
    class Jumping(Toy):
        def begin_step(self, step: int, num_steps: int) -> None:
            super().begin_step(step, num_steps)
            self.factor = 100.0 if step == 30 else 1.0

        def forward(self, batch):
            outputs = super().forward(batch)
            return {**outputs, "loss": outputs["loss"] * self.factor}

    for name, stops in (("whole", [None]), ("parts", [25, 33, None])):
        for stop in stops:
            toy_train(tmp_path / name, toy=Jumping(), epochs=10, max_steps=stop)
    assert same(tmp_path / "whole", tmp_path / "parts")
    (noted,) = [line for line in metrics(tmp_path / "whole") if "loss_outlier" in line]
    assert noted["step"] == 31 and noted["loss_outlier"] > 10 * noted["loss_median"]
    assert "step 31: the loss" in capsys.readouterr().out


def test_a_directory_of_another_run_or_in_use(images: Path, tmp_path: Path) -> None:
    """The second command starts while the first one waits inside its third step."""
    run = tmp_path / "run"
    given = ["train", *TINY, "--data.root", str(images), "--run-dir", str(run), "--max-steps", "3"]
    ended = train(
        images, run, [(0, "step", 2, "run_beside", given)], "--checkpoint-minutes", 0, "--max-steps", 3
    )
    assert ended.status == 0, ended.output
    assert re.search(
        r"^itpn: .*/run is in use by process \d+ on .*: wait until it ends, or", ended.output, re.M
    )
    assert "beside: 2" in ended.output

    other = train(images, run, [], "--optim.weight-decay", 0.1, "--max-steps", 4)
    assert other.status == 2
    assert "changes optim.weight_decay: 0.05 -> 0.1" in other.output
    assert re.search(r"^itpn: .* began with another optim\.weight_decay: .* --force", other.output, re.M)
    forced = train(images, run, [], "--optim.weight-decay", 0.1, "--max-steps", 4, "--force")
    assert forced.status == 0 and "changes optim.weight_decay" in forced.output, forced.output
    assert sorted(losses(run)) == [1, 2, 3, 4]
