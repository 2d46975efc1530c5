"""Pre-training on pixels (arXiv 2211.12735): masked image modeling, with or without MFM.

Visible units go through backbone and pyramid; the levels are embedded and summed, hidden units are filled
with mask tokens, and a decoder predicts every hidden unit's pixels, normalised by the unit's own mean and
variance. Without a pyramid the same objective is MAE.
"""

from dataclasses import dataclass, field
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from itpn.errors import UserError
from itpn.nn.layers import init_linears, to_map, units_of
from itpn.nn.normalise import Normalise
from itpn.nn.pyramid import Levels, Model, ModelConfig
from itpn.objectives.decoder import Decoder, DecoderConfig, build_embed, fill, mean_over_hidden
from itpn.objectives.features import FeatureModeling, FeaturesConfig, repeated_for_masks
from itpn.objectives.masking import RandomMasking, hidden_units, num_kept


@dataclass(frozen=True, kw_only=True)
class PixelConfig:
    mask_ratio: float = 0.75
    """Share of the units that are hidden."""
    masks_per_image: int = 1
    """Masks drawn for each image of a batch; they share one pass of the feature teacher."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Mean of each image channel, in 0..1; ImageNet's."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Standard deviation of each image channel, in 0..1; ImageNet's."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)

    def __post_init__(self) -> None:
        if self.masks_per_image < 1:
            raise UserError(f"objective.masks_per_image: {self.masks_per_image} must be at least 1")


class Reconstruction(NamedTuple):
    """Pictures ``[B, c, H, W]`` in 0..1, and the pyramid's maps ``[B, F, h, w]``, fine to coarse.

    The maps are without what a place inside a unit has in common over all units, which would cover the rest;
    MAE has none.
    """

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

    @property
    def draw(self) -> RandomMasking:
        """What the loader draws for each sample."""
        backbone = self.model.backbone
        num_drops = backbone.num_drops if backbone.config.drop_path else 0
        return RandomMasking(self.num_units, self.num_kept, self.config.masks_per_image, num_drops)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """From ``images: uint8 [B, c, H, W]``, ``keep: long [B, M, K]``, perhaps ``drop [B, M, D]``.

        Returns:
            ``loss`` and its parts ``pixel`` and, with masked feature modeling, ``feature`` and each stage's
            numbers.
        """
        whole = self.normalise(batch["images"])
        keep, drop = batch["keep"].flatten(0, 1), batch["drop"].flatten(0, 1) if "drop" in batch else None
        images = repeated_for_masks(whole, self.config.masks_per_image)
        hidden = hidden_units(keep, self._num_units(images))

        embedded, _ = self.encode(images, keep, drop)
        decoded = self.decode(embedded, keep, hidden, self.model.backbone.grid_of(images))
        pixel = self.pixel_loss(self.head(decoded), images, hidden)
        if self.features is None:
            return {"loss": pixel, "pixel": pixel.detach()}
        feature, parts = self.features(whole, decoded, embedded, keep, hidden)
        return {"loss": pixel + self.features.weight * feature, "pixel": pixel.detach(), **parts}

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
            return (to_map(cells, grid) * self.normalise.std + self.normalise.mean).clamp(0, 1)

        return Reconstruction(
            picture(units),
            picture(torch.where(hide, torch.zeros_like(units), units)),
            picture(torch.where(hide, predicted.view_as(units), units)),
            [to_map(level - level.mean((0, 1)), grid) for level in levels] if levels else [],
        )

    def begin_step(self, step: int, num_steps: int) -> None:
        if self.features is not None:
            self.features.begin_step(step, num_steps)

    def end_step(self, step: int, num_steps: int) -> None:
        if self.features is not None:
            self.features.end_step(self.model.backbone, step, num_steps)

    def flops_per_image(self) -> float:
        """Floating-point operations of a training step on one image: matrix products, backward as twice
        forward."""
        with torch.device("meta"):
            twin = PixelObjective(self.model.config, self.config)
            backbone = self.model.backbone.config
            whole = torch.empty(1, backbone.in_channels, backbone.image_size, backbone.image_size)
            keep = torch.empty(1, self.config.masks_per_image, self.num_kept, dtype=torch.long)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                twin({"images": whole, "keep": keep})
            total = counter.get_total_flops()
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                if twin.features is not None:
                    twin.features.teacher(whole)  # it has no backward
        return float(3 * total - 2 * counter.get_total_flops())

    def compile_blocks(self) -> list[nn.Module]:
        """The modules that are worth compiling one by one."""
        blocks: list[nn.Module] = [*self.model.backbone.blocks(), *self.decoder.blocks]
        blocks += [self.model.pyramid] if self.model.pyramid else []
        return blocks + (self.features.compile_blocks() if self.features else [])

    def _num_units(self, images: Tensor) -> int:
        rows, cols = self.model.backbone.grid_of(images)
        return rows * cols
