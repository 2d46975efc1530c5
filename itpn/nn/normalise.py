"""Images as a model wants them."""

import torch
from torch import Tensor, nn

from itpn.errors import UserError


class Normalise(nn.Module):
    """``uint8`` images, or floats in 0..1, to zero mean and unit variance per channel.

    Raises:
        UserError: there are not as many numbers as channels, nor one, or a deviation is not above 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], in_channels: int) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(deviation > 0 for deviation in std):
            raise UserError("objective.mean and objective.std need one number per channel each, std above 0")
        if len(mean) not in (1, in_channels):
            raise UserError(
                f"objective.mean has {len(mean)} numbers, but model.backbone.in_channels is "
                f"{in_channels}; give one number, or one per channel"
            )
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        top = 255 if images.dtype == torch.uint8 else 1
        return (images * (1 / (top * self.std))).sub_(self.mean / self.std)

    def undo(self, images: Tensor) -> Tensor:
        """Back to pictures in 0..1."""
        return (images * self.std + self.mean).clamp(0, 1)
