"""Supervision of every stage: heads that predict a teacher's features at stride 4, 8 and 16, and their loss.

The teacher is a moving average of the student (`objectives/features.py`) or a frozen vision transformer. The
weight, the loss, the normalisation and the supervised positions are choices of ours (docs/paper.md).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from itpn.errors import UserError
from itpn.nn.hivit import LARGEST
from itpn.nn.layers import init_linears, to_map, units_of
from itpn.nn.positions import Grid
from itpn.objectives.decoder import mean_over_hidden
from itpn.objectives.teacher import Teacher

Stage = Literal["c4", "c8", "c16"]
CELLS: dict[Stage, int] = {"c4": 16, "c8": 4, "c16": 1}


@dataclass(frozen=True, kw_only=True)
class StagesConfig:
    part: ClassVar[str] = ""
    """The objective's field that holds it."""

    weight: float = 0.0
    """Weight of this loss beside the objective's own. 0 switches it off."""
    weight_ramp: float = 0.0
    """Share of the training during which the weight rises linearly from 0."""
    stages: tuple[Stage, ...] = ("c4", "c8", "c16")
    """Backbone stages whose features are predicted."""
    normalisation: Literal["standardise", "layer-norm", "none"] = "standardise"
    """Normalisation of the targets: by each channel's running mean and variance, by LayerNorm per cell
    without affine, or none. LayerNorm keeps what all units share, which is most of stage 3's features
    (docs/results.md)."""
    positions: Literal["hidden", "all"] = "hidden"
    """Units that are supervised: hidden ones or all."""
    beta: float = 1.0
    """Beta of the smooth-L1 loss, its transition from square to absolute."""

    def __post_init__(self) -> None:
        name = f"objective.{self.part}"
        if not self.stages or len(set(self.stages)) < len(self.stages):
            raise UserError(f"{name}.stages: name at least one of {', '.join(CELLS)}, and none twice")
        if not 0 < self.beta < math.inf:
            raise UserError(f"{name}.beta: {self.beta} must be greater than 0")
        if not 0 <= self.weight < math.inf:
            raise UserError(
                f"{name}.weight: {self.weight} must be finite and at least 0; 0 switches this loss off"
            )
        if not 0 <= self.weight_ramp <= 1:
            raise UserError(f"{name}.weight_ramp: {self.weight_ramp} lies outside 0..1")


@dataclass(frozen=True, kw_only=True)
class FrozenConfig(StagesConfig):
    """Stages supervised by the frozen teacher. Its blocks at one third, two thirds and the end of its depth
    are the targets for strides 4, 8 and 16."""

    part: ClassVar[str] = "frozen"

    width: int = 768
    """Channels of the teacher's blocks: 768 for CLIP B/16, 1024 for L/14."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.width <= LARGEST:
            raise UserError(f"objective.frozen.width: {self.width} lies outside 1..{LARGEST:,}")


class RunningStatistics(nn.Module):
    """Mean and variance per channel over past steps, free of start-up bias; the same on every rank.

    What a step sees is added only once the step has ended, so that accumulation changes nothing.
    """

    averages: Tensor
    pending: Tensor

    def __init__(self, width: int, momentum: float = 0.99) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("averages", torch.zeros(3, width))  # of 1, x, x^2
        self.register_buffer("pending", torch.zeros(3, width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Standardise ``[..., C]`` by what past steps have seen (the first step passes unchanged)."""
        flat = x.flatten(0, -2)
        spread, centre = torch.var_mean(flat, 0, correction=0)
        self.pending += len(flat) * torch.stack([torch.ones_like(centre), centre, spread + centre.square()])
        count, mean, square = self.averages
        count = count.clamp_min(1e-12)
        mean, variance = mean / count, square / count - (mean / count).square()
        return torch.where(self.averages[0] > 0, (x - mean) / (variance.clamp_min(0) + 1e-6).sqrt(), x)

    def end_step(self) -> None:
        if dist.is_initialized():
            dist.all_reduce(self.pending)
        self.averages.lerp_(self.pending / self.pending[0], 1 - self.momentum)
        self.pending.zero_()


