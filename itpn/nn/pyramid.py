"""The feature pyramid that is pre-trained together with the backbone (arXiv 2211.12735)."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from itpn.errors import UserError
from itpn.nn.hivit import LARGEST, Features, HiViT, HiViTConfig, Layers
from itpn.nn.layers import LocalBlock, Split, init_linears, to_map
from itpn.nn.linear import Linear
from itpn.nn.positions import Grid


class Levels(NamedTuple):
    """Pyramid maps, all F wide: ``p4 [B, N, 4, 4, F]``, ``p8 [B, N, 2, 2, F]``, ``p16 [B, N, F]``."""

    p4: Tensor
    p8: Tensor
    p16: Tensor


@dataclass(frozen=True, kw_only=True)
class PyramidConfig:
    width: int = 256
    """Channels F of every level."""
    depth: int = 2
    """MLP blocks after each of the two top-down steps."""
    mlp_ratio: float = 4.0
    """Ratio of hidden to outer width in the MLPs."""
    norm_eps: float = 1e-6
    """Epsilon of every LayerNorm."""
    layers: Layers = "hivit"
    """Layers of the pyramid: linear without bias, or Fast-iTPN's. There, laterals and splits have a bias, and
    the backbone's output is normalised first. Published for Fast-iTPN: depth 1, mlp-ratio 8 / 3."""
    init: Literal["normal", "xavier"] = "normal"
    """Initial linear weights: N(0, 0.02), or Xavier-uniform (the mmpretrain models)."""

    def __post_init__(self) -> None:
        if not 1 <= self.width <= LARGEST or not 0 <= self.depth <= LARGEST:
            raise UserError("model.pyramid: width must be at least 1 and depth at least 0, both of sane size")
        if not 0 < self.norm_eps < 1 or not 0 < self.mlp_ratio <= 64:
            raise UserError("model.pyramid: norm_eps must lie in (0, 1) and mlp_ratio in (0, 64]")


class Pyramid(nn.Module):
    """Top-down path with lateral connections; like stages 1-2 of the backbone it works within each unit.

    Level 8 is split from the backbone's own stage-3 output, not from level 16.
    """

    def __init__(self, backbone_width: int, config: PyramidConfig) -> None:
        super().__init__()
        C, width, eps, fast = backbone_width, config.width, config.norm_eps, config.layers == "fast"

        def block() -> LocalBlock:
            return LocalBlock(width, config.mlp_ratio, eps)

        self.config = config
        self.norm = nn.LayerNorm(C, eps) if fast else nn.Identity()
        self.align = Linear(C, width) if width != C else nn.Identity()
        self.split8 = Split(C, width, eps, bias=fast)
        self.lateral8 = Linear(C // 2, width, bias=fast)
        self.blocks8 = nn.Sequential(*[block() for _ in range(config.depth)])
        self.split4 = Split(width, width, eps, bias=fast)
        self.lateral4 = Linear(C // 4, width, bias=fast)
        self.blocks4 = nn.Sequential(*[block() for _ in range(config.depth)])
        self.out4, self.out8, self.out16 = block(), block(), block()
        init_linears(self, config.init)

    def forward(self, features: Features) -> Levels:
        c16 = self.norm(features.c16)
        p8 = self.blocks8(self.split8(c16[:, :, None, None]) + self.lateral8(features.c8))
        p4 = self.blocks4(self.split4(p8) + self.lateral4(features.c4))
        return Levels(self.out4(p4), self.out8(p8), self.out16(self.align(c16)))


def detection_maps(levels: Levels, grid: Grid) -> list[Tensor]:
    """Five maps ``[B, F, h, w]`` of strides 4 to 64, fine to coarse: 32 and 64 are average-pooled from 16.

    What the authors' detectors see; an odd row or column at the end is dropped by the pooling, as there.
    """
    maps = [to_map(level, grid) for level in levels]
    maps.append(F.avg_pool2d(maps[-1], 2))
    maps.append(F.avg_pool2d(maps[-1], 2))
    return maps


def segmentation_maps(features: Features, levels: Levels, grid: Grid) -> list[Tensor]:
    """Four maps of strides 4 to 32: each level beside its stage's own feature, and 16 max-pooled.

    Channels F + C/4, F + C/2, F + C, F + C, as the authors' segmentation heads see them.
    """
    maps = [
        torch.cat([to_map(level, grid), to_map(feature, grid)], 1)
        for level, feature in zip(levels, features, strict=True)
    ]
    return [*maps, F.max_pool2d(maps[-1], 2)]


def level_maps(levels: Levels, grid: Grid) -> list[Tensor]:
    """Maps ``[B, F, h, w]`` to look at, fine to coarse: without what a place inside a unit has in common over
    all units, which would cover the rest."""
    return [to_map(level - level.mean((0, 1)), grid) for level in levels]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Model that is pre-trained and then fine-tuned unchanged: the backbone and, unless left out, its
    pyramid."""

    backbone: HiViTConfig = field(default_factory=HiViTConfig)
    pyramid: PyramidConfig | None = field(default_factory=PyramidConfig)


class Model(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = HiViT(config.backbone)
        self.pyramid = Pyramid(config.backbone.shape.width, config.pyramid) if config.pyramid else None

    def forward(
        self, images: Tensor, keep: Tensor | None = None, drop: Tensor | None = None
    ) -> tuple[Features, Levels | None]:
        features = self.backbone(images, keep, drop)
        return features, self.pyramid(features) if self.pyramid else None
