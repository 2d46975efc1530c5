"""Toy models and batches that several tests share."""

import torch

from itpn.heads.detect import DetectObjective, DetectorConfig
from itpn.heads.proposals import ProposalConfig
from itpn.heads.regions import RegionConfig
from itpn.heads.towers import HeadConfig
from itpn.nn.hivit import HiViTConfig
from itpn.nn.pyramid import ModelConfig, PyramidConfig
from itpn.objectives.decoder import DecoderConfig
from itpn.objectives.features import FeaturesConfig
from itpn.objectives.pixel import PixelConfig, PixelObjective

STEADY = 1e-4
"""Epsilon of Adam for runs that are compared up to rounding. With the usual 1e-8 a gradient near zero, which
rounds to either side of it, takes a whole step of the learning rate to that side."""


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


def toy_detector_config(cascade: bool = False, norm: str = "group", **fields) -> DetectorConfig:
    """Three classes, anchors from 16 pixels on."""
    head = HeadConfig(norm=norm, num_convs=1, conv_width=24, hidden_width=48)
    proposals = ProposalConfig(
        anchor_scale=4.0, num_sampled=64, num_before_nms=(100, 100), num_proposals=(60, 60)
    )
    regions = RegionConfig(cascade=cascade, num_sampled=48, head=head)
    seen = {"mean": PixelConfig.mean, "std": PixelConfig.std}
    return DetectorConfig(**{"num_classes": 3, "proposals": proposals, "regions": regions, **seen} | fields)


def toy_detector(cascade: bool = False, norm: str = "group", seed: int = 0, **numbers) -> DetectObjective:
    """A small detector of three classes."""
    torch.manual_seed(seed)
    fields = {key: numbers.pop(key) for key in list(numbers) if key in DetectorConfig.__dataclass_fields__}
    return DetectObjective(toy_model(**numbers), toy_detector_config(cascade, norm, **fields))


def toy_scenes(
    size: int = 2, pixels: tuple[int, int] = (64, 64), seed: int = 0, room: int = 4
) -> dict[str, torch.Tensor]:
    """A batch of images with up to three ellipses each that do not overlap; the colour is the class."""
    generator = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    H, W = pixels
    y, x = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    centres = (torch.arange(28) + 0.5) / 14 - 1
    images = torch.full((size, 3, H, W), 100, dtype=torch.uint8)
    boxes, labels = torch.zeros(size, room, 4), torch.full((size, room), -1)
    masks = (centres[:, None] ** 2 + centres**2 <= 1).to(torch.uint8).repeat(size, room, 1, 1)
    for i in range(size):
        placed: list[tuple[int, int, int, int]] = []
        for _ in range(20):
            w, h = integer(16, 33), integer(16, 33)
            left, top = integer(0, W - w + 1), integer(0, H - h + 1)
            box = (left, top, left + w, top + h)
            if len(placed) < 3 and all(
                box[2] <= a or c <= box[0] or box[3] <= b or d <= box[1] for a, b, c, d in placed
            ):
                inside = ((x - left) / w * 2 - 1) ** 2 + ((y - top) / h * 2 - 1) ** 2 <= 1
                label = integer(0, 3)
                images[i, :, inside] = 0
                images[i, label, inside] = 255
                boxes[i, len(placed)], labels[i, len(placed)] = torch.tensor(box).float(), label
                placed.append(box)
    return {
        "images": images,
        "sizes": torch.tensor([pixels] * size),
        "boxes": boxes,
        "labels": labels,
        "masks": masks,
        "sampling": torch.arange(size) + 100 * seed,
    }
