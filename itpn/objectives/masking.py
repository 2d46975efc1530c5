"""Which units a sample hides: drawn per sample on the CPU, so that it travels in the batch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from itpn.errors import UserError


def num_kept(num_units: int, mask_ratio: float) -> int:
    """Visible units of ``num_units`` under a mask ratio (int(N * (1 - ratio)), as MAE).

    Raises:
        UserError: the ratio lies outside (0, 1), or leaves nothing to see or nothing to predict.
    """
    kept = int(num_units * (1 - mask_ratio)) if 0 < mask_ratio < 1 else 0
    if not 0 < kept < num_units:
        raise UserError(
            f"objective.mask_ratio: {mask_ratio} of {num_units} units leaves "
            f"{'none' if not kept else 'all'} visible; it must lie between {1 / num_units:.3f} "
            f"and {1 - 1 / num_units:.3f}"
        )
    return kept


def kept_ids(noise: Tensor, kept: int) -> Tensor:
    """The ids ``[..., K]`` of the units with the smallest noise ``[..., N]``."""
    return noise.argsort(dim=-1)[..., :kept]


def hidden_units(keep: Tensor, num_units: int) -> Tensor:
    """``hidden: bool [B, N]``, True where a unit is not in ``keep [B, K]``."""
    return torch.ones(len(keep), num_units, dtype=torch.bool, device=keep.device).scatter(1, keep, False)


@dataclass(frozen=True)
class RandomMasking:
    """Draws a sample's visible units, uniformly at random, and its numbers for drop path."""

    num_units: int
    num_kept: int
    num_masks: int = 1
    num_drops: int = 0

    def __call__(self, generator: torch.Generator) -> dict[str, Tensor]:
        """``keep: long [masks, K]`` and, where drop path is on, ``drop: float [masks, num_drops]`` in [0,
        1)."""
        noise = torch.rand(self.num_masks, self.num_units, generator=generator)
        draws = {"keep": kept_ids(noise, self.num_kept)}
        if self.num_drops:
            draws["drop"] = torch.rand(self.num_masks, self.num_drops, generator=generator)
        return draws
