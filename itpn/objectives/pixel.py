"""Pre-training on pixels (arXiv 2211.12735): masked image modeling, with or without MFM.

Visible units go through backbone and pyramid; the levels are embedded and summed, hidden units are filled
with mask tokens, and a decoder predicts every hidden unit's pixels, normalised by the unit's own mean and
variance. Without a pyramid the same objective is MAE.
"""

from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from itpn.errors import UserError
from itpn.nn.layers import init_linears, to_map, units_of
from itpn.nn.normalise import Normalise
from itpn.nn.pyramid import Levels, Model, ModelConfig, level_maps
from itpn.objectives.decoder import Decoder, DecoderConfig, build_embed, fill, mean_over_hidden
from itpn.objectives.features import FeatureModeling, FeaturesConfig
from itpn.objectives.masking import RandomMasking, hidden_units, num_kept
from itpn.objectives.stages import FrozenConfig, FrozenStages, repeated_for_masks
from itpn.objectives.teacher import Taught, Teacher, TeacherConfig
from itpn.objectives.work import flops_of


@dataclass(frozen=True, kw_only=True)
class PixelConfig:
    mask_ratio: float = 0.75
    """Share of hidden units."""
    masks_per_image: int = 1
    """Number of masks per image of a batch. They share one forward pass of the feature teacher."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Mean of each image channel, in 0..1. Default: ImageNet's."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Standard deviation of each image channel, in 0..1. Default: ImageNet's."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    frozen: FrozenConfig = field(default_factory=FrozenConfig)
    teacher: str = ""
    """timm name of the frozen teacher. It is downloaded unless teacher_weights is given."""
    teacher_weights: Path | None = None
    """Weights file of the frozen teacher. Without a teacher name, it must be one of OpenAI's CLIP models."""

    def __post_init__(self) -> None:
        if not self.frozen.weight and (self.teacher or self.teacher_weights):
            raise UserError("--objective.teacher has no effect; give --objective.frozen.weight above 0")
        if self.masks_per_image < 1:
            raise UserError(f"objective.masks_per_image: {self.masks_per_image} must be at least 1")


class Reconstruction(NamedTuple):
    """Pictures ``[B, c, H, W]`` in 0..1, and the pyramid's maps ``[B, F, h, w]`` to look at, fine to coarse;
    MAE has none."""

    original: Tensor
    masked: Tensor
    reconstruction: Tensor
    levels: list[Tensor]


