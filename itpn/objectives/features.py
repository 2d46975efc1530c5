"""Masked feature modeling, the paper's second contribution: every stage of the pyramid is supervised.

A moving average of the student's backbone sees the whole image; its stage features are what the hidden units
must predict. The public text says no more than that: the weight, the loss, the normalisation, the branches,
the momentum and the supervised positions are choices of ours (docs/paper.md), each a field here.
"""

import math
import warnings
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from itpn.errors import UserError
from itpn.nn.hivit import Features, HiViT
from itpn.nn.layers import init_linears
from itpn.nn.pyramid import Model
from itpn.objectives.decoder import Decoder, DecoderConfig, fill, mean_over_hidden

Stage = Literal["c4", "c8", "c16"]
CELLS = {"c4": 16, "c8": 4, "c16": 1}


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    weight: float = 0.0
    """Weight of the feature loss beside the pixel loss; 0 is plain masked image modeling, without a
    teacher."""
    weight_ramp: float = 0.0
    """Share of the training over which the weight grows linearly from 0."""
    branches: Literal["sum", "levels"] = "sum"
    """Heads on the pixel decoder's output, or each level through one shared shallow decoder to its own
    head."""
    decoder_depth: int = 2
    """Blocks of the shared decoder of branches = levels."""
    stages: tuple[Stage, ...] = ("c4", "c8", "c16")
    """Backbone stages whose features are predicted."""
    normalisation: Literal["standardise", "layer-norm", "none"] = "standardise"
    """Targets: by each channel's running mean and variance; by LayerNorm per cell without affine; or as they
    are. LayerNorm leaves in what all units share, most of stage 3's features (docs/results.md)."""
    positions: Literal["hidden", "all"] = "hidden"
    """Units that are supervised."""
    beta: float = 1.0
    """Where the smooth-L1 loss turns from square to absolute."""
    momentum: float = 0.996
    """The teacher's momentum at the start; it rises to 1 by a half cosine."""
    momentum_warmup: bool = False
    """Hold the momentum at or below (t + 1) / (t + 10), t the step: a young teacher follows faster in short
    runs."""

    def __post_init__(self) -> None:
        if not 0 <= self.momentum <= 1:
            raise UserError(f"objective.features.momentum: {self.momentum} lies outside 0..1")
        if not self.stages:
            raise UserError("objective.features.stages is empty; name at least one of c4, c8, c16")
        if not self.beta > 0:
            raise UserError(f"objective.features.beta: {self.beta} must be greater than 0")
        if self.decoder_depth < 1:
            raise UserError(f"objective.features.decoder_depth: {self.decoder_depth} must be at least 1")
        if self.weight < 0:
            raise UserError(
                f"objective.features.weight: {self.weight} is negative; 0 switches the feature loss off"
            )


def momentum_at(step: int, num_steps: int, config: FeaturesConfig) -> float:
    """The teacher's momentum after optimiser step ``step`` (counted from 0)."""
    rising = 1 - (1 - config.momentum) * (math.cos(math.pi * step / num_steps) + 1) / 2
    return min(rising, (step + 1) / (step + 10)) if config.momentum_warmup else rising


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


