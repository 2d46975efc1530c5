"""The learning rate of every step: linear warm-up, then down by half a cosine, a power of what is left, or in
steps."""

import math
from dataclasses import dataclass
from typing import Literal, assert_never

from itpn.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    shape: Literal["cosine", "poly", "step"] = "cosine"
    """Shape of the learning rate. cosine: half a cosine after the warm-up. poly: a power of the remaining
    share of the run (mmcv's, for segmentation). step: divided by 10 at each milestone (mmcv's, for
    detection). In poly and step, the warm-up multiplies the schedule."""
    power: float = 1.0
    """Power of poly. 1: linear."""
    milestones: tuple[float, ...] = (9 / 12, 11 / 12)
    """Milestones of step, as shares of the whole run. Published: epochs 9 and 11 of 12; 27 and 33 of 36."""
    warmup_epochs: float | None = None
    """Epochs of linear warm-up. None: a tenth of all epochs."""
    warmup_iterations: int | None = None
    """Steps of linear warm-up, instead of warmup_epochs."""
    start_factor: float = 0.0
    """Learning rate at the start of the warm-up, as a share of the peak."""
    min_lr: float = 0.0
    """Final learning rate of cosine and poly, and lower bound in step."""

    def __post_init__(self) -> None:
        if self.warmup_epochs is not None and self.warmup_iterations is not None:
            raise UserError("give only one of --schedule.warmup-epochs and --schedule.warmup-iterations")
        if not 0 < self.power < math.inf:
            raise UserError(f"--schedule.power must be greater than 0, not {self.power}")
        if not all(0 < share < 1 for share in self.milestones):
            raise UserError(f"--schedule.milestones are shares of the run, in (0, 1), not {self.milestones}")

    def warmup(self, epochs: float, steps_per_epoch: int) -> float:
        """Epochs of warm-up in a run of so many.

        Raises:
            UserError: nothing would be left to train.
        """
        if self.warmup_iterations is not None:
            if self.warmup_iterations >= round(epochs * steps_per_epoch):
                raise UserError(
                    f"the warm-up takes {self.warmup_iterations:,} steps, but the run has "
                    f"{round(epochs * steps_per_epoch):,}: give it more --iterations or --epochs, or a "
                    "shorter --schedule.warmup-iterations"
                )
            return self.warmup_iterations / steps_per_epoch
        if self.warmup_epochs is None:
            return epochs / 10
        if self.warmup_epochs >= epochs:
            raise UserError(
                f"the warm-up takes {self.warmup_epochs:g} epochs, but the run has {epochs:g}: "
                "give it more --epochs or a shorter --schedule.warmup-epochs"
            )
        return self.warmup_epochs


def lr_at(step: int, config: ScheduleConfig, *, peak: float, epochs: float, steps_per_epoch: int) -> float:
    """Learning rate of the 0-based `step`, a function of the epoch's fraction as in the published recipes."""
    epoch, warmup = step / steps_per_epoch, config.warmup(epochs, steps_per_epoch)
    rising = config.start_factor + (1 - config.start_factor) * epoch / warmup if epoch < warmup else None
    match config.shape:
        case "cosine":
            if rising is not None:
                return peak * rising
            progress = (epoch - warmup) / (epochs - warmup)
            return config.min_lr + (peak - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
        case "poly":
            lr: float = config.min_lr + (peak - config.min_lr) * (1 - epoch / epochs) ** config.power
            return lr if rising is None else lr * rising
        case "step":
            passed = sum(epoch / epochs >= share for share in config.milestones)
            lr = max(config.min_lr, peak * 0.1**passed)
            return lr if rising is None else lr * rising
        case _:
            assert_never(config.shape)
