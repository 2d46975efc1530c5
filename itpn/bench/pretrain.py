"""`itpn bench pretrain`: a config's real training step on synthetic data, beside what the device can do."""

from dataclasses import dataclass, replace
from functools import partial

import torch
from rich.console import Console
from torch import Tensor

from itpn.bench.parts import Parts
from itpn.bench.plain import Plain, plain_adamw
from itpn.bench.steps import (
    StepOptions,
    Subject,
    measure,
    on_device,
    recipe_of,
    report,
    synthetic_images,
)
from itpn.commands.arguments import parse
from itpn.engine.optim import adamw
from itpn.errors import UserError
from itpn.objectives.distill import DistillConfig, DistillObjective
from itpn.objectives.pixel import PixelConfig, PixelObjective
from itpn.objectives.teacher import outline
from itpn.recipes.pretrain import Pretrain

Objective = PixelObjective | DistillObjective


@dataclass(frozen=True)
class Bench(StepOptions):
    """Time the training step of a pre-training config on random images. Prints the time of each part, FLOP/s
    and the share of the matmul ceiling.

    A frozen teacher has random weights; nothing is downloaded.
    """

    baseline: bool = False
    """Also time a plain implementation of the same model (itpn/bench/plain.py), step by step in turn. Only
    for pre-training on pixels without a frozen teacher."""


def run(arguments: list[str]) -> None:
    options = parse(Bench, arguments, "itpn bench pretrain")
    recipe = recipe_of(Pretrain, options)
    console = Console(highlight=False, soft_wrap=True)
    figures = measure(recipe.name, partial(subject, recipe, options.baseline), options, console)
    report([figures], options, console)


def subject(recipe: Pretrain, baseline: bool, device: torch.device, size: int) -> Subject:
    """The objective on random images, and its baseline.

    Raises:
        UserError: there is no such teacher, or it does not fit; no baseline for such a config.
    """
    objective = build(recipe, device)
    if baseline:
        Plain(objective)  # says at once if it cannot
    generator, channels = torch.Generator().manual_seed(0), recipe.model.backbone.in_channels
    batch = on_device(synthetic_images(objective, size, channels, recipe.image_size, generator), device)

    def plain() -> Subject:
        model = Plain(twin := build(recipe, device))
        return _subject(recipe, model, twin, plain_adamw(model, recipe.optim), batch)

    ours = _subject(recipe, objective, objective, adamw(objective, recipe.optim), batch)
    return replace(ours, baseline=plain) if baseline else ours


def _subject(
    recipe: Pretrain,
    model: Objective | Plain,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Tensor],
) -> Subject:
    def clocked(parts: Parts) -> None:
        for teacher in objective.teachers:
            parts.module(teacher, "teacher")

    flops = objective.flops_per_image()
    moving = isinstance(objective, PixelObjective) and objective.features
    return Subject(
        model=model,
        objective=objective,
        optimizer=optimizer,
        batch=batch,
        image_size=recipe.image_size,
        flops_per_image=lambda: flops,
        clocked=clocked,
        ending="teacher's average" if moving else "optimiser",
    )


def build(recipe: Pretrain, device: torch.device) -> Objective:
    """The same weights every time, of a frozen teacher too.

    Raises:
        UserError: there is no such teacher, or it does not fit.
    """
    torch.manual_seed(0)
    objective: Objective
    match recipe.objective:
        case PixelConfig() as config:
            objective = PixelObjective(recipe.model, config)
        case DistillConfig() as config:
            objective = DistillObjective(recipe.model, config)
    if objective.teacher_config is not None:
        teacher = outline(objective.teacher_config, recipe.model.backbone.grid, "cpu")
        if teacher is None:
            raise UserError(f"itpn bench pretrain {recipe.name}: its objective must name a teacher")
        objective.attach(teacher.to(device))
    return objective.to(device).train()