class FeatureModeling(nn.Module):
    """Teacher, heads and loss. The student's levels or decoded units come in, scalars go out."""

    def __init__(self, student: Model, decoder: DecoderConfig, config: FeaturesConfig) -> None:
        super().__init__()
        self.config, self.weight = config, config.weight
        backbone = student.backbone
        width = backbone.config.shape.width
        self.teacher = HiViT(replace(backbone.config, drop_path=0.0)).requires_grad_(False)
        self.teacher.load_state_dict(backbone.state_dict())
        widths = {"c4": width // 4, "c8": width // 2, "c16": width}
        self.heads = nn.ModuleDict({s: nn.Linear(decoder.width, CELLS[s] * widths[s]) for s in config.stages})
        if config.normalisation == "standardise":
            self.statistics = nn.ModuleDict({s: RunningStatistics(widths[s]) for s in config.stages})
        if config.branches == "levels":
            if student.pyramid is None:
                raise UserError(
                    "objective.features.branches: 'levels' needs a pyramid; use 'sum' or give the model one"
                )
            self.level_tokens = nn.ParameterDict(
                {s: nn.Parameter(torch.empty(decoder.width)) for s in config.stages}
            )
            self.decoder = Decoder(backbone.config, decoder, config.decoder_depth)
            for token in self.level_tokens.values():
                nn.init.normal_(token, std=0.02)
        init_linears(self.heads, decoder.init)
        self._variance: Tensor | None = None

    @torch.no_grad()
    def teach(self, images: Tensor) -> dict[str, Tensor]:
        """The teacher's features of whole images: per stage ``[B, N, cells, C_s]``, in fp32."""
        features: Features = self.teacher(images)
        stages = {stage: getattr(features, stage).float() for stage in self.config.stages}
        return {s: x.reshape(*x.shape[:2], CELLS[s], x.shape[-1]) for s, x in stages.items()}

    @torch.no_grad()
    def normalise(self, stage: str, cells: Tensor) -> Tensor:
        """A stage's features as targets."""
        match self.config.normalisation:
            case "layer-norm":
                return F.layer_norm(cells, cells.shape[-1:])
            case "standardise":
                return cast(Tensor, self.statistics[stage](cells))
            case "none":
                return cells

    def predict(
        self, decoded: Tensor, embedded: list[Tensor], keep: Tensor, hidden: Tensor
    ) -> dict[str, Tensor]:
        """Each stage's prediction ``[B, N, cells * C_s]``."""
        if self.config.branches == "sum":
            return {stage: head(decoded) for stage, head in self.heads.items()}
        by_stage = dict(zip(CELLS, embedded, strict=True))
        units = [fill(by_stage[s], keep, hidden, self.level_tokens[s]) for s in self.heads]
        grid = self.decoder.grid
        branches = self.decoder(torch.cat(units), grid).chunk(len(units))
        return {stage: self.heads[stage](x) for stage, x in zip(self.heads, branches, strict=True)}

    def forward(
        self, images: Tensor, decoded: Tensor, embedded: list[Tensor], keep: Tensor, hidden: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Smooth-L1 between predictions and targets on the supervised units, averaged over stages.

        Args:
            images: whole images ``[B, c, H, W]``; the other arguments hold M masks of each, ``[B * M, ...]``.
        """
        features = self.teach(images)
        predictions = self.predict(decoded, embedded, keep, hidden)
        supervised = hidden if self.config.positions == "hidden" else torch.ones_like(hidden)
        parts: dict[str, Tensor] = {}
        losses = []
        for stage, cells in features.items():
            target = self.normalise(stage, cells)
            repeated = repeated_for_masks(target, len(keep) // len(images)).flatten(2)
            error = F.smooth_l1_loss(
                predictions[stage].float(), repeated, reduction="none", beta=self.config.beta
            )
            losses.append(mean_over_hidden(error.mean(-1), supervised))
            parts[f"feature_{stage}"] = losses[-1].detach()
            parts[f"variance_{stage}"] = relative_variance(cells)
            parts[f"position_share_{stage}"] = position_share(target)
        self._variance = torch.stack([parts[f"variance_{stage}"] for stage in features]).min()
        feature = torch.stack(losses).mean()
        return feature, {"feature": feature.detach(), **parts}

    def begin_step(self, step: int, num_steps: int) -> None:
        ramp = self.config.weight_ramp * num_steps
        self.weight = self.config.weight * (min(1.0, (step + 1) / ramp) if ramp else 1.0)
        if self.config.normalisation == "standardise":
            for statistics in self.statistics.values():
                cast(RunningStatistics, statistics).pending.zero_()  # of a step that was left out

    def compile_blocks(self) -> list[nn.Module]:
        return [*self.teacher.blocks(), *(self.decoder.blocks if self.config.branches == "levels" else [])]

    @torch.no_grad()
    def end_step(self, student: HiViT, step: int, num_steps: int) -> None:
        """Move the teacher towards the student, and warn where its features have become all alike."""
        momentum = momentum_at(step, num_steps, self.config)
        torch._foreach_lerp_(list(self.teacher.parameters()), list(student.parameters()), 1 - momentum)
        if self.config.normalisation == "standardise":
            for statistics in self.statistics.values():
                cast(RunningStatistics, statistics).end_step()
        if step % 100 == 0 and self._variance is not None and self._variance.item() < 1e-4:
            warnings.warn(
                f"step {step}: the teacher's features hardly vary over the batch (variance "
                f"{self._variance.item():.1e}); it may have collapsed. Lower objective.features.weight "
                "or raise objective.features.momentum.",
                stacklevel=2,
            )


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
