"""Toy models and batches that several tests share."""

import torch

from itpn.nn.hivit import HiViTConfig
from itpn.nn.pyramid import ModelConfig, PyramidConfig
from itpn.objectives.decoder import DecoderConfig
from itpn.objectives.features import FeaturesConfig
from itpn.objectives.pixel import PixelConfig, PixelObjective


def toy_backbone(**numbers) -> HiViTConfig:
    toy = {"width": 32, "depths": (1, 1, 2), "num_heads": 2, "image_size": 64, "mlp_ratio": 2.0}
    return HiViTConfig(**toy | numbers)


def toy_model(pyramid: bool = True, **numbers) -> ModelConfig:
    return ModelConfig(
        backbone=toy_backbone(**numbers),
        pyramid=PyramidConfig(width=24, depth=1, mlp_ratio=2.0) if pyramid else None,
    )


def toy_objective(
    features: dict | None = None, pyramid: bool = True, seed: int = 0, **numbers
) -> PixelObjective:
    """A small pixel objective; ``features`` switches masked feature modeling on."""
    torch.manual_seed(seed)
    decoder = DecoderConfig(width=32, depth=1, num_heads=2, mlp_ratio=2.0)
    chosen = FeaturesConfig(**({"weight": 0.3} | features)) if features is not None else FeaturesConfig()
    backbone = {key: numbers.pop(key) for key in list(numbers) if key in HiViTConfig.__dataclass_fields__}
    return PixelObjective(
        toy_model(pyramid, **backbone), PixelConfig(decoder=decoder, features=chosen, **numbers)
    )


def toy_batch(objective: PixelObjective, size: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    config = objective.model.backbone.config
    shape = (size, config.in_channels, config.image_size, config.image_size)
    draws = [objective.draw(generator) for _ in range(size)]
    return {
        "images": torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
        **{key: torch.stack([draw[key] for draw in draws]) for key in draws[0]},
    }
