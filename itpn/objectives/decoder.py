"""From visible units to a prediction for every unit: level embeddings, mask tokens, transformer blocks."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from itpn.errors import UserError
from itpn.nn.hivit import LARGEST, HiViTConfig
from itpn.nn.layers import GlobalBlock, init_linears
from itpn.nn.positions import Grid, resample_table, sincos_table
from itpn.nn.pyramid import Levels, ModelConfig


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    width: int = 512
    """Channels E of a unit inside the decoder."""
    depth: int = 8
    """Number of Transformer blocks (6 in the mmpretrain models)."""
    num_heads: int = 16
    """Attention heads."""
    mlp_ratio: float = 4.0
    """Ratio of hidden to outer width in the MLPs."""
    norm_eps: float = 1e-6
    """Epsilon of the LayerNorms in the blocks and after them."""
    embed_norm_eps: float = 1e-6
    """Epsilon of the LayerNorms before the level embeddings (1e-5 in the mmpretrain models)."""
    init: Literal["normal", "xavier"] = "normal"
    """Initial linear weights: N(0, 0.02), or Xavier-uniform (the mmpretrain models)."""

    def __post_init__(self) -> None:
        if self.num_heads < 1 or self.depth < 1 or self.width < 1:
            raise UserError("objective.decoder: width, depth and num_heads must be at least 1")
        if max(self.width, 32 * self.depth) > LARGEST or not 0 < self.mlp_ratio <= 64:
            raise UserError("objective.decoder: width or depth is too large, or mlp_ratio outside (0, 64]")
        if self.width % 16 or self.width % self.num_heads:
            raise UserError(
                f"objective.decoder.width: {self.width} must divide by 16 and by {self.num_heads} heads"
            )


class LevelEmbed(nn.Module):
    """One pyramid level to decoder width: LayerNorm and a linear layer to E / cells per cell, flattened per
    unit."""

    def __init__(self, width: int, num_cells: int, config: DecoderConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, config.embed_norm_eps)
        self.proj = nn.Linear(width, config.width // num_cells)

    def forward(self, level: Tensor) -> Tensor:
        """``[B, N, h, w, F]`` or ``[B, N, F]`` to ``[B, N, E]``, cells in row-major order."""
        cells: Tensor = self.proj(self.norm(level))
        return cells.flatten(2)


class LevelEmbeds(nn.Module):
    """All three levels, fine to coarse."""

    def __init__(self, width: int, config: DecoderConfig) -> None:
        super().__init__()
        self.p4 = LevelEmbed(width, 16, config)
        self.p8 = LevelEmbed(width, 4, config)
        self.p16 = LevelEmbed(width, 1, config)

    def forward(self, levels: Levels) -> list[Tensor]:
        return [self.p4(levels.p4), self.p8(levels.p8), self.p16(levels.p16)]


class UnitEmbed(nn.Module):
    """LayerNorm of each cell, then one linear layer from all cells of a unit: a convolution with kernel and
    stride of the unit."""

    def __init__(self, width: int, num_cells: int, out: int, norm_eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, norm_eps)
        self.proj = nn.Linear(num_cells * width, out)

    def forward(self, level: Tensor) -> Tensor:
        """``[B, N, h, w, F]`` or ``[B, N, F]`` to ``[B, N, C]``."""
        unit: Tensor = self.proj(self.norm(level).flatten(2))
        return unit


class UnitEmbeds(nn.Module):
    """All three levels, fine to coarse."""

    def __init__(self, width: int, out: int, norm_eps: float) -> None:
        super().__init__()
        self.p4 = UnitEmbed(width, 16, out, norm_eps)
        self.p8 = UnitEmbed(width, 4, out, norm_eps)
        self.p16 = UnitEmbed(width, 1, out, norm_eps)

    def forward(self, levels: Levels) -> list[Tensor]:
        return [self.p4(levels.p4), self.p8(levels.p8), self.p16(levels.p16)]


def build_embed(model: ModelConfig, config: DecoderConfig) -> nn.Module:
    """Embeddings of the pyramid's levels, or MAE's single linear layer where there is no pyramid."""
    if model.pyramid:
        embed: nn.Module = LevelEmbeds(model.pyramid.width, config)
    else:
        embed = nn.Linear(model.backbone.shape.width, config.width)
    init_linears(embed, config.init)
    return embed


def fill(visible: Tensor, keep: Tensor, hidden: Tensor, token: Tensor) -> Tensor:
    """Put visible units ``[B, K, E]`` back at their places among ``hidden [B, N]`` and ``token [E]`` at every
    other."""
    index = keep[..., None].expand(-1, -1, visible.shape[-1])
    return token.to(visible.dtype).expand(*hidden.shape, -1).scatter(1, index, visible)


class Decoder(nn.Module):
    """Transformer over all units with fixed sine-cosine positions, then a LayerNorm."""

    def __init__(self, backbone: HiViTConfig, config: DecoderConfig, depth: int) -> None:
        super().__init__()
        self.grid = backbone.grid
        first: Literal["row", "column"] = "row" if backbone.position == "sincos-row" else "column"
        self.position = nn.Parameter(sincos_table(self.grid, config.width, first), requires_grad=False)
        self.blocks = nn.ModuleList(
            [
                GlobalBlock(config.width, config.num_heads, config.mlp_ratio, config.norm_eps)
                for _ in range(depth)
            ]
        )
        self.norm = nn.LayerNorm(config.width, config.norm_eps)
        init_linears(self, config.init)

    def forward(self, units: Tensor, grid: Grid) -> Tensor:
        x: Tensor = units + resample_table(self.position, self.grid, grid)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x


def mean_over_hidden(per_unit: Tensor, hidden: Tensor) -> Tensor:
    """Mean over samples of each sample's mean over its hidden units: ``[B, N]`` to a scalar."""
    weight = hidden.to(per_unit.dtype)
    return ((per_unit * weight).sum(1) / weight.sum(1)).mean()
