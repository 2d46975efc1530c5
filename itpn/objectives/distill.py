"""Pre-training on a teacher's features, as iTPN (arXiv 2211.12735) and Fast-iTPN do: student and losses.

Every unit goes through the whole student; hidden ones are replaced by a mask token. The pyramid's levels are
fused into one vector per unit, which predicts the teacher's token of that unit.
"""

from dataclasses import dataclass, field
from functools import reduce
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from itpn.errors import UserError
from itpn.nn.hivit import LARGEST, Features
from itpn.nn.layers import GlobalBlock, init_linears, to_map, units_of
from itpn.nn.normalise import Normalise
from itpn.nn.pyramid import Model, ModelConfig, level_maps
from itpn.objectives.auxiliary import Auxiliary
from itpn.objectives.decoder import DecoderConfig, LevelEmbeds, UnitEmbeds, mean_over_hidden
from itpn.objectives.masking import BlockMasking
from itpn.objectives.stages import FrozenConfig, FrozenStages
from itpn.objectives.teacher import Taught, Teacher, TeacherConfig
from itpn.objectives.work import flops_of

Loss = Literal["smooth-l1", "cosine", "cross-entropy"]


@dataclass(frozen=True, kw_only=True)
class DistillConfig(TeacherConfig):
    target_width: int = 512
    """Channels of the teacher's targets: 512 for CLIP B/16, 768 for CLIP L/14 (both projected)."""
    mask_token: Literal["after-stem", "after-local"] = "after-local"
    """Place of the mask token: after the stem (Fast-iTPN), or after stages 1 and 2 (iTPN). In the latter,
    hidden pixels reach the pyramid through the laterals."""
    num_hidden: int = 75
    """Number of hidden units per image, in blocks."""
    min_block: int = 16
    """Smallest block, in units."""
    exact_count: bool = True
    """Hide exactly num_hidden units of every image. Otherwise at most so many, as published."""
    fuse: Literal["cells", "units"] = "cells"
    """Fusion of a level into one vector per unit. cells: each cell gives a share of the channels (iTPN).
    units: all cells of a unit together give every channel (Fast-iTPN)."""
    auxiliary: bool = True
    """Predict the targets also from the block at three quarters of stage 3, through two extra blocks."""
    loss: Loss = "smooth-l1"
    """Loss between prediction and target: smooth L1, negative cosine, or cross-entropy on raw targets.
    Cross-entropy has no lower bound here (mmpretrain's 800-epoch config)."""
    positions: Literal["hidden", "all"] = "hidden"
    """Units that are supervised: hidden ones or all. The authors' iTPN supervises all."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Mean of each image channel for the student, in 0..1. Default: ImageNet's."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Standard deviation of each image channel for the student, in 0..1. Default: ImageNet's."""
    embed_norm_eps: float = 1e-6
    """Epsilon of the LayerNorms before the level embeddings (1e-5 in the mmpretrain models)."""
    frozen: FrozenConfig = field(default_factory=FrozenConfig)

    def __post_init__(self) -> None:
        if not 1 <= self.target_width <= LARGEST:
            raise UserError(f"--objective.target-width: {self.target_width} lies outside 1..{LARGEST:,}")


class Predictions(NamedTuple):
    """The targets of all units as predicted, ``[B, N, T]``: from the pyramid, and by the auxiliary branch."""

    fused: Tensor
    auxiliary: Tensor | None


