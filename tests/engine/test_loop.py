import json
import os
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from itpn.engine.distributed import World, choose_device
from itpn.engine.loop import LoopConfig
from itpn.engine.schedule import lr_at
from itpn.errors import UserError
from tests.engine.toy import OPTIM, SCHEDULE, STEPS_PER_EPOCH, Toy, toy_batches, toy_train


def metrics(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def last_files(directory: Path) -> list[bytes]:
    last = directory / "checkpoints" / (directory / "checkpoints" / "last").read_text()
    return [path.read_bytes() for path in sorted(last.iterdir())]


def same(one: Path, other: Path) -> bool:
    lines, others = ((directory / "metrics.jsonl").read_bytes() for directory in (one, other))
    return lines == others and last_files(one) == last_files(other)


def test_the_loop_is_a_plain_loop(tmp_path: Path) -> None:
    """Losses and weights as from the same training written out by hand, one whole batch a step."""
    trained = toy_train(tmp_path, toy=Toy(dropout=0.0), clip_grad=1.0)
    toy = Toy(dropout=0.0)
    decayed = torch.optim.AdamW([toy.head.weight], betas=OPTIM.betas, weight_decay=OPTIM.weight_decay)
    plain = torch.optim.AdamW([toy.head.bias, *toy.norm.parameters()], betas=OPTIM.betas, weight_decay=0.0)
    stream = toy_batches(World(0, 1, torch.device("cpu")), 12)(0, 12)
    lines = metrics(tmp_path)
    for step in range(8):
        toy.begin_step(step, 8)
        loss = toy(next(stream))["loss"]
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(toy.parameters(), 1.0)
        for optimizer in (decayed, plain):
            lr = lr_at(step, SCHEDULE, peak=0.01, epochs=2, steps_per_epoch=STEPS_PER_EPOCH)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
        toy.end_step(step, 8)
        assert lines[step]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert lines[step]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert (lines[step]["lr"], lines[step]["step"]) == (lr, step + 1)
    for name, tensor in toy.state_dict().items():
        assert torch.allclose(tensor, trained.state_dict()[name], atol=1e-5), name


def test_accumulation_changes_nothing(tmp_path: Path) -> None:
    toys = [toy_train(tmp_path / str(b), toy=Toy(dropout=0.0), device_batch=b) for b in (12, 3)]
    losses = [[line["loss"] for line in metrics(tmp_path / str(size))] for size in (12, 3)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert torch.allclose(toys[0].head.weight, toys[1].head.weight, atol=1e-5)


@pytest.mark.parametrize("stop", [3, 4, 5])
def test_resuming_is_exact(tmp_path: Path, stop: int) -> None:
    toy_train(tmp_path / "whole")
    toy_train(tmp_path / "parts", max_steps=stop)
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")[:stop]
    toy_train(tmp_path / "parts")
    assert same(tmp_path / "whole", tmp_path / "parts")


def test_resuming_after_a_crash_between_checkpoints(tmp_path: Path) -> None:
    class Crashing(Toy):
        def end_step(self, step: int, num_steps: int) -> None:
            if step == 6:
                raise RuntimeError("power cut")
            super().end_step(step, num_steps)

    toy_train(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="power cut"):
        toy_train(tmp_path / "parts", toy=Crashing())
    toy_train(tmp_path / "parts")
    assert same(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_discards_the_step_and_saves(tmp_path: Path, capsys, number: int, status: int) -> None:
    class Interrupted(Toy):
        def begin_step(self, step: int, num_steps: int) -> None:
            super().begin_step(step, num_steps)
            if step == 1:
                os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        toy_train(tmp_path / "parts", toy=Interrupted())
    assert stopped.value.code == status
    assert "stopped at step 1 of 8; the same command resumes from step 1" in capsys.readouterr().out
    assert signal.getsignal(number) == before
    assert (tmp_path / "parts/checkpoints/last").read_text() == "00000001"
    toy_train(tmp_path / "whole")
    toy_train(tmp_path / "parts")
    assert same(tmp_path / "whole", tmp_path / "parts")


def test_a_loss_that_is_not_finite_stops_before_it_does_harm(tmp_path: Path) -> None:
    class Diverging(Toy):
        def forward(self, batch):
            outputs = super().forward(batch)
            return {**outputs, "loss": outputs["loss"] * (float("nan") if self.share >= 5 / 8 else 1)}

    toy = Diverging()
    with pytest.raises(UserError, match="the loss is nan at step 6 on rank 0"):
        toy_train(tmp_path / "a", toy=toy)
    assert (tmp_path / "a/checkpoints/last").read_text() == "00000004"
    toy_train(tmp_path / "b", max_steps=5)
    assert len(metrics(tmp_path / "a")) == 5
    assert all(p.isfinite().all() for p in toy.parameters())


def test_a_gradient_that_is_not_finite_stops(tmp_path: Path) -> None:
    class Diverging(Toy):
        def forward(self, batch):
            outputs = super().forward(batch)
            outputs["loss"].register_hook(lambda gradient: gradient * float("inf"))
            return outputs

    with pytest.raises(UserError, match=r"the norm of the gradient is (inf|nan) at step 1"):
        toy_train(tmp_path, toy=Diverging())


def test_evaluations_at_the_start_and_after_epochs_are_logged_once(tmp_path: Path) -> None:
    def evaluate(epoch: float, step: int) -> dict[str, float | Image.Image]:
        toy.eval()
        return {"score": epoch + step / 100, "view": Image.new("RGB", (4, 3), (10 * int(epoch), 0, 0))}

    toy = Toy()
    toy_train(tmp_path, toy=toy, interludes=[evaluate], max_steps=6)
    assert toy.training
    toy_train(tmp_path, interludes=[evaluate])
    assert [line["score"] for line in metrics(tmp_path) if "score" in line] == [0, 1.04, 2.08]
    views = sorted((tmp_path / "pictures").iterdir())
    assert [path.name for path in views] == ["view-0000.png", "view-0001.png", "view-0002.png"]
    assert Image.open(views[2]).getpixel((0, 0)) == (20, 0, 0)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in board.Images("view")] == [0, 4, 8]


def test_a_run_of_iterations_is_counted_in_steps(tmp_path: Path) -> None:
    def evaluate(epoch: float, step: int) -> dict[str, float | Image.Image]:
        return {"score": epoch, "view": Image.new("RGB", (4, 3))}

    fields = {"epochs": None, "iterations": 7, "checkpoint_every": 3, "keep_last": 9}
    toy_train(tmp_path, interludes=[evaluate], every=2, max_steps=5, **fields)
    toy_train(tmp_path, interludes=[evaluate], every=2, **fields)
    scores = [(line["step"], line["score"]) for line in metrics(tmp_path) if "score" in line]
    assert scores == [(step, step / 4) for step in (0, 2, 4, 6, 7)]
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == [f"view-000{step}.png" for step in (0, 2, 4, 6, 7)]
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.is_dir())
    assert kept == [2, 3, 4, 5, 6, 7]  # those of evaluations, of checkpoint_every, and where it stopped


@pytest.mark.parametrize("fields", [{"epochs": None}, {"iterations": 8}, {"epochs": None, "iterations": 0}])
def test_either_epochs_or_iterations(tmp_path: Path, fields: dict[str, int | None]) -> None:
    with pytest.raises(UserError, match="--iterations"):
        toy_train(tmp_path, **fields)


def test_a_start_that_left_no_checkpoint_is_forgotten(tmp_path: Path) -> None:
    def crash(epoch: float, step: int) -> dict[str, float]:
        if epoch == 1:
            raise RuntimeError
        return {"score": float(epoch)}

    with pytest.raises(RuntimeError):
        toy_train(tmp_path, interludes=[crash])
    toy_train(tmp_path, interludes=[lambda epoch, step: {"score": float(epoch)}])
    assert [line["score"] for line in metrics(tmp_path) if "score" in line] == [0, 1, 2]


def test_a_finished_training_does_nothing_more(tmp_path: Path) -> None:
    toy_train(tmp_path)
    before = last_files(tmp_path), (tmp_path / "metrics.jsonl").read_bytes()
    toy_train(tmp_path)
    assert before == (last_files(tmp_path), (tmp_path / "metrics.jsonl").read_bytes())


def test_another_model_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    toy_train(tmp_path, max_steps=2)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"another model.*head\.weight is \[5, 4\] there, \[6, 4\] here"):
        toy_train(tmp_path, toy=Toy(width=6))
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_checkpoints_by_time(tmp_path: Path) -> None:
    toy_train(tmp_path, checkpoint_every=None, checkpoint_minutes=0.0, keep_last=3)
    assert sorted(path.name[-1] for path in (tmp_path / "checkpoints").glob("0*")) == ["6", "7", "8"]


