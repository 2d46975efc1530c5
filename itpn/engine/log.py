"""What a run tells: metrics.jsonl, TensorBoard, and one live line (plain lines without a terminal)."""

import json
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from PIL.Image import Image
from rich.live import Live
from rich.text import Text

from itpn.engine.checkpoint import sync, write_text
from itpn.engine.run import Run

TIMING = ("images_per_s", "data_wait", "mfu")
"""The fields of a line in metrics.jsonl that differ between two runs of the same config."""

SECONDS_BETWEEN_PLAIN_LINES = 10.0


class Log:
    """Writes on rank 0, and keeps time: rates are over the last steps, without evaluation and checkpoints."""

    mfu_per_rate = 0.0
    """Model-FLOP utilisation per image/s; 0 where it is not known."""

    def __init__(
        self, run: Run, start_step: int, num_steps: int, steps_per_epoch: int, batch_size: int, log_every: int
    ) -> None:
        self.run, self.num_steps, self.steps_per_epoch = run, num_steps, steps_per_epoch
        self.batch_size, self.log_every = batch_size, log_every
        self.recent: deque[tuple[float, float]] = deque(
            maxlen=50
        )  # seconds of a step, of which waited for data
        self.stopwatch = time.perf_counter()
        self.printed = 0.0
        if run.world.is_main:
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import

            path = run.directory / "metrics.jsonl"
            forget_after(path, start_step or -1)  # a new start evaluates at step 0 again
            self.file = path.open("a")
            self.board = SummaryWriter(run.directory / "tensorboard", purge_step=start_step + 1)
            self.live = Live(console=run.console, auto_refresh=False)

    def __enter__(self) -> Self:
        if self.run.world.is_main and self.run.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self.run.world.is_main:
            self.live.stop()
            self.file.close()
            self.board.close()

    def step(self, step: int, values: Mapping[str, float], *, waited: float) -> None:
        """After the `step`-th step (counted from 1), which took the time since the call before."""
        now = time.perf_counter()
        self.recent.append((now - self.stopwatch, waited))
        self.stopwatch = now
        if not self.run.world.is_main:
            return
        if step == 1 or step == self.num_steps or step % self.log_every == 0:
            self.write(step, {**values, **self._rates()})
        self._show(step, values, now)

    def write(self, step: int, values: Mapping[str, float | Image]) -> None:
        """Numbers to a line of metrics.jsonl, pictures to pictures/NAME-EPOCH.png, both to TensorBoard."""
        if not self.run.world.is_main:
            return
        epoch = step / self.steps_per_epoch
        numbers = {name: value for name, value in values.items() if not isinstance(value, Image)}
        for name, number in numbers.items():
            self.board.add_scalar(name, number, step)
        if numbers:
            self.file.write(json.dumps({"step": step, "epoch": epoch, **numbers}) + "\n")
            self.file.flush()
        for name, value in values.items():
            if isinstance(value, Image):
                value.save(self.run.pictures / f"{name}-{epoch:04.0f}.png")
                self.board.add_image(name, np.asarray(value), step, dataformats="HWC")

    def sync(self) -> None:
        """Everything written is on the disk; called before a checkpoint that counts on it."""
        if self.run.world.is_main:
            sync(self.run.directory / "metrics.jsonl")
            self.board.flush()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside belongs to no step."""
        begun = time.perf_counter()
        yield
        self.stopwatch += time.perf_counter() - begun

    def _rates(self) -> dict[str, float]:
        seconds, waited = (sum(column) for column in zip(*self.recent, strict=True))
        rate = self.batch_size * len(self.recent) / seconds
        rates = {"images_per_s": rate, "data_wait": waited / seconds}
        return {**rates, "mfu": rate * self.mfu_per_rate} if self.mfu_per_rate else rates

    def _show(self, step: int, values: Mapping[str, float], now: float) -> None:
        pause = 0.25 if self.live.is_started else SECONDS_BETWEEN_PLAIN_LINES
        if now - self.printed < pause and step != self.num_steps:
            return
        self.printed = now
        if self.live.is_started:
            line = Text(self._line(step, values), no_wrap=True, overflow="ellipsis")
            self.live.update(line, refresh=True)
        else:
            self.run.say(self._line(step, values))

    def _line(self, step: int, values: Mapping[str, float]) -> str:
        """What matters most comes first: a narrow terminal cuts the end off."""
        rates = self._rates()
        left = (self.num_steps - step) * self.batch_size / rates["images_per_s"]
        # Names with an underscore are diagnostics: too many for a line, all in metrics.jsonl.
        numbers = [f"{name} {value:.4g}" for name, value in values.items() if "_" not in name]
        mfu = [f"MFU {rates['mfu']:.0%}"] if "mfu" in rates else []
        return "  ".join(
            [
                f"step {step}/{self.num_steps}",
                f"epoch {step / self.steps_per_epoch:.1f}",
                numbers[0],
                f"{rates['images_per_s']:.0f} images/s",
                *mfu,
                f"data wait {rates['data_wait']:.0%}",
                f"ETA {timedelta(seconds=round(left))}",
                *numbers[1:],
            ]
        )


def forget_after(path: Path, step: int) -> None:
    """Drops the lines of later steps, which will be taken again, and a last line that was cut short."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            continue
    write_text(path, "".join(kept))
