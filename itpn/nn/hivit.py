"""HiViT, the backbone of iTPN (arXiv 2205.14949, 2211.12735).

A hierarchical vision transformer whose first two stages are MLPs that never mix mask units, so that hidden
units can be dropped before any work, and whose third stage is a plain vision transformer over the units.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from itpn.errors import UserError
from itpn.nn.layers import (
    GlobalBlock,
    LocalBlock,
    Merge,
    cells_of,
    drop_path_factors,
    drop_path_rates,
    init_linears,
)
from itpn.nn.linear import Linear
from itpn.nn.positions import Grid, Relative, RelativeMethod, relative_index, resample_table, sincos_table
from itpn.nn.windows import Windows

Layers = Literal["hivit", "fast"]


class Shape(NamedTuple):
    """One size: stage 3's width (stage 1 has a quarter, stage 2 a half), blocks per stage, attention
    heads, and what the blocks are made of."""

    width: int
    depths: tuple[int, int, int]
    num_heads: int
    layers: Layers = "hivit"


SIZES = {
    "hivit_tiny": Shape(384, (2, 2, 10), 6),
    "hivit_small": Shape(384, (4, 4, 20), 6),
    "hivit_base": Shape(512, (4, 4, 24), 8),
    "hivit_large": Shape(768, (4, 4, 40), 12),
    "itpn_base": Shape(512, (3, 3, 24), 8),
    "itpn_large": Shape(768, (2, 2, 40), 12),
    "itpn_nano": Shape(192, (1, 1, 6), 3),
    "itpn_pico": Shape(64, (1, 1, 2), 2),
    "fast_itpn_tiny": Shape(384, (1, 1, 12), 6, "fast"),
    "fast_itpn_small": Shape(384, (2, 2, 20), 6, "fast"),
    "fast_itpn_base": Shape(512, (3, 3, 24), 8, "fast"),
    "fast_itpn_large": Shape(768, (2, 2, 40), 12, "fast"),
    "fast_itpn_nano": Shape(192, (1, 1, 6), 3, "fast"),
}


LARGEST = 1 << 15
"""Of widths, depths and sizes in pixels: beyond it a config is a mistake, or meant to do harm."""


class Features(NamedTuple):
    """Stage outputs: ``c4 [B, N, 4, 4, C/4]``, ``c8 [B, N, 2, 2, C/2]``, ``c16 [B, N, C]``."""

    c4: Tensor
    c8: Tensor
    c16: Tensor


@dataclass(frozen=True, kw_only=True)
class HiViTConfig:
    """Architecture of the backbone. Width, depths and heads follow from the size unless given."""

    size: str = "itpn_base"
    """Name of a model size in itpn.nn.hivit.SIZES."""
    width: int | None = None
    """Channels of stage 3. Stages 1 and 2 have a quarter and a half. None: the size's."""
    depths: tuple[int, int, int] | None = None
    """Blocks per stage. None: the size's."""
    num_heads: int | None = None
    """Attention heads of stage 3. None: the size's."""
    layers: Layers | None = None
    """Layers of the blocks: HiViT's or Fast-iTPN's. Fast-iTPN has LayerNorm inside the MLPs, but no norm
    after the stem. Its stage 3 has gated MLPs and layer scale. Its merges have biases, its keys none. None:
    the size's."""
    image_size: int = 224
    """Image side in pixels that the position tables are made for. Other sizes resample them."""
    patch_size: int = 16
    """Side of a mask unit in pixels."""
    in_channels: int = 3
    """Number of image channels."""
    early_mlp_ratio: float = 3.0
    """Ratio of hidden to outer width in the MLPs of stages 1 and 2."""
    mlp_ratio: float | None = None
    """Ratio of hidden to outer width in the MLPs of stage 3. None: 4, or 3 for Fast-iTPN's layers."""
    relative_position_bias: bool = False
    """Give each attention block a learned bias per head and relative position."""
    relative_position_decomposed: bool = False
    """Learn that bias as in ViTDet: one vector per row and column offset, multiplied by the query."""
    relative_image_size: int | None = None
    """Image side in pixels that the relative-position tables are made for. None: image_size."""
    layer_scale: float | None = None
    """Initial value of a learned scale on every residual branch. None: no scale."""
    drop_path: float = 0.0
    """Drop-path rate of the last block; it grows linearly from 0 over all blocks."""
    norm_eps: float = 1e-6
    """Epsilon of every LayerNorm."""
    position: Literal["sincos-column", "sincos-row", "normal"] = "sincos-column"
    """Initial position table: sine-cosine with the column's or the row's half first, or N(0, 0.02)."""
    position_frozen: bool = False
    """Keep the position table fixed (as in the mmpretrain models)."""
    position_resampling: Literal["exact", "published"] = "exact"
    """Resampling of the position table for another grid: bicubic by size, or by the published factor (size +
    0.1) / table size. The published way also resamples at the native size when units are dropped, as it did
    for the released pixel weights."""
    relative_resampling: RelativeMethod = "fraction"
    """Resampling of relative-position tables for another grid. fraction: an offset keeps its fraction of the
    image. Otherwise the table is resized like an image (the authors' segmentation loader), or far offsets are
    spread geometrically (BEiT's loader)."""
    stem_init: Literal["default", "xavier"] = "default"
    """Initial weights of the stem: PyTorch's default for a convolution, or Xavier-uniform (the mmpretrain
    models)."""
    window: int | None = None
    """Side, in units, of the attention windows of most stage-3 blocks, for large images (ViTDet). A
    relative-position bias then spans one window. None, or when units are dropped: global attention."""
    num_global_blocks: int = 4
    """Number of stage-3 blocks with global attention despite windows, evenly spaced up to the last."""
    checkpointing: bool = False
    """Use activation checkpointing: recompute each block in the backward pass. It needs less memory and a
    third more time."""

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise UserError(f"model.backbone.size: no size {self.size!r}; choose one of {', '.join(SIZES)}")
        if self.patch_size < 4 or self.patch_size % 4:
            raise UserError(f"model.backbone.patch_size: {self.patch_size} is not a multiple of 4 pixels")
        for name in ("image_size", "relative_image_size"):
            size = getattr(self, name)
            if size is not None and (size < self.patch_size or size % self.patch_size):
                nearest = max(1, round(size / self.patch_size)) * self.patch_size
                raise UserError(
                    f"model.backbone.{name}: {size} is not a multiple of the unit of "
                    f"{self.patch_size} pixels; the nearest is {nearest}"
                )
        if min(self.shape.width, self.shape.num_heads, self.in_channels, *self.shape.depths) < 1:
            raise UserError(
                "model.backbone: width, num_heads, in_channels and every depth must be at least 1"
            )
        sizes = (self.shape.width, self.in_channels, self.image_size, self.relative_image_size or 0)
        if max(*sizes, self.patch_size, 32 * max(self.shape.depths)) > LARGEST:
            raise UserError(
                f"model.backbone: a width or size above {LARGEST:,}, or a depth above {LARGEST // 32:,}"
            )
        if not 0 < self.norm_eps < 1:
            raise UserError(f"model.backbone.norm_eps: {self.norm_eps} lies outside (0, 1)")
        for name in ("early_mlp_ratio", "stage3_mlp_ratio"):
            if not 0 < getattr(self, name) <= 64:
                raise UserError(f"model.backbone.{name}: {getattr(self, name)} lies outside (0, 64]")
        if (self.window is not None and not 1 <= self.window <= LARGEST) or self.num_global_blocks < 0:
            raise UserError("model.backbone: window must be at least 1, num_global_blocks at least 0")
        if not 0 <= self.drop_path < 1:
            raise UserError(f"model.backbone.drop_path: {self.drop_path} lies outside [0, 1)")
        if self.shape.width % (4 * self.shape.num_heads):
            raise UserError(
                f"model.backbone.width: {self.shape.width} does not divide by 4 and by "
                f"{self.shape.num_heads} heads"
            )

    @property
    def shape(self) -> Shape:
        size = SIZES[self.size]
        given = (self.width, self.depths, self.num_heads, self.layers)
        return Shape(*(row if own is None else own for own, row in zip(given, size, strict=True)))  # type: ignore[arg-type]

    @property
    def label(self) -> str:
        """The size's name, or what to call a model of no published size."""
        published = self.shape == SIZES[self.size]
        return self.size if published else f"own size ({self.shape.width} wide)"

    @property
    def grid(self) -> Grid:
        side = self.image_size // self.patch_size
        return side, side

    @property
    def relative_grid(self) -> Grid | None:
        """The grid that the relative-position tables are made for; None without them."""
        side = (self.relative_image_size or self.image_size) // self.patch_size
        return (side, side) if self.relative_position_bias else None

    @property
    def stage3_mlp_ratio(self) -> float:
        return self.mlp_ratio or (3.0 if self.shape.layers == "fast" else 4.0)

    @property
    def num_units(self) -> int:
        return self.grid[0] * self.grid[1]


