"""`itpn bench detect`: the training step of a config that detects, on random images with random objects."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from rich.console import Console
from torch import Tensor, nn

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
from itpn.data.views import STRIDE, paddings
from itpn.errors import UserError
from itpn.heads.detect import DetectObjective
from itpn.heads.proposals import STRIDES
from itpn.objectives.pixel import PixelConfig
from itpn.recipes.detect import Detect

BATCH = {"cpu": 1, "mps": 1, "cuda": 2}
LEAST_SIDE, GREATEST_SHARE = 16.0, 0.5
"""Of made-up objects: pixels of the smallest, and share of the image's shorter side of the largest."""


@dataclass(frozen=True)
class Bench(StepOptions):
    """Time the training step of a detection config on random images with ellipses as objects. Prints the time
    of each part, FLOP/s and the share of the matmul ceiling."""

    device_batch: int | None = None
    """Images per step. Default: 1 on a CPU, 2 on CUDA, as published."""
    image_size: tuple[int, int] = (1024, 1024)
    """Height and width of the images, multiples of 32."""
    published_sizes: bool = False
    """Time each padded size that the config's data.scale makes, instead of one size. Only landscape sizes are
    timed, since portrait ones are the same work."""
    objects: int = 7
    """Objects per image. COCO has 7 on average."""
    window: int | None = None
    """Side, in units, of the attention windows of most blocks. Default: the config's."""
    keep_activations: bool = False
    """Switch off the config's activation checkpointing and store the activations of the backbone's blocks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(side < STRIDES[-1] or side % STRIDE for side in self.image_size):
            height, width = self.image_size
            raise UserError(
                f"--image-size {height} {width}: sides must be multiples of {STRIDE}, {STRIDES[-1]} or more"
            )
        if self.objects < 1:
            raise UserError("--objects must be at least 1")
        if self.checkpointing and self.keep_activations:
            raise UserError("give only one of --checkpointing and --keep-activations")


def run(arguments: list[str]) -> None:
    options = parse(Bench, arguments, "itpn bench detect")
    recipe = recipe_of(Detect, options)
    if options.keep_activations:
        recipe = with_backbone(recipe, checkpointing=False)
    if options.window is not None:
        recipe = with_backbone(recipe, window=options.window)
    sizes = published(recipe) if options.published_sizes else [options.image_size]
    console = Console(highlight=False, soft_wrap=True)
    figures = [
        measure(recipe.name, partial(subject, recipe, size, options.objects), options, console, BATCH)
        for size in sizes
    ]
    report(figures, options, console)


def published(recipe: Detect) -> list[tuple[int, int]]:
    """Height and width of the config's padded sizes that lie, the smallest area first."""
    return [(height, width) for height, width in paddings(recipe.data.scale).tolist() if height <= width]


def subject(
    recipe: Detect, image_size: tuple[int, int], num_objects: int, device: torch.device, size: int
) -> Subject:
    config = replace(recipe.detector, mean=PixelConfig.mean, std=PixelConfig.std)
    objective = DetectObjective(recipe.model, config).to(device).train()
    generator, channels = torch.Generator().manual_seed(0), recipe.model.backbone.in_channels
    batch = synthetic_images(objective, size, channels, image_size, generator)
    batch |= synthetic_objects(recipe, size, image_size, num_objects, generator)
    regions = objective.regions
    boxes, masks = seen_by(regions.heads), seen_by(regions.mask_heads)

    def per_image() -> tuple[float, float]:
        """Boxes that the box and the mask heads see, means over all steps taken."""
        steps = len(boxes) / len(regions.heads)
        return sum(boxes) / steps / size, sum(masks) / steps / size

    def notes() -> list[str]:
        num_boxes, num_masks = per_image()
        window = recipe.model.backbone.window
        seen = "all units see one another" if window is None else f"attention in windows of {window} units"
        again = "checkpointing" if recipe.model.backbone.checkpointing else "all activations kept"
        return [
            f"an image has {num_boxes:.1f} boxes in box heads, {num_masks:.1f} in mask heads; {seen}; {again}"
        ]

    return Subject(
        model=objective,
        objective=objective,
        optimizer=layered_adamw(objective, recipe),
        batch=on_device(batch, device),
        image_size=image_size,
        flops_per_image=lambda: objective.flops(image_size, *per_image()),
        clocked=clocked(objective),
        rest="normalising, maps",
        backward="backward: backbone",
        notes=notes,
    )


def synthetic_objects(
    recipe: Detect, size: int, image_size: tuple[int, int], num_objects: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Ellipses anywhere in images without padding: as many of each octave of sizes, up to twice as long as
    wide."""
    shape, (height, width) = (size, num_objects), image_size
    largest = GREATEST_SHARE * min(image_size)
    octaves = torch.rand(shape, generator=generator) * math.log2(largest / LEAST_SIDE)
    aspect = 2 ** (torch.rand(shape, generator=generator) - 0.5)
    side = LEAST_SIDE * 2**octaves
    extent = torch.stack([side * aspect, side / aspect], dim=-1)
    corner = torch.rand(*shape, 2, generator=generator) * (torch.tensor([width, height]) - extent)
    S = recipe.data.mask_size
    centres = (torch.arange(S) + 0.5) / S * 2 - 1
    ellipse = (centres[:, None] ** 2 + centres**2 <= 1).to(torch.uint8)
    return {
        "sizes": torch.tensor([image_size] * size),
        "boxes": torch.cat([corner, corner + extent], dim=-1),
        "labels": torch.randint(recipe.detector.num_classes, shape, generator=generator),
        "masks": ellipse.expand(*shape, S, S).contiguous(),
    }


def seen_by(heads: nn.ModuleList) -> list[int]:
    """A list that grows by the number of boxes whenever one of the heads is called."""
    seen: list[int] = []
    for head in heads:
        head.register_forward_pre_hook(lambda _head, inputs: seen.append(len(inputs[0])))
    return seen


def clocked(objective: DetectObjective) -> Callable[[Parts], None]:
    """Names the detector's parts; the losses are those of anchors, boxes and masks, with what they match."""

    def name(parts: Parts) -> None:
        model, proposals, regions = objective.model, objective.proposals, objective.regions
        assert model.pyramid is not None
        parts.module(model.backbone, "backbone")
        parts.module(model.pyramid, "pyramid")
        parts.method(proposals, "predict", "proposals: network")
        parts.method(proposals, "propose", "proposals: choice, NMS")
        parts.method(regions, "pool", "RoIAlign")
        for head in regions.heads:
            parts.module(head, "box heads")
        for head in regions.mask_heads:
            parts.module(head, "mask heads")
        parts.method(proposals, "losses", "matching, losses")
        for method in ("draw", "box_losses", "mask_loss"):
            parts.method(regions, method, "matching, losses")
        parts.backward(model.pyramid, "backward: heads")
        parts.backward(model.backbone, "backward: pyramid")

    return name