class StageHeads(nn.Module):
    """A linear head per stage, which predicts all cells of a unit at once, and the loss.

    Args:
        width: channels of what the heads read.
        targets: channels of each stage's features.
    """

    def __init__(
        self, width: int, targets: Mapping[Stage, int], config: StagesConfig, init: str = "normal"
    ) -> None:
        super().__init__()
        self.config, self.weight = config, config.weight
        self.heads = nn.ModuleDict({s: nn.Linear(width, CELLS[s] * targets[s]) for s in config.stages})
        if config.normalisation == "standardise":
            self.statistics = nn.ModuleDict({s: RunningStatistics(targets[s]) for s in config.stages})
        init_linears(self.heads, init)

    def loss(
        self, predictions: Mapping[Stage, Tensor], features: Mapping[Stage, Tensor], hidden: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Smooth-L1 between predictions and targets on the supervised units, averaged over stages.

        Args:
            predictions: each stage's ``[B * M, N, cells * C_s]``, for M masks of each image.
            features: the teacher's, ``[B, N, cells, C_s]`` in fp32.
            hidden: bool ``[B * M, N]``.
        """
        supervised = hidden if self.config.positions == "hidden" else torch.ones_like(hidden)
        parts: dict[str, Tensor] = {}
        losses = []
        for stage, cells in features.items():
            target = self.normalise(stage, cells)
            repeated = repeated_for_masks(target, len(hidden) // len(target)).flatten(2)
            error = F.smooth_l1_loss(
                predictions[stage].float(), repeated, reduction="none", beta=self.config.beta
            )
            losses.append(mean_over_hidden(error.mean(-1), supervised))
            parts[f"feature_{stage}"] = losses[-1].detach()
            parts[f"variance_{stage}"] = relative_variance(cells)
            parts[f"position_share_{stage}"] = position_share(target)
        return torch.stack(losses).mean(), parts

    @torch.no_grad()
    def normalise(self, stage: Stage, cells: Tensor) -> Tensor:
        """A stage's features as targets."""
        match self.config.normalisation:
            case "layer-norm":
                return F.layer_norm(cells, cells.shape[-1:])
            case "standardise":
                return cast(Tensor, self.statistics[stage](cells))
            case "none":
                return cells

    def begin_step(self, step: int, num_steps: int) -> None:
        ramp = self.config.weight_ramp * num_steps
        self.weight = self.config.weight * (min(1.0, (step + 1) / ramp) if ramp else 1.0)
        for statistics in self._statistics():
            statistics.pending.zero_()  # of a step that was left out

    @torch.no_grad()
    def keep_statistics(self) -> None:
        """At the end of a step: what it saw counts from the next one on."""
        for statistics in self._statistics():
            statistics.end_step()

    def _statistics(self) -> list[RunningStatistics]:
        standardises = self.config.normalisation == "standardise"
        return cast(list[RunningStatistics], [*self.statistics.values()]) if standardises else []


class FrozenStages(StageHeads):
    """Heads for the blocks of a frozen teacher, all on one vector per unit."""

    config: FrozenConfig

    def __init__(self, width: int, config: FrozenConfig, init: str = "normal") -> None:
        super().__init__(width, dict.fromkeys(CELLS, config.width), config, init)

    def check(self, teacher: Teacher) -> None:
        """That a teacher's blocks have the width that the heads are made for.

        Raises:
            UserError: they do not.
        """
        width = teacher.vit.embed_dim
        if width != self.config.width:
            raise UserError(
                f"--objective.frozen.width is {self.config.width}, but the teacher's blocks have {width} "
                "channels: give that number"
            )

    def forward(
        self, units: Tensor, blocks: Sequence[Tensor], grid: Grid, hidden: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss, and what is logged of it.

        Args:
            units: what the heads read, ``[B * M, N, E]``.
            blocks: the teacher's, ``[B, N, T]``, of ``grid``.
            hidden: bool ``[B * M, N]``.
        """
        features = upsampled(blocks, grid, self.config.stages)
        loss, parts = self.loss({s: self.heads[s](units) for s in self.config.stages}, features, hidden)
        logged = {f"frozen_{name}": value for name, value in parts.items()}
        return self.weight * loss, {"frozen": loss.detach(), **logged}


@torch.no_grad()
def upsampled(blocks: Sequence[Tensor], grid: Grid, stages: Sequence[Stage]) -> dict[Stage, Tensor]:
    """A teacher's blocks as maps, upsampled bilinearly to each stage's cells: ``[B, N, cells, T]``, fp32."""
    features: dict[Stage, Tensor] = {}
    for (stage, num_cells), tokens in zip(CELLS.items(), blocks, strict=True):
        if stage in stages:
            side = math.isqrt(num_cells)
            cells = F.interpolate(to_map(tokens.float(), grid), scale_factor=side, mode="bilinear")
            features[stage] = units_of(cells, side).flatten(2, 3)
    return features


def repeated_for_masks(x: Tensor, num_masks: int) -> Tensor:
    """``[B, ...]`` to ``[B * masks, ...]``, each sample as often as it has masks; no copy for one."""
    return x.repeat_interleave(num_masks, 0) if num_masks > 1 else x


def relative_variance(features: Tensor) -> Tensor:
    """Variance of ``[B, N, cells, C]`` over batch and positions, over the mean square: 0 is collapse."""
    spread, centre = torch.var_mean(features.flatten(0, 2), 0, correction=0)
    return spread.mean() / (spread + centre.square()).mean().clamp_min(1e-20)


def position_share(target: Tensor) -> Tensor:
    """The share of the variance of targets ``[B, N, cells, C]`` that position alone explains.

    Unbiased: the noise of a mean over B samples is taken out, so it may fall a little below 0. It is 0 for a
    single sample, which cannot tell the two apart.
    """
    by_position = target.flatten(1, 2)
    if len(target) == 1:
        return target.new_zeros(())
    total = by_position.flatten(0, 1).var(0, unbiased=False).mean()
    noise = by_position.var(0).mean() / len(target)
    between = by_position.mean(0).var(0, unbiased=False).mean() - noise
    return between / total.clamp_min(1e-20)
