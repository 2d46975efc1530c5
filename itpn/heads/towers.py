"""The networks that look into a box: its class, a better box and its mask, from pooled features."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from itpn.errors import UserError


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Layers of the box and mask heads. Defaults are the published ones."""

    norm: Literal["batch", "group"] = "batch"
    """Normalisation in the box head: over all boxes of the batch, or per box. Only the latter is independent
    of batch size and ranks."""
    num_convs: int = 4
    """Number of 3x3 convolutions in the box head and in the mask head."""
    conv_width: int = 256
    """Channels of the convolutions."""
    hidden_width: int = 1024
    """Channels of the box head's linear layer."""

    def __post_init__(self) -> None:
        if min(self.num_convs, self.conv_width, self.hidden_width) < 1:
            raise UserError("detector.regions.head: every number and width must be at least 1")


class BoxHead(nn.Module):
    """Pooled features ``[R, F, 7, 7]`` to logits of the classes and the background ``[R, C + 1]`` and, for
    every class, box deltas ``[R, C, 4]``; these two in fp32."""

    size = 7

    def __init__(self, width: int, num_classes: int, config: HeadConfig) -> None:
        super().__init__()
        self.convs = FastRCNNConvFCHead(
            (width, self.size, self.size),
            [config.conv_width] * config.num_convs,
            [config.hidden_width],
            norm_layer=nn.BatchNorm2d if config.norm == "batch" else _group_norm,
        )
        self.classify = nn.Linear(config.hidden_width, num_classes + 1)
        self.regress = nn.Linear(config.hidden_width, 4 * num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.normal_(self.classify.weight, std=0.01)
        nn.init.normal_(self.regress.weight, std=0.001)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.convs(pooled)
        with torch.autocast(pooled.device.type, enabled=False):
            hidden = hidden.float()
            return self.classify(hidden), self.regress(hidden).unflatten(1, (-1, 4))


def _group_norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(32, width), width)


class MaskHead(nn.Module):
    """Pooled features ``[R, F, 14, 14]`` and a class each to logits ``[R, 28, 28]``, in fp32."""

    size = 14

    def __init__(self, width: int, num_classes: int, config: HeadConfig) -> None:
        super().__init__()
        self.convs = MaskRCNNHeads(width, [config.conv_width] * config.num_convs, dilation=1)
        self.predict = MaskRCNNPredictor(config.conv_width, config.conv_width, num_classes)

    def forward(self, pooled: Tensor, labels: Tensor) -> Tensor:
        return of_class(self.predict(self.convs(pooled)), labels).float()


def of_class(by_class: Tensor, labels: Tensor) -> Tensor:
    """``[R, C, ...]`` to what belongs to the row's class, ``[R, ...]``."""
    rows = torch.arange(len(labels), device=labels.device) * by_class.shape[1] + labels
    return by_class.flatten(0, 1).index_select(0, rows)
