"""UPerNet's heads (arXiv 1807.10221): four maps in, logits of every class at stride 4 out.

Architecture and starting weights are those of mmseg 0.11, which the published results are from. GroupNorm as
an option is ours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from itpn.errors import UserError
from itpn.nn.hivit import LARGEST

Norm = Literal["batch", "group"]


@dataclass(frozen=True, kw_only=True)
class SegmenterConfig:
    num_classes: int = 150
    """Number of classes. Training sets it to the number in the data."""
    width: int = 768
    """Channels inside the head."""
    pools: tuple[int, ...] = (1, 2, 3, 6)
    """Grid sizes of the pyramid pooling on the coarsest map, in cells per side."""
    dropout: float = 0.1
    """Dropout rate of the channels before the last layer of either head."""
    norm: Norm = "batch"
    """Normalisation after each convolution. batch: over the images of one forward pass, across all GPUs, as
    published. group: over 32 groups of channels per image, so results do not depend on the batch."""
    auxiliary_width: int = 256
    """Channels of the auxiliary head, which sees the map of stride 16 and is used only in training."""
    auxiliary_weight: float = 0.4
    """Weight of the auxiliary head's loss. 0: no auxiliary head."""
    loss_over: Literal["labelled", "all"] = "labelled"
    """Divisor of a sample's summed loss: its number of labelled pixels (ours), or of all its pixels
    (published). The published way gives sparsely labelled samples less weight. The loss is the mean over
    samples."""
    mean: tuple[float, ...] | None = None
    """Mean of each image channel, in 0..1. None: as for the initial weights, else ImageNet's."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each image channel, in 0..1. None: as for the initial weights, else
    ImageNet's."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_classes <= 1 << 16:
            raise UserError(f"segmenter.num_classes: {self.num_classes} lies outside 1..65,536")
        if not 1 <= min(self.width, self.auxiliary_width) <= max(self.width, self.auxiliary_width) <= LARGEST:
            raise UserError(f"segmenter.width and auxiliary_width must lie in 1..{LARGEST:,}")
        if not self.pools or not 1 <= min(self.pools) <= max(self.pools) <= 64:
            raise UserError(f"segmenter.pools: {self.pools}; it takes numbers of cells per side, 1 to 64")
        if not 0 <= self.dropout < 1:
            raise UserError(f"segmenter.dropout: {self.dropout} lies outside [0, 1)")
        if not 0 <= self.auxiliary_weight < math.inf:
            raise UserError(f"segmenter.auxiliary_weight: {self.auxiliary_weight} is not 0 or more")
        if (self.mean is None) != (self.std is None):
            raise UserError("segmenter.mean and segmenter.std: give both or neither")


class ConvNorm(nn.Sequential):
    """Convolution (stride 1, same size) without bias, norm, ReLU."""

    def __init__(self, channels: int, width: int, kernel: int, norm: Norm) -> None:
        # Groups of at least two channels: of one, the average of a whole image would be normalised away.
        groups = math.gcd(32, width, width // 2)
        super().__init__(
            nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(width) if norm == "batch" else nn.GroupNorm(groups, width),
            nn.ReLU(inplace=True),
        )


class PixelClassifier(nn.Sequential):
    """Dropout of whole channels, then a 1 x 1 convolution to the classes."""

    def __init__(self, width: int, config: SegmenterConfig) -> None:
        super().__init__(nn.Dropout2d(config.dropout), nn.Conv2d(width, config.num_classes, 1))


class UPerHead(nn.Module):
    """Pyramid pooling on the coarsest map, a top-down path through the others, all fused at stride 4.

    Args:
        channels: of the maps, fine to coarse.
    """

    def __init__(self, channels: Sequence[int], config: SegmenterConfig) -> None:
        super().__init__()
        *lower, top = channels
        width, norm = config.width, config.norm
        self.sizes = config.pools
        self.pools = nn.ModuleList([ConvNorm(top, width, 1, norm) for _ in config.pools])
        self.pooled = ConvNorm(top + len(config.pools) * width, width, 3, norm)
        self.laterals = nn.ModuleList([ConvNorm(C, width, 1, norm) for C in lower])
        self.outs = nn.ModuleList([ConvNorm(width, width, 3, norm) for _ in lower])
        self.fuse = ConvNorm(len(channels) * width, width, 3, norm)
        self.classify = PixelClassifier(width, config)
        init_convolutions(self)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Four maps ``[B, C, h, w]``, fine to coarse, to logits ``[B, classes, h, w]`` as fine."""
        *lower, top = maps
        sizes = zip(self.pools, self.sizes, strict=True)
        pools = [resized(pool(F.adaptive_avg_pool2d(top, size)), top) for pool, size in sizes]
        path = [self.pooled(torch.cat([top, *pools], 1))]
        for lateral, finer in zip(reversed(self.laterals), reversed(lower), strict=True):
            path.append(lateral(finer) + resized(path[-1], finer))
        top, *merged = path
        outs = [out(x) for out, x in zip(self.outs, reversed(merged), strict=True)]
        fused = self.fuse(torch.cat([resized(out, outs[0]) for out in (*outs, top)], 1))
        logits: Tensor = self.classify(fused)
        return logits


class FCNHead(nn.Sequential):
    """One 3 x 3 convolution, then the classes (the auxiliary head)."""

    def __init__(self, channels: int, config: SegmenterConfig) -> None:
        width = config.auxiliary_width
        super().__init__(ConvNorm(channels, width, 3, config.norm), PixelClassifier(width, config))
        init_convolutions(self)


def init_convolutions(head: nn.Module) -> None:
    """He-normal over a convolution's outputs; N(0, 0.01) for the classes."""
    for layer in head.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    for layer in head.modules():
        if isinstance(layer, PixelClassifier):
            classes = cast(nn.Conv2d, layer[-1])
            nn.init.normal_(classes.weight, std=0.01)
            nn.init.zeros_(cast(Tensor, classes.bias))


def resized(maps: Tensor, like: Tensor) -> Tensor:
    """Bilinear, to the height and width of another tensor."""
    return F.interpolate(maps, size=like.shape[-2:], mode="bilinear", align_corners=False)