def test_every_nth_epoch_is_kept(tmp_path: Path) -> None:
    toy_train(tmp_path, epochs=5, checkpoint_every=1, keep_last=1, keep_every=2)
    steps = sorted(int(path.name) for path in (tmp_path / "checkpoints").glob("0*"))
    assert steps == [8, 16, 20]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_stays_near(tmp_path: Path, precision: str) -> None:
    for name in ("fp32", precision):
        toy_train(tmp_path / name, toy=Toy(dropout=0.0), precision=name)
    losses = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("fp32", precision)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_the_scaler_is_resumed(tmp_path: Path) -> None:
    toy_train(tmp_path / "whole", precision="fp16")
    toy_train(tmp_path / "parts", precision="fp16", max_steps=3)
    toy_train(tmp_path / "parts", precision="fp16")
    assert same(tmp_path / "whole", tmp_path / "parts")


def test_compile_asks_each_block(tmp_path: Path) -> None:
    class Blocks(Toy):
        def compile_blocks(self):
            return [self.norm]

    toy, asked = Blocks(), []
    toy.norm.compile = lambda: asked.append("norm")
    toy_train(tmp_path, toy=toy, compile=True, max_steps=1)
    assert asked == ["norm"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device() -> None:
    with pytest.raises(UserError, match="--device cuda: PyTorch finds no CUDA device"):
        choose_device("cuda")


@pytest.mark.parametrize(
    "field", ["epochs", "batch_size", "device_batch", "log_every", "keep_last", "max_steps"]
)
def test_counts_are_at_least_1(field: str) -> None:
    with pytest.raises(UserError, match=f"--{field.replace('_', '-')} must be at least 1, not 0"):
        LoopConfig(**{"epochs": 1, "batch_size": 1, field: 0})
