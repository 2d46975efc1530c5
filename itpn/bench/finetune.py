"""`itpn bench finetune`: the step of a config that fine-tunes, as `itpn bench pretrain` measures it."""

from dataclasses import dataclass, replace
from functools import partial

import torch
from rich.console import Console

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
from itpn.errors import UserError
from itpn.heads.finetune import ClassifyObjective
from itpn.objectives.pixel import PixelConfig
from itpn.recipes.classify import Classify


@dataclass(frozen=True)
class Bench(StepOptions):
    """Time the training step of a fine-tuning config on random images. Prints the time of each part, FLOP/s
    and the share of the matmul ceiling."""

    baseline: bool = False
    """Also time the same model without relative positions, step by step in turn."""


def run(arguments: list[str]) -> None:
    options = parse(Bench, arguments, "itpn bench finetune")
    recipe = recipe_of(Classify, options)
    console = Console(highlight=False, soft_wrap=True)
    if options.baseline and not recipe.model.backbone.relative_position_bias:
        raise UserError(f"--baseline: {options.name} has no relative positions to leave out")
    make = partial(subject, recipe, options.baseline)
    report([measure(recipe.name, make, options, console)], options, console)


def subject(recipe: Classify, baseline: bool, device: torch.device, size: int) -> Subject:
    backbone, generator = recipe.model.backbone, torch.Generator().manual_seed(0)
    finetune = replace(recipe.finetune, mean=PixelConfig.mean, std=PixelConfig.std)
    objective = ClassifyObjective(backbone, recipe.classifier, finetune, recipe.image_size)
    objective.to(device).train()
    batch = synthetic_images(objective, size, backbone.in_channels, recipe.image_size, generator)
    batch["labels"] = torch.randint(recipe.classifier.num_classes, (size,), generator=generator)
    plain = with_backbone(recipe, relative_position_bias=False)
    return Subject(
        model=objective,
        objective=objective,
        optimizer=layered_adamw(objective, recipe),
        batch=on_device(batch, device),
        image_size=recipe.image_size,
        flops_per_image=objective.flops_per_image,
        baseline=partial(subject, plain, False, device, size) if baseline else None,
        differs="without relative positions",
    )
