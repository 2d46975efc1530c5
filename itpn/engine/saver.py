"""When a run's checkpoints are written, and how it goes on from one."""

import time
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import nn

from itpn.engine import checkpoint
from itpn.engine.checkpoint import DamagedError
from itpn.engine.run import Run
from itpn.errors import UserError


class Stateful(Protocol):
    """What a run goes on from besides weights and optimiser, as JSON-able values, the same on all ranks."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Saver:
    """Rank 0 writes; every rank reads.

    Args:
        progress: by its name in state.json.
        every: steps between checkpoints; None: `minutes` decides.
        keep_last: checkpoints to keep.
        keep_every: steps between checkpoints that are kept for good.
    """

    def __init__(
        self,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        progress: Mapping[str, Stateful],
        run: Run,
        *,
        every: int | None,
        minutes: float,
        keep_last: int,
        keep_every: int | None,
    ) -> None:
        self.objective, self.optimizer, self.progress, self.run = objective, optimizer, progress, run
        self.every, self.minutes, self.keep_last, self.keep_every = every, minutes, keep_last, keep_every
        self.last_time, self.last_step = time.monotonic(), 0

    def resume(self) -> int:
        """Loads the newest whole checkpoint, which rank 0 finds and checks; the step to go on from."""
        found = checkpoint.latest(self.run.checkpoints, self.run.say) if self.run.world.is_main else None
        step = int(self.run.world.largest(found or 0)[0])
        if step:
            directory = self.run.checkpoints / f"{step:08d}"
            try:
                progress = checkpoint.read_state(directory)["progress"]
            except DamagedError as error:
                raise UserError(
                    f"rank {self.run.world.rank} cannot read {directory} ({error}): "
                    "all nodes need the run directory on a file system that they share"
                ) from error
            checkpoint.load_model(directory, self.objective)
            checkpoint.load_optimizer(directory, self.optimizer)
            for name, part in self.progress.items():
                if state := progress.get(name):  # a scaler that is off has none
                    part.load_state_dict(state)
        self.last_step = step
        return step

    def due(self, step: int) -> bool:
        return any(every and step % every == 0 for every in (self.every, self.keep_every))

    def overdue(self) -> bool:
        """By this rank's clock."""
        return self.every is None and time.monotonic() - self.last_time > 60 * self.minutes

    def save(self, step: int) -> None:
        """On every rank. A full disk does not end the training: the checkpoints before stay as they are."""
        if step == self.last_step:
            return
        failed = False
        is_main = self.run.world.is_main
        model = checkpoint.model_tensors(self.objective, keep=is_main)
        optimizer = checkpoint.optimizer_tensors(self.optimizer, keep=is_main)
        if is_main:
            root = self.run.checkpoints
            progress = {name: part.state_dict() for name, part in self.progress.items()}
            try:
                checkpoint.save(
                    root,
                    step,
                    model,
                    optimizer,
                    config=self.run.config,
                    portable=self.run.portable,
                    progress=progress,
                )
                checkpoint.prune(root, step, keep_last=self.keep_last, keep_every=self.keep_every)
            except (OSError, SafetensorError) as error:
                failed = True
                newest = f"step {self.last_step}'s" if self.last_step else "none"
                self.run.say(
                    f"could not write the checkpoint of step {step} ({error}); the newest is {newest}. "
                    f"Training goes on: make room in {root}"
                )
        # All wait for it: torchrun ends all ranks once one has left, also one that still writes.
        if not self.run.world.largest(failed)[0]:
            self.last_step = step
        self.last_time = time.monotonic()
