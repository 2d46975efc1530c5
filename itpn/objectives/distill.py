"""Pre-training on a teacher's features, as iTPN (arXiv 2211.12735) and Fast-iTPN do: student and losses.

Every unit goes through the whole student; hidden ones are replaced by a mask token. The pyramid's levels are
fused into one vector per unit, which predicts the teacher's token of that unit.
"""

from dataclasses import dataclass
from functools import reduce
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from itpn.errors import UserError
from itpn.nn.hivit import LARGEST, Features, HiViTConfig
from itpn.nn.layers import GlobalBlock, init_linears
from itpn.nn.normalise import Normalise
from itpn.nn.positions import Relative, relative_index
from itpn.nn.pyramid import Model, ModelConfig
from itpn.objectives.decoder import DecoderConfig, LevelEmbeds, mean_over_hidden
from itpn.objectives.masking import BlockMasking
from itpn.objectives.teacher import Teacher, TeacherConfig

Loss = Literal["smooth-l1", "cosine", "cross-entropy"]


@dataclass(frozen=True, kw_only=True)
class DistillConfig(TeacherConfig):
    target_width: int = 512
    """Channels of the teacher's targets: 512 for CLIP B/16, 768 for CLIP L/14 (both projected)."""
    mask_token: Literal["after-stem", "after-local"] = "after-local"
    """Where hidden units are replaced: after the stem (Fast-iTPN), or after stages 1 and 2 (iTPN), which lets
    their pixels reach the pyramid through the laterals."""
    num_hidden: int = 75
    """Units that are hidden, in blocks."""
    min_block: int = 16
    """Units of the smallest block."""
    exact_count: bool = True
    """Hide just num_hidden units of every image; else, as published, at most so many."""
    fuse: Literal["cells", "units"] = "cells"
    """How a level becomes one vector per unit: each cell to a share of its channels (iTPN), or all cells of a
    unit together to every channel (Fast-iTPN)."""
    auxiliary: bool = True
    """Predict the targets also from the block at three quarters of stage 3, through two blocks more."""
    loss: Loss = "smooth-l1"
    """Between prediction and target: smooth L1, the negative cosine, or cross-entropy on raw targets, which
    has no lower bound (mmpretrain's 800-epoch config)."""
    positions: Literal["hidden", "all"] = "hidden"
    """Units that are supervised; the authors' iTPN supervises all."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Mean of each image channel for the student, in 0..1; ImageNet's."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Standard deviation of each image channel for the student, in 0..1; ImageNet's."""
    embed_norm_eps: float = 1e-6
    """Epsilon of the LayerNorms in front of the level embeddings (the mmpretrain models have 1e-5)."""

    def __post_init__(self) -> None:
        if not 1 <= self.target_width <= LARGEST:
            raise UserError(f"--objective.target-width: {self.target_width} lies outside 1..{LARGEST:,}")


class Predictions(NamedTuple):
    """The targets of all units as predicted, ``[B, N, T]``: from the pyramid, and by the auxiliary branch."""

    fused: Tensor
    auxiliary: Tensor | None


