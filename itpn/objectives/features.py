"""Masked feature modeling, the paper's second contribution: every stage of the pyramid is supervised.

A moving average of the student's backbone sees the whole image; its stage features are what the hidden units
must predict. The public text says no more than that: the branches and the momentum are choices of ours
(docs/paper.md), as is what all supervision of stages shares (`objectives/stages.py`).
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from itpn.errors import UserError
from itpn.nn.hivit import Features, HiViT
from itpn.nn.pyramid import Model
from itpn.objectives.decoder import Decoder, DecoderConfig, fill
from itpn.objectives.stages import CELLS, Stage, StageHeads, StagesConfig


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig(StagesConfig):
    """Stages supervised by a moving average of the backbone. Weight 0 switches this off."""

    part: ClassVar[str] = "features"

    branches: Literal["sum", "levels"] = "sum"
    """Prediction heads: on the pixel decoder's output, or per level after one shared shallow decoder."""
    decoder_depth: int = 2
    """Number of blocks of the shared decoder, with branches = levels."""
    momentum: float = 0.996
    """Initial momentum of the teacher. It rises to 1 by a half cosine."""
    momentum_warmup: bool = False
    """Limit the momentum at step t to (t + 1) / (t + 10), so that the teacher follows faster in short
    runs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum <= 1:
            raise UserError(f"objective.features.momentum: {self.momentum} lies outside 0..1")
        if self.decoder_depth < 1:
            raise UserError(f"objective.features.decoder_depth: {self.decoder_depth} must be at least 1")


def momentum_at(step: int, num_steps: int, config: FeaturesConfig) -> float:
    """The teacher's momentum after optimiser step ``step`` (counted from 0)."""
    rising = 1 - (1 - config.momentum) * (math.cos(math.pi * step / num_steps) + 1) / 2
    return min(rising, (step + 1) / (step + 10)) if config.momentum_warmup else rising


class FeatureModeling(StageHeads):
    """The teacher, with heads and loss. The student's levels or decoded units come in, scalars go out."""

    config: FeaturesConfig

    def __init__(self, student: Model, decoder: DecoderConfig, config: FeaturesConfig) -> None:
        backbone = student.backbone
        width = backbone.config.shape.width
        teacher = HiViT(replace(backbone.config, drop_path=0.0)).requires_grad_(False)
        targets: Mapping[Stage, int] = {"c4": width // 4, "c8": width // 2, "c16": width}
        super().__init__(decoder.width, targets, config, decoder.init)
        self.teacher = teacher
        self.teacher.load_state_dict(backbone.state_dict())
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
        self._variance: Tensor | None = None

    @torch.no_grad()
    def teach(self, images: Tensor) -> dict[Stage, Tensor]:
        """The teacher's features of whole images: per stage ``[B, N, cells, C_s]``, in fp32."""
        features: Features = self.teacher(images)
        stages = {stage: getattr(features, stage).float() for stage in self.config.stages}
        return {s: x.reshape(*x.shape[:2], CELLS[s], x.shape[-1]) for s, x in stages.items()}

    def predict(
        self, decoded: Tensor, embedded: list[Tensor], keep: Tensor, hidden: Tensor
    ) -> dict[Stage, Tensor]:
        """Each stage's prediction ``[B, N, cells * C_s]``."""
        stages = self.config.stages
        if self.config.branches == "sum":
            return {stage: self.heads[stage](decoded) for stage in stages}
        by_stage = dict(zip(CELLS, embedded, strict=True))
        units = [fill(by_stage[s], keep, hidden, self.level_tokens[s]) for s in stages]
        grid = self.decoder.grid
        branches = self.decoder(torch.cat(units), grid).chunk(len(units))
        return {stage: self.heads[stage](x) for stage, x in zip(stages, branches, strict=True)}

    def forward(
        self, images: Tensor, decoded: Tensor, embedded: list[Tensor], keep: Tensor, hidden: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and what is logged of it.

        Args:
            images: whole images ``[B, c, H, W]``; the other arguments hold M masks of each, ``[B * M, ...]``.
        """
        features = self.teach(images)
        feature, parts = self.loss(self.predict(decoded, embedded, keep, hidden), features, hidden)
        self._variance = torch.stack([parts[f"variance_{stage}"] for stage in features]).min()
        return feature, {"feature": feature.detach(), **parts}

    def compile_blocks(self) -> list[nn.Module]:
        return [*self.teacher.blocks(), *(self.decoder.blocks if self.config.branches == "levels" else [])]

    @torch.no_grad()
    def end_step(self, student: HiViT, step: int, num_steps: int) -> None:
        """Move the teacher towards the student, and warn where its features have become all alike."""
        momentum = momentum_at(step, num_steps, self.config)
        torch._foreach_lerp_(list(self.teacher.parameters()), list(student.parameters()), 1 - momentum)
        self.keep_statistics()
        if step % 100 == 0 and self._variance is not None and self._variance.item() < 1e-4:
            warnings.warn(
                f"step {step}: the teacher's features hardly vary over the batch (variance "
                f"{self._variance.item():.1e}); it may have collapsed. Lower objective.features.weight "
                "or raise objective.features.momentum.",
                stacklevel=2,
            )
