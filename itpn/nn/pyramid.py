"""The feature pyramid that is pre-trained together with the backbone (arXiv 2211.12735)."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Tensor, nn

from itpn.errors import UserError
from itpn.nn.hivit import Features, HiViT, HiViTConfig
from itpn.nn.layers import LocalBlock, Split, init_linears


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
    """Hidden over outer width of the MLPs."""
    norm_eps: float = 1e-6
    """Epsilon of every LayerNorm."""
    init: Literal["normal", "xavier"] = "normal"
    """Start of the linear layers: N(0, 0.02), or Xavier-uniform (the mmpretrain models)."""

    def __post_init__(self) -> None:
        if self.width < 1 or self.depth < 0:
            raise UserError("model.pyramid: width must be at least 1 and depth at least 0")


class Pyramid(nn.Module):
    """Top-down path with lateral connections; like stages 1-2 of the backbone it works within each unit.

    Level 8 is split from the backbone's own stage-3 output, not from level 16.
    """

    def __init__(self, backbone_width: int, config: PyramidConfig) -> None:
        super().__init__()
        C, width, eps = backbone_width, config.width, config.norm_eps

        def block() -> LocalBlock:
            return LocalBlock(width, config.mlp_ratio, eps)

        self.config = config
        self.align = nn.Linear(C, width) if width != C else nn.Identity()
        self.split8 = Split(C, width, eps)
        self.lateral8 = nn.Linear(C // 2, width, bias=False)
        self.blocks8 = nn.Sequential(*[block() for _ in range(config.depth)])
        self.split4 = Split(width, width, eps)
        self.lateral4 = nn.Linear(C // 4, width, bias=False)
        self.blocks4 = nn.Sequential(*[block() for _ in range(config.depth)])
        self.out4, self.out8, self.out16 = block(), block(), block()
        init_linears(self, config.init)

    def forward(self, features: Features) -> Levels:
        p8 = self.blocks8(self.split8(features.c16[:, :, None, None]) + self.lateral8(features.c8))
        p4 = self.blocks4(self.split4(p8) + self.lateral4(features.c4))
        return Levels(self.out4(p4), self.out8(p8), self.out16(self.align(features.c16)))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What is pre-trained and then fine-tuned, unchanged: the backbone and, unless left out, its pyramid."""

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