class DistillObjective(nn.Module):
    """Backbone and pyramid with what predicts a teacher's tokens from them.

    Fast-iTPN normalises the fused vectors with the norm that also stands before its pyramid.
    """

    def __init__(self, model: ModelConfig, config: DistillConfig) -> None:
        super().__init__()
        if model.pyramid is None:
            raise UserError("distillation predicts from the pyramid: model.pyramid must not be none")
        backbone, width = model.backbone, model.backbone.shape.width
        token_width = 4 * width if config.mask_token == "after-stem" else width
        self.config = config
        self.normalise = Normalise(config.mean, config.std, backbone.in_channels)
        self.model = Model(model)
        self.mask_token = nn.Parameter(torch.empty(token_width))
        self.embed: nn.Module
        if config.fuse == "cells":
            decoder = DecoderConfig(width=width, num_heads=1, embed_norm_eps=config.embed_norm_eps)
            self.embed = LevelEmbeds(model.pyramid.width, decoder)
        else:
            self.embed = UnitEmbeds(model.pyramid.width, width, config.embed_norm_eps)
        shared = model.pyramid.layers == "fast"
        self.norm = None if shared else nn.LayerNorm(width, backbone.norm_eps)
        self.head = nn.Linear(width, config.target_width)
        self.auxiliary = Auxiliary(backbone, config.target_width) if config.auxiliary else None
        self._teacher: list[Teacher] = []  # a list hides it: it is not trained, saved, shared out or compiled
        nn.init.normal_(self.mask_token, std=0.02)
        for part in (self.embed, self.head):
            init_linears(part, "normal")

    def attach(self, teacher: Teacher) -> None:
        """Give the objective the teacher that it is trained by.

        Raises:
            UserError: its targets are of another width, or of another grid.
        """
        config, grid = self.config, self.model.backbone.config.grid
        if teacher.width != config.target_width:
            raise UserError(
                f"--objective.target-width is {config.target_width}, but the teacher's targets have "
                f"{teacher.width} channels: give that number"
            )
        if teacher.grid != grid:
            raise UserError(f"the teacher has {teacher.grid} tokens, the student {grid} units")
        self._teacher = [teacher]

    @property
    def draw(self) -> BlockMasking:
        """What the loader draws for each sample."""
        config, backbone = self.config, self.model.backbone
        num_drops = self._num_drops if backbone.config.drop_path else 0
        return BlockMasking(
            backbone.config.grid, config.num_hidden, config.min_block, config.exact_count, num_drops
        )

    @property
    def _num_drops(self) -> int:
        return self.model.backbone.num_drops + (2 * GlobalBlock.num_drops if self.auxiliary else 0)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """From ``images: uint8 [B, c, H, W]``, ``hidden: bool [B, N]``, perhaps ``drop [B, D]``.

        Returns:
            ``loss`` and its parts ``fused`` and, with the auxiliary branch, ``auxiliary``.
        """
        images, hidden = batch["images"], batch["hidden"]
        target = self.targets(images)
        supervised = hidden if self.config.positions == "hidden" else None
        predictions = self.predict(self.normalise(images), hidden, batch.get("drop"))
        losses = {
            name: distill_loss(prediction, target, self.config.loss, supervised)
            for name, prediction in predictions._asdict().items()
            if prediction is not None
        }
        return {
            "loss": torch.stack(list(losses.values())).sum(),
            **{name: loss.detach() for name, loss in losses.items()},
        }

    def targets(self, images: Tensor) -> Tensor:
        """The teacher's tokens ``[B, N, T]`` for uint8 ``images``, resized to what it needs, in bf16."""
        [teacher] = self._teacher
        size = (teacher.image_size, teacher.image_size)
        pixels = images.float() / 255
        if pixels.shape[2:] != size:
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)
        with torch.autocast(images.device.type, torch.bfloat16):
            tokens: Tensor = teacher.to(images.device)(pixels)
        return tokens

    def predict(self, images: Tensor, hidden: Tensor, drop: Tensor | None = None) -> Predictions:
        """From normalised images ``[B, c, H, W]`` and ``hidden [B, N]``, True where the token goes.

        Args:
            drop: uniform numbers ``[B, D]`` that decide drop path in training.
        """
        backbone, pyramid = self.model.backbone, self.model.pyramid
        assert pyramid is not None
        grid = backbone.grid_of(images)
        early, late, last = self._split_drops(drop)
        cells = backbone.stem(images)
        if self.config.mask_token == "after-stem":
            token = self.mask_token.view(4, 4, -1).to(cells.dtype)
            cells = torch.where(hidden[:, :, None, None, None], token, cells)
        c4, c8, tokens = backbone.local(cells, early)
        if self.config.mask_token == "after-local":
            tokens = torch.where(hidden[:, :, None], self.mask_token.to(tokens.dtype), tokens)
        relative = backbone.relative(grid, device=images.device)
        taps = (3 * len(backbone.stage3) // 4,) if self.auxiliary else ()
        c16, tapped = backbone.context(backbone.embed(tokens, grid), relative, taps, late)
        levels = self.embed(pyramid(Features(c4, c8, c16)))
        norm = pyramid.norm if self.norm is None else self.norm
        fused = self.head(norm(reduce(torch.add, levels)))
        if self.auxiliary is None:
            return Predictions(fused, None)
        method = backbone.config.relative_resampling
        pairs = Relative(relative_index(grid).to(images.device), grid, method)
        return Predictions(fused, self.auxiliary(tapped[0], pairs, last))

    def _split_drops(self, drop: Tensor | None) -> tuple[Tensor | None, ...]:
        """The numbers for stages 1 and 2, for stage 3, and for the auxiliary branch."""
        if drop is None or not self.training:
            return None, None, None
        backbone = self.model.backbone
        late = len(backbone.stage3) * GlobalBlock.num_drops
        early = backbone.num_drops - late
        return torch.split(drop, [early, late, drop.shape[1] - early - late], dim=1)

    def begin_step(self, step: int, num_steps: int) -> None: ...

    def end_step(self, step: int, num_steps: int) -> None: ...

    def compile_blocks(self) -> list[nn.Module]:
        """The modules that are worth compiling one by one."""
        blocks: list[nn.Module] = [*self.model.backbone.blocks()]
        blocks += [self.model.pyramid] if self.model.pyramid else []
        return blocks + (list(self.auxiliary.blocks) if self.auxiliary else [])


class Auxiliary(nn.Module):
    """Two blocks, a LayerNorm and a linear layer on a block of stage 3; its bias tables are its own.

    The blocks' LayerNorms have epsilon 1e-5, whatever the backbone's, as the released weights need.
    """

    def __init__(self, config: HiViTConfig, target_width: int) -> None:
        super().__init__()
        width, depths, num_heads, layers = config.shape
        window = config.relative_grid or config.grid
        first = sum(depths[:2]) + 3 * depths[2] // 4  # they drop out as the blocks beside which they stand
        rates = torch.linspace(0, config.drop_path, sum(depths), device="cpu").tolist()[first : first + 2]
        self.blocks = nn.ModuleList(
            [
                GlobalBlock(
                    width, num_heads, config.stage3_mlp_ratio, 1e-5, window, config.layer_scale, rate,
                    fast=layers == "fast",
                )
                for rate in (*rates, config.drop_path)[:2]
            ]
        )  # fmt: skip
        self.norm = nn.LayerNorm(width, config.norm_eps)
        self.head = nn.Linear(width, target_width)
        init_linears(self, "normal")

    def forward(self, tokens: Tensor, relative: Relative, drop: Tensor | None = None) -> Tensor:
        """``drop [B, 4]``: the samples' numbers for drop path."""
        drops = [None, None] if drop is None else drop.chunk(2, dim=1)
        for block, uniform in zip(self.blocks, drops, strict=True):
            tokens = block(tokens, relative, uniform)
        tokens = self.head(self.norm(tokens))
        return tokens


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

    def forward(self, levels: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
        p4, p8, p16 = levels
        return [self.p4(p4), self.p8(p8), self.p16(p16)]


def distill_loss(prediction: Tensor, target: Tensor, loss: Loss, hidden: Tensor | None = None) -> Tensor:
    """Mean over samples of the mean over their hidden units, or over all units where ``hidden`` is None.

    ``smooth-l1`` has beta 1 and averages over channels; ``cosine`` is negative; ``cross-entropy`` takes the
    raw target as if it were a distribution, as mmpretrain's 800-epoch config does, and has no lower bound.

    Args:
        prediction, target: ``[B, N, T]``.
        hidden: bool ``[B, N]``.
    """
    prediction, target = prediction.float(), target.float()
    match loss:
        case "smooth-l1":
            per_unit = F.smooth_l1_loss(prediction, target, reduction="none").mean(-1)
        case "cosine":
            per_unit = -F.cosine_similarity(prediction, target, dim=-1)
        case "cross-entropy":
            per_unit = -(target * prediction.log_softmax(-1)).sum(-1)
    return per_unit.mean(1).mean() if hidden is None else mean_over_hidden(per_unit, hidden)
