"""Classification: mean of stage 3's tokens, LayerNorm, linear (the authors' ``fc_norm`` and ``head``)."""

import torch.nn.functional as F
from torch import Tensor, nn

from itpn.nn.hivit import HiViT


class Classifier(nn.Module):
    """A backbone with a head that starts close to zero, so that the first steps leave the backbone alone."""

    def __init__(self, backbone: HiViT, num_classes: int) -> None:
        super().__init__()
        width = backbone.config.shape.width
        self.backbone = backbone
        self.norm = nn.LayerNorm(width, backbone.config.norm_eps)
        self.head = nn.Linear(width, num_classes)
        nn.init.normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images ``[B, c, H, W]`` to logits ``[B, classes]``."""
        logits: Tensor = self.head(self.norm(self.backbone(images).c16.mean(1)))
        return logits


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.1) -> dict[str, Tensor]:
    """Mean cross-entropy with label smoothing, and the share of right answers."""
    loss = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
    return {"loss": loss, "accuracy": (logits.argmax(1) == labels).float().mean().detach()}
