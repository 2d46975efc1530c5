"""When a run's checkpoints are written, and how it goes on from one."""

import time

import torch
from torch import nn

from itpn.engine import checkpoint
from itpn.engine.run import Run


class Saver:
    """Rank 0 writes; every rank reads.

    Args:
        every: steps between checkpoints; None: `minutes` decides.
        keep_last: checkpoints to keep.
        keep_every: steps between checkpoints that are kept for good.
    """

    def __init__(
        self,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        run: Run,
        *,
        every: int | None,
        minutes: float,
        keep_last: int,
        keep_every: int | None,
    ) -> None:
        self.objective, self.optimizer, self.scaler, self.run = objective, optimizer, scaler, run
        self.every, self.minutes, self.keep_last, self.keep_every = every, minutes, keep_last, keep_every
        self.last_time = time.monotonic()

    def resume(self) -> int:
        """Loads the newest whole checkpoint, which rank 0 finds and checks; the step to go on from."""
        found = checkpoint.latest(self.run.checkpoints, self.run.say) if self.run.world.is_main else None
        (step,) = self.run.world.largest(int(found.name) if found else 0)
        if step:
            directory = self.run.checkpoints / f"{int(step):08d}"
            checkpoint.load_model(directory, self.objective)
            checkpoint.load_optimizer(directory, self.optimizer)
            if state := checkpoint.read_state(directory)["scaler"]:
                self.scaler.load_state_dict(state)
        return int(step)

    def due(self, step: int) -> bool:
        return any(every and step % every == 0 for every in (self.every, self.keep_every))

    def overdue(self) -> bool:
        """By this rank's clock."""
        return self.every is None and time.monotonic() - self.last_time > 60 * self.minutes

    def save(self, step: int) -> None:
        if self.run.world.is_main:
            root, scaler = self.run.checkpoints, self.scaler.state_dict()
            checkpoint.save(root, step, self.objective, self.optimizer, config=self.run.config, scaler=scaler)
            checkpoint.prune(root, step, keep_last=self.keep_last, keep_every=self.keep_every)
        self.run.world.wait()  # torchrun ends all ranks once one has left, also one that still writes
        self.last_time = time.monotonic()