def normalise_units(units: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Units ``[B, N, D]`` by their own mean and unbiased variance; also returns mean and deviation ``[B, N,
    1]``."""
    variance, mean = torch.var_mean(units, -1, keepdim=True)
    deviation = (variance + 1e-6).sqrt()
    return (units - mean) / deviation, mean, deviation


class PixelObjective(nn.Module):
    def __init__(self, model: ModelConfig, config: PixelConfig) -> None:
        super().__init__()
        backbone, width = model.backbone, config.decoder.width
        self.config = config
        self.normalise = Normalise(config.mean, config.std, backbone.in_channels)
        self.num_units, self.num_kept = backbone.num_units, num_kept(backbone.num_units, config.mask_ratio)
        self.model = Model(model)
        self.embed = build_embed(model, config.decoder)
        self.mask_token = nn.Parameter(torch.empty(width))
        self.decoder = Decoder(backbone, config.decoder, config.decoder.depth)
        self.head = nn.Linear(width, backbone.patch_size**2 * backbone.in_channels)
        self.features = (
            FeatureModeling(self.model, config.decoder, config.features) if config.features.weight else None
        )
        nn.init.normal_(self.mask_token, std=0.02)
        init_linears(self.head, config.decoder.init)
        self.frozen = (
            FrozenStages(width, config.frozen, config.decoder.init) if config.frozen.weight else None
        )
        self._teacher: list[Teacher] = []  # a list hides it: it is not trained, saved, shared out or compiled

    @property
    def teacher_config(self) -> TeacherConfig | None:
        """The frozen teacher that it needs."""
        if self.frozen is None:
            return None
        config = self.config
        return TeacherConfig(teacher=config.teacher, teacher_weights=config.teacher_weights, target="tokens")

    def attach(self, teacher: Teacher) -> None:
        """Give the objective its frozen teacher.

        Raises:
            UserError: its blocks are of another width, or of another grid.
        """
        assert self.frozen is not None
        self.frozen.check(teacher)
        teacher.check(self.model.backbone.config.grid)
        self._teacher = [teacher]

    @property
    def teachers(self) -> list[nn.Module]:
        """What runs forward only, the moving average first."""
        average: list[nn.Module] = [self.features.teacher] if self.features else []
        return [*average, *self._teacher]

    @property
    def draw(self) -> RandomMasking:
        """What the loader draws for each sample."""
        backbone = self.model.backbone
        num_drops = backbone.num_drops if backbone.config.drop_path else 0
        return RandomMasking(self.num_units, self.num_kept, self.config.masks_per_image, num_drops)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """From ``images: uint8 [B, c, H, W]``, ``keep: long [B, M, K]``, perhaps ``drop [B, M, D]``.

        Returns:
            ``loss`` and its parts ``pixel`` and, with masked feature modeling, ``feature``, with a frozen
            teacher ``frozen``, and each stage's numbers.
        """
        taught = None
        if self.frozen is not None:
            [teacher] = self._teacher
            taught = teacher.teach(batch["images"])
        return self.losses(batch, taught)

    def losses(self, batch: dict[str, Tensor], taught: Taught | None) -> dict[str, Tensor]:
        """What `forward` returns, from what the frozen teacher said."""
        whole = self.normalise(batch["images"])
        keep, drop = batch["keep"].flatten(0, 1), batch["drop"].flatten(0, 1) if "drop" in batch else None
        images = repeated_for_masks(whole, self.config.masks_per_image)
        hidden = hidden_units(keep, self._num_units(images))

        embedded, _ = self.encode(images, keep, drop)
        grid = self.model.backbone.grid_of(images)
        decoded = self.decode(embedded, keep, hidden, grid)
        loss = self.pixel_loss(self.head(decoded), images, hidden)
        parts = {"pixel": loss.detach()}
        if self.features is not None:
            feature, logged = self.features(whole, decoded, embedded, keep, hidden)
            loss, parts = loss + self.features.weight * feature, parts | logged
        if self.frozen is not None and taught is not None:
            frozen, logged = self.frozen(decoded, taught.blocks, grid, hidden)
            loss, parts = loss + frozen, parts | logged
        return {"loss": loss, **parts}

    def encode(
        self, images: Tensor, keep: Tensor, drop: Tensor | None = None
    ) -> tuple[list[Tensor], Levels | None]:
        """The visible units at decoder width, one ``[B, K, E]`` per level (one alone without a pyramid)."""
        features, levels = self.model(images, keep, drop)
        return (self.embed(levels) if levels else [self.embed(features.c16)]), levels

    def decode(self, embedded: list[Tensor], keep: Tensor, hidden: Tensor, grid: tuple[int, int]) -> Tensor:
        """Every unit ``[B, N, E]`` after the decoder. Each level brings its own mask token, so three add
        up."""
        units = fill(reduce(torch.add, embedded), keep, hidden, len(embedded) * self.mask_token)
        decoded: Tensor = self.decoder(units, grid)
        return decoded

    def pixel_loss(self, prediction: Tensor, images: Tensor, hidden: Tensor) -> Tensor:
        """Mean square error over hidden units against pixels normalised per unit."""
        target, _, _ = normalise_units(units_of(images, self.model.backbone.config.patch_size).flatten(2))
        error = F.mse_loss(prediction.float(), target, reduction="none")
        return mean_over_hidden(error.mean(-1), hidden)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, keep: Tensor) -> Reconstruction:
        """Fill in what is hidden: un-normalised with each unit's own statistics, visible units pasted
        back."""
        pixels = self.normalise(images)
        backbone = self.model.backbone
        grid, patch_size = backbone.grid_of(pixels), backbone.config.patch_size
        hidden = hidden_units(keep, grid[0] * grid[1])
        embedded, _ = self.encode(pixels, keep)
        units = units_of(pixels, patch_size)
        _, mean, deviation = normalise_units(units.flatten(2))
        predicted = self.head(self.decode(embedded, keep, hidden, grid)).float() * deviation + mean
        _, levels = self.model(pixels)
        hide = hidden[:, :, None, None, None]

        def picture(cells: Tensor) -> Tensor:
            return self.normalise.undo(to_map(cells, grid))

        return Reconstruction(
            picture(units),
            picture(torch.where(hide, torch.zeros_like(units), units)),
            picture(torch.where(hide, predicted.view_as(units), units)),
            level_maps(levels, grid) if levels else [],
        )

    def begin_step(self, step: int, num_steps: int) -> None:
        for heads in (self.features, self.frozen):
            if heads is not None:
                heads.begin_step(step, num_steps)

    def end_step(self, step: int, num_steps: int) -> None:
        if self.features is not None:
            self.features.end_step(self.model.backbone, step, num_steps)
        if self.frozen is not None:
            self.frozen.keep_statistics()

    def flops_per_image(self) -> float:
        """Floating-point operations of a training step on one image: matrix products, backward as twice
        forward, nothing but forward for teachers."""
        with torch.device("meta"):
            twin = PixelObjective(self.model.config, self.config)
            backbone = self.model.backbone.config
            whole = torch.empty(1, backbone.in_channels, backbone.image_size, backbone.image_size)
            keep = torch.empty(1, self.config.masks_per_image, self.num_kept, dtype=torch.long)
            average = frozen = 0
            taught = None
            if twin.features is not None:
                moving = twin.features.teacher
                average, _ = flops_of(lambda: moving(whole))
            if self._teacher:
                frozen, taught = self._teacher[0].flops_per_image()
            total, _ = flops_of(lambda: twin.losses({"images": whole, "keep": keep}, taught))
        return float(3 * total - 2 * average + frozen)

    def compile_blocks(self) -> list[nn.Module]:
        """The modules that are worth compiling one by one."""
        blocks: list[nn.Module] = [*self.model.backbone.blocks(), *self.decoder.blocks]
        blocks += [self.model.pyramid] if self.model.pyramid else []
        return blocks + (self.features.compile_blocks() if self.features else [])

    def _num_units(self, images: Tensor) -> int:
        rows, cols = self.model.backbone.grid_of(images)
        return rows * cols