class HiViT(nn.Module):
    """The backbone: ``stem``, ``local``, ``embed``, ``context``; ``forward`` runs all four.

    It never learns that it is being pre-trained: a mask arrives as ``keep``, the ids of the units to work on.
    """

    drop_rates: Tensor

    def __init__(self, config: HiViTConfig) -> None:
        super().__init__()
        self.config = config
        width, depths, num_heads, layers = config.shape
        fast, early, eps, scale = (
            layers == "fast",
            config.early_mlp_ratio,
            config.norm_eps,
            config.layer_scale,
        )

        def local_block(width: int) -> LocalBlock:
            return LocalBlock(width, early, eps, None if fast else scale, inner_norm=fast)

        def global_block() -> GlobalBlock:
            ratio, window = config.stage3_mlp_ratio, config.relative_grid
            decomposed = config.relative_position_decomposed
            return GlobalBlock(width, num_heads, ratio, eps, window, scale, decomposed, fast)

        cell = config.patch_size // 4
        self.stem_proj = Linear(cell * cell * config.in_channels, width // 4)
        self.stem_norm = nn.Identity() if fast else nn.LayerNorm(width // 4, eps)
        self.stage1 = nn.ModuleList([local_block(width // 4) for _ in range(depths[0])])
        self.merge1 = Merge(width // 4, eps, fast)
        self.stage2 = nn.ModuleList([local_block(width // 2) for _ in range(depths[1])])
        self.merge2 = Merge(width // 2, eps, fast)
        self.position = nn.Parameter(
            torch.empty(config.num_units, width), requires_grad=not config.position_frozen
        )
        self.stage3 = nn.ModuleList([global_block() for _ in range(depths[2])])
        num_global = min(config.num_global_blocks, depths[2])
        self.global_blocks = {(i + 1) * depths[2] // num_global - 1 for i in range(num_global)}
        branches = [block.num_drops for block in self.blocks()]
        self.num_drops = sum(branches)
        self.register_buffer("drop_rates", drop_path_rates(config.drop_path, branches), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init_linears(self, "normal")
        self.stem_proj.reset_parameters()
        if self.config.stem_init == "xavier":
            nn.init.xavier_uniform_(self.stem_proj.weight)
        if self.config.position == "normal":
            nn.init.normal_(self.position, std=0.02)
        else:
            first: Any = self.config.position.removeprefix("sincos-")
            with torch.no_grad():
                self.position.copy_(sincos_table(self.config.grid, self.config.shape.width, first))

    @property
    def num_local_drops(self) -> int:
        """Residual branches of stages 1 and 2."""
        return len(self.stage1) + len(self.stage2)

    def blocks(self) -> list[LocalBlock | GlobalBlock]:
        """All residual blocks in order; the merges between the stages are not among them."""
        return [*self.stage1, *self.stage2, *self.stage3]

    def grid_of(self, images: Tensor) -> Grid:
        """Units per column and row of ``images [B, c, H, W]``."""
        H, W, P = images.shape[2], images.shape[3], self.config.patch_size
        if H % P or W % P:
            raise UserError(
                f"image of {H} x {W} pixels: each side must be a multiple of the unit of {P} pixels"
            )
        return H // P, W // P

    def stem(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Images ``[B, c, H, W]`` to cells ``[B, N, 4, 4, C/4]``; units not in ``keep [B, K]`` are dropped
        first."""
        self.grid_of(images)
        if images.shape[1] != self.config.in_channels:
            raise UserError(f"image of {images.shape[1]} channels: the model takes {self.config.in_channels}")
        cells: Tensor = self.stem_norm(self.stem_proj(cells_of(images, self.config.patch_size, keep)))
        return cells

    def local(self, cells: Tensor, drop: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Stages 1 and 2: cells to ``c4``, ``c8`` and the tokens ``[B, N, C]`` that stage 3 starts from."""
        drops = self._drops(drop, [*self.stage1, *self.stage2], self.drop_rates[: self.num_local_drops])
        c4 = cells
        for block in self.stage1:
            c4 = self._run(block, c4, next(drops))
        c8 = self.merge1(c4)
        for block in self.stage2:
            c8 = self._run(block, c8, next(drops))
        return c4, c8, self.merge2(c8).flatten(2)

    def embed(self, tokens: Tensor, grid: Grid, keep: Tensor | None = None) -> Tensor:
        """Add each token's position, resampled to the grid that the units were cut from."""
        table: Tensor = self.position
        published = self.config.position_resampling == "published"
        if grid != self.config.grid or (published and tokens.shape[1] != len(table)):
            table = resample_table(table, self.config.grid, grid, offset=0.1 if published else 0.0)
        return tokens + (table if keep is None else F.embedding(keep, table))

    def context(
        self,
        tokens: Tensor,
        relative: Relative | None = None,
        taps: Sequence[int] = (),
        drop: Tensor | None = None,
        windows: Windows | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Stage 3 on any set of tokens: ``c16 [B, N, C]`` and the outputs of the blocks numbered in ``taps``.

        ``windows`` cut up a whole grid of tokens, for all blocks but the global ones.
        """
        tapped, drops = [], self._drops(drop, self.stage3, self.drop_rates[self.num_local_drops :])
        within = None if windows is None else self.relative((windows.side, windows.side), None, tokens.device)
        for i, block in enumerate(self.stage3):
            if windows is None or i in self.global_blocks:
                tokens = self._run(block, tokens, relative, next(drops))
            else:
                tokens = self._run(block, tokens, within, next(drops), windows)
            if i in taps:
                tapped.append(tokens)
        return tokens, tapped

    def relative(
        self, grid: Grid, keep: Tensor | None = None, device: torch.device | None = None
    ) -> Relative | None:
        """The pairs of positions among all units of ``grid``, or among those kept."""
        if not self.config.relative_position_bias:
            return None
        pairs = relative_index(grid).to(device)
        if keep is not None:
            pairs = pairs[keep[:, :, None], keep[:, None, :]]
        return Relative(pairs, grid, self.config.relative_resampling)

    def windows(self, grid: Grid, device: torch.device | None = None) -> Windows | None:
        """The windows of a grid; None where all units see one another."""
        side = self.config.window
        return None if side is None or side >= max(grid) else Windows.of(grid, side, device)

    def forward(self, images: Tensor, keep: Tensor | None = None, drop: Tensor | None = None) -> Features:
        """Normalised images ``[B, c, H, W]`` to stage features, of all units or those in ``keep [B, K]``.

        Args:
            drop: uniform numbers ``[B, num_drops]`` that decide drop path; without them the global generator
            does.

        Raises:
            UserError: a side is not a multiple of the unit.
        """
        grid = self.grid_of(images)
        if not (self.training and self.config.drop_path):
            drop = None
        elif drop is None:
            drop = torch.rand(len(images), self.num_drops, device=images.device)
        num_local = self.num_local_drops
        early, late = (None, None) if drop is None else (drop[:, :num_local], drop[:, num_local:])
        c4, c8, tokens = self.local(self.stem(images, keep), early)
        tokens = self.embed(tokens, grid, keep)
        windows = self.windows(grid, images.device) if keep is None else None
        relative = self.relative(grid, keep, images.device)
        c16, _ = self.context(tokens, relative, drop=late, windows=windows)
        return Features(c4, c8, c16)

    def _run(self, block: nn.Module, *args: Any) -> Tensor:
        if self.config.checkpointing and self.training and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(block, *args, use_reentrant=False))
        return cast(Tensor, block(*args))

    @staticmethod
    def _drops(drop: Tensor | None, blocks: Iterable[Any], rates: Tensor) -> Iterator[Tensor | None]:
        """Each block's factors under drop path, from the uniform numbers of all."""
        counts = [block.num_drops for block in blocks]
        if drop is None:
            return iter([None] * len(counts))
        return iter(torch.split(drop_path_factors(drop, rates), counts, dim=1))
