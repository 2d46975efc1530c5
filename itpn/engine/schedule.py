"""The learning rate of every step: linear warm-up, then half a cosine."""

import math
from dataclasses import dataclass

from itpn.errors import UserError


@dataclass(frozen=True, kw_only=True)
class CosineConfig:
    warmup_epochs: float | None = None
    """Epochs of linear warm-up. None: a tenth of all."""
    start_factor: float = 0.0
    """The warm-up begins at this share of the peak learning rate."""
    min_lr: float = 0.0
    """Where the cosine ends."""

    def warmup(self, epochs: int) -> float:
        """Epochs of warm-up in a run of so many.

        Raises:
            UserError: nothing would be left to train.
        """
        if self.warmup_epochs is None:
            return epochs / 10
        if self.warmup_epochs >= epochs:
            raise UserError(
                f"the warm-up takes {self.warmup_epochs:g} epochs, but the run has {epochs}: "
                "give it more --epochs or a shorter --schedule.warmup-epochs"
            )
        return self.warmup_epochs


def lr_at(step: int, config: CosineConfig, *, peak: float, epochs: int, steps_per_epoch: int) -> float:
    """Learning rate of the 0-based `step`, a function of the epoch's fraction as in the published recipes."""
    epoch, warmup = step / steps_per_epoch, config.warmup(epochs)
    if epoch < warmup:
        return peak * (config.start_factor + (1 - config.start_factor) * epoch / warmup)
    progress = (epoch - warmup) / (epochs - warmup)
    return config.min_lr + (peak - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
