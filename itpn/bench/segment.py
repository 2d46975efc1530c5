"""`itpn bench segment`: the training step of a config that segments, on random crops."""

from dataclasses import dataclass, replace
from functools import partial

import torch
from rich.console import Console

from itpn.bench.parts import Parts
from itpn.bench.steps import (
    StepOptions,
    Subject,
    layered_adamw,
    measure,
    on_device,
    recipe_of,
    report,
    synthetic_images,
    with_backbone,
)
from itpn.commands.arguments import parse
from itpn.heads.segment import SegmentObjective
from itpn.objectives.pixel import PixelConfig
from itpn.recipes.segment import Segment

BATCH = {"cpu": 2, "mps": 2, "cuda": 8}


@dataclass(frozen=True)
class Bench(StepOptions):
    """Time the training step of a segmentation config on random crops. Prints the time of each part, FLOP/s
    and the share of the matmul ceiling."""

    device_batch: int | None = None
    """Crops per step. Default: 2 on a CPU, 8 on CUDA."""


def run(arguments: list[str]) -> None:
    options = parse(Bench, arguments, "itpn bench segment")
    recipe = recipe_of(Segment, options)
    console = Console(highlight=False, soft_wrap=True)
    report([measure(recipe.name, partial(subject, recipe), options, console, BATCH)], options, console)


def subject(recipe: Segment, device: torch.device, size: int) -> Subject:
    height, width = recipe.data.crop
    if height == width:  # as in training
        recipe = with_backbone(recipe, relative_image_size=height)
    config = replace(recipe.segmenter, mean=PixelConfig.mean, std=PixelConfig.std)
    objective = SegmentObjective(recipe.model, config, recipe.image_size).to(device).train()
    generator, channels = torch.Generator().manual_seed(0), recipe.model.backbone.in_channels
    batch = synthetic_images(objective, size, channels, recipe.image_size, generator)
    batch["labels"] = torch.randint(config.num_classes, (size, height, width), generator=generator)

    def clocked(parts: Parts) -> None:
        parts.module(objective.model.backbone, "backbone")
        assert objective.model.pyramid is not None
        parts.module(objective.model.pyramid, "pyramid")
        parts.module(objective.decode_head, "decode head")
        if objective.auxiliary_head is not None:
            parts.module(objective.auxiliary_head, "auxiliary head")
        parts.method(objective, "pixel_loss", "losses")
        parts.backward(objective.model.pyramid, "backward: heads")
        parts.backward(objective.model.backbone, "backward: pyramid")

    return Subject(
        model=objective,
        objective=objective,
        optimizer=layered_adamw(objective, recipe),
        batch=on_device(batch, device),
        image_size=recipe.image_size,
        flops_per_image=objective.flops_per_image,
        clocked=clocked,
        rest="normalising, resizing, accuracy",
        backward="backward: backbone",
    )
