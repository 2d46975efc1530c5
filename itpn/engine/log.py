"""What a run tells: metrics.jsonl, speed.jsonl, TensorBoard, and one live line (plain without a terminal).

metrics.jsonl holds what was learned, and is the same byte for byte however often the run was stopped;
speed.jsonl holds what depends on the clock and the machine.
"""

import resource
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from PIL.Image import Image
from rich.live import Live
from rich.text import Text

from itpn.engine.journal import Journal
from itpn.engine.run import Run

SECONDS_BETWEEN_PLAIN_LINES = 10.0


class Log:
    """Writes on rank 0, and keeps time: rates are over the last steps, without evaluation and checkpoints."""

    mfu_per_rate = 0.0
    """Model-FLOP utilisation per image/s; 0 where it is not known."""

    def __init__(
        self, run: Run, num_steps: int, steps_per_epoch: int, period: int, batch_size: int, log_every: int
    ) -> None:
        self.run, self.num_steps, self.steps_per_epoch = run, num_steps, steps_per_epoch
        self.period, self.batch_size, self.log_every = period, batch_size, log_every
        self.metrics = Journal(run.directory / "metrics.jsonl", run.say)
        self.speed = Journal(run.directory / "speed.jsonl", run.say)
        # Seconds of a step, of which waited for data.
        self.recent: deque[tuple[float, float]] = deque(maxlen=50)
        self.stopwatch = time.perf_counter()
        self.printed, self.complained = 0.0, False
        self.live = Live(console=run.console, auto_refresh=False)

    def state_dict(self) -> dict[str, Any]:
        return {"metrics": self.metrics.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.metrics.load_state_dict(state["metrics"])
        self.speed.size = sys.maxsize  # no two runs have the same speed: all of its lines stay

    def begin(self, start_step: int) -> None:
        """Goes on after `start_step`; what earlier attempts logged of later steps is dropped."""
        self.stopwatch = time.perf_counter()
        if self.run.world.is_main:
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import

            self.metrics.begin()
            self.speed.begin()
            purge = start_step + 1 if start_step else 0
            self.board = SummaryWriter(self.run.directory / "tensorboard", purge_step=purge)

    def __enter__(self) -> Self:
        self.excepthook, threading.excepthook = threading.excepthook, self._failed_in_thread
        if self.run.world.is_main and self.run.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        threading.excepthook = self.excepthook
        if self.run.world.is_main:
            self.live.stop()
            with self._accessory():
                self.board.close()

    def step(self, step: int, values: Mapping[str, float], *, waited: float) -> None:
        """After the `step`-th step (counted from 1), which took the time since the call before."""
        now = time.perf_counter()
        self.recent.append((now - self.stopwatch, waited))
        self.stopwatch = now
        if not self.run.world.is_main:
            return
        if step == 1 or step == self.num_steps or step % self.log_every == 0:
            self.write(step, values)
            speed = {**self._rates(), **_memory()}
            self.speed.add({"step": step, **speed})
            self._to_board(step, speed)
        self._show(step, values, now)

    def write(self, step: int, values: Mapping[str, float | Image]) -> None:
        """Numbers to a line of metrics.jsonl, pictures to pictures/NAME-EPOCH.png (of a run of iterations
        NAME-STEP.png), both to TensorBoard."""
        if not self.run.world.is_main:
            return
        numbers = {name: value for name, value in values.items() if not isinstance(value, Image)}
        if numbers:
            self.metrics.add({"step": step, "epoch": step / self.steps_per_epoch, **numbers})
        for name, value in values.items():
            if isinstance(value, Image):
                with self._accessory():
                    value.save(self.run.pictures / f"{name}-{step // self.period:04}.png")
        self._to_board(step, values)

    def _to_board(self, step: int, values: Mapping[str, float | Image]) -> None:
        with self._accessory():
            for name, value in values.items():
                if isinstance(value, Image):
                    self.board.add_image(name, np.asarray(value), step, dataformats="HWC")
                else:
                    self.board.add_scalar(name, value, step)

    def _failed_in_thread(self, failure: threading.ExceptHookArgs) -> None:
        # TensorBoard's thread hands its OSError to the next call too, which tells it in one line.
        if not issubclass(failure.exc_type, OSError):
            self.excepthook(failure)

    @contextmanager
    def _accessory(self) -> Iterator[None]:
        """What training can do without: its failure is told and passed over."""
        try:
            yield
        except OSError as error:
            if not self.complained:
                self.run.say(f"cannot write to {self.run.directory} ({error.strerror or error}): going on")
            self.complained = True

    def sync(self, *others: Journal) -> None:
        """Everything written is on the disk; called before a checkpoint that counts on it."""
        if self.run.world.is_main:
            with self._accessory():
                for journal in (self.metrics, self.speed, *others):
                    journal.sync()
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


def _memory() -> dict[str, float]:
    """Resident memory of this process now and at its peak, and a GPU's peak, in GB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    values = {"memory_peak_gb": peak / 1e9}
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            values["memory_gb"] = int(file.read().split()[1]) * resource.getpagesize() / 1e9
    if torch.cuda.is_available():
        values["gpu_memory_peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return values
