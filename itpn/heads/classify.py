"""Classification: the mean of stage 3's tokens, a LayerNorm, a linear layer."""

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from itpn.errors import UserError
from itpn.nn.hivit import HiViT


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    num_classes: int = 1000
    """Number of classes. Training sets it to the number of class folders."""
    pooling: Literal["mean-norm", "norm-mean", "mean"] = "mean-norm"
    """Pooling of tokens to one vector. The authors' recipes take the mean and apply LayerNorm. Fast-iTPN's
    other form applies LayerNorm per token and takes the mean. mmpretrain's HiViT takes the mean alone."""
    init_std: float = 2e-5
    """Standard deviation of the linear layer's initial weights: 2e-5 on pixels, 0.02 on CLIP, 2e-4 in
    Fast-iTPN."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_classes <= 1_000_000:
            raise UserError(f"classifier.num_classes: {self.num_classes} lies outside 1..1,000,000")
        if not 0 <= self.init_std <= 1:
            raise UserError(f"classifier.init_std: {self.init_std} lies outside 0..1")


class Classifier(nn.Module):
    """A backbone with a head that may start near zero, so that first steps leave the backbone alone."""

    def __init__(self, backbone: HiViT, config: ClassifierConfig) -> None:
        super().__init__()
        width = backbone.config.shape.width
        self.config = config
        self.backbone = backbone
        self.norm = (
            nn.Identity() if config.pooling == "mean" else nn.LayerNorm(width, backbone.config.norm_eps)
        )
        self.head = nn.Linear(width, config.num_classes)
        nn.init.normal_(self.head.weight, std=config.init_std)
        nn.init.zeros_(self.head.bias)

    def pool(self, tokens: Tensor) -> Tensor:
        """Tokens ``[B, N, C]`` to what the linear layer sees, ``[B, C]``."""
        if self.config.pooling == "norm-mean":
            pooled: Tensor = self.norm(tokens).mean(1)
        else:
            pooled = self.norm(tokens.mean(1))
        return pooled

    def forward(self, images: Tensor, drop: Tensor | None = None) -> Tensor:
        """Normalised images ``[B, c, H, W]`` to logits ``[B, classes]``.

        Args:
            drop: uniform numbers ``[B, num_drops]`` that decide drop path in training.
        """
        logits: Tensor = self.head(self.pool(self.backbone(images, drop=drop).c16))
        return logits


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.1) -> dict[str, Tensor]:
    """Mean cross-entropy with label smoothing, and the share of right answers."""
    loss = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
    return {"loss": loss, "accuracy": (logits.argmax(1) == labels).float().mean().detach()}
