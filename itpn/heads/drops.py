"""What the loader draws for a sample that is fine-tuned on: its numbers for drop path."""

from dataclasses import dataclass

import torch
from torch import Tensor

from itpn.nn.hivit import HiViT


@dataclass(frozen=True)
class RandomDrops:
    num_drops: int

    @classmethod
    def of(cls, backbone: HiViT) -> "RandomDrops":
        return cls(backbone.num_drops if backbone.config.drop_path else 0)

    def __call__(self, generator: torch.Generator) -> dict[str, Tensor]:
        """``drop: float [num_drops]`` in [0, 1); nothing where drop path is off."""
        return {"drop": torch.rand(self.num_drops, generator=generator)} if self.num_drops else {}