class Comparison(NamedTuple):
    """What student and teacher see and say, to look at.

    Pictures ``[B, c, H, W]`` in 0..1; the pyramid's maps, fine to coarse; of each unit the teacher's target
    and the student's prediction from the masked image, both of length 1, and their cosine similarity.
    """

    original: Tensor
    masked: Tensor
    levels: list[Tensor]
    target: Tensor
    prediction: Tensor
    similarity: Tensor


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
        self.frozen = FrozenStages(width, config.frozen) if config.frozen.weight else None

    @property
    def teacher_config(self) -> TeacherConfig:
        return self.config

    @property
    def teachers(self) -> list[nn.Module]:
        """What runs forward only."""
        return [*self._teacher]

    def attach(self, teacher: Teacher) -> None:
        """Give the objective the teacher that it is trained by.

        Raises:
            UserError: its targets or blocks are of another width, or of another grid.
        """
        if teacher.width != self.config.target_width:
            raise UserError(
                f"--objective.target-width is {self.config.target_width}, but the teacher's targets have "
                f"{teacher.width} channels: give that number"
            )
        teacher.check(self.model.backbone.config.grid)
        if self.frozen is not None:
            self.frozen.check(teacher)
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
            ``loss`` and its parts ``fused``, with the auxiliary branch ``auxiliary``, and with supervision of
            the stages ``frozen`` and each stage's numbers.
        """
        [teacher] = self._teacher
        return self.losses(batch, teacher.teach(batch["images"]))

    def losses(self, batch: dict[str, Tensor], taught: Taught) -> dict[str, Tensor]:
        """What `forward` returns, from what the teacher said."""
        images, hidden = batch["images"], batch["hidden"]
        supervised = hidden if self.config.positions == "hidden" else None
        units, auxiliary = self.encode(self.normalise(images), hidden, batch.get("drop"))
        losses = {
            name: distill_loss(prediction, taught.targets, self.config.loss, supervised)
            for name, prediction in (("fused", self.head(units)), ("auxiliary", auxiliary))
            if prediction is not None
        }
        loss = torch.stack(list(losses.values())).sum()
        parts = {name: loss.detach() for name, loss in losses.items()}
        if self.frozen is not None:
            frozen, logged = self.frozen(units, taught.blocks, self.model.backbone.grid_of(images), hidden)
            loss, parts = loss + frozen, parts | logged
        return {"loss": loss, **parts}

    def predict(self, images: Tensor, hidden: Tensor, drop: Tensor | None = None) -> Predictions:
        """As `encode`, but the fused vectors as predictions, too."""
        units, auxiliary = self.encode(images, hidden, drop)
        return Predictions(self.head(units), auxiliary)

    def encode(
        self, images: Tensor, hidden: Tensor, drop: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """From normalised images ``[B, c, H, W]`` and ``hidden [B, N]``, True where the token goes, to the
        pyramid's fused vectors ``[B, N, C]`` and the auxiliary branch's prediction.

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
        units = norm(reduce(torch.add, levels))
        return units, self.auxiliary(tapped[0], relative, last) if self.auxiliary else None

    def _split_drops(self, drop: Tensor | None) -> tuple[Tensor | None, ...]:
        """The numbers for stages 1 and 2, for stage 3, and for the auxiliary branch."""
        if drop is None or not self.training:
            return None, None, None
        backbone = self.model.backbone
        late = len(backbone.stage3) * GlobalBlock.num_drops
        early = backbone.num_drops - late
        return torch.split(drop, [early, late, drop.shape[1] - early - late], dim=1)

    @torch.no_grad()
    def compare(self, images: Tensor, hidden: Tensor) -> Comparison:
        """Student and teacher on uint8 ``images``; the masked picture shows what stage 3 sees."""
        [teacher] = self._teacher
        pixels = self.normalise(images)
        grid, patch_size = self.model.backbone.grid_of(pixels), self.model.backbone.config.patch_size
        units = units_of(pixels, patch_size)
        masked = to_map(torch.where(hidden[:, :, None, None, None], torch.zeros_like(units), units), grid)
        target = F.normalize(teacher.teach(images).targets, dim=-1)
        prediction = F.normalize(self.predict(pixels, hidden).fused.float(), dim=-1)
        _, levels = self.model(pixels)
        similarity = (target * prediction).sum(-1, keepdim=True)
        return Comparison(
            self.normalise.undo(pixels),
            self.normalise.undo(masked),
            level_maps(levels, grid),
            *(to_map(tokens, grid) for tokens in (target, prediction, similarity)),
        )

    def begin_step(self, step: int, num_steps: int) -> None:
        if self.frozen is not None:
            self.frozen.begin_step(step, num_steps)

    def end_step(self, step: int, num_steps: int) -> None:
        if self.frozen is not None:
            self.frozen.keep_statistics()

    def flops_per_image(self) -> float:
        """Floating-point operations of a training step on one image: matrix products, backward as twice
        forward, nothing but forward for the teacher."""
        [teacher] = self._teacher
        with torch.device("meta"):
            twin = DistillObjective(self.model.config, self.config)
            backbone = self.model.backbone.config
            images = torch.empty(1, backbone.in_channels, backbone.image_size, backbone.image_size)
            hidden = torch.empty(1, backbone.num_units, dtype=torch.bool)
            frozen, taught = teacher.flops_per_image()
            student, _ = flops_of(lambda: twin.losses({"images": images, "hidden": hidden}, taught))
        return float(3 * student + frozen)

    def compile_blocks(self) -> list[nn.Module]:
        """The modules that are worth compiling one by one."""
        blocks: list[nn.Module] = [*self.model.backbone.blocks()]
        blocks += [self.model.pyramid] if self.model.pyramid else []
        return blocks + (list(self.auxiliary.blocks) if self.auxiliary else [])


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
