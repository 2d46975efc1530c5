"""`itpn bench infer`: a classifier's forward pass on random images, beside what the device can do."""

import json
import statistics
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.progress import track

from itpn.bench.ceiling import Ceiling
from itpn.bench.figures import Figures, show
from itpn.bench.steps import BATCH, WARM_UP, Options, peak_memory, setting, speedup_of
from itpn.commands.arguments import parse
from itpn.engine.clock import Clock
from itpn.engine.distributed import choose_device
from itpn.engine.numerics import choose_precision, evaluating, set_numerics
from itpn.heads.classify import Classifier
from itpn.heads.finetune import forward_flops
from itpn.nn.hivit import HiViT
from itpn.nn.linear import casting_once
from itpn.outputs import writing
from itpn.recipes.classify import Classify
from itpn.recipes.lookup import find, load_as


@dataclass(frozen=True)
class Bench(Options):
    """Time a classifier's forward pass on random images. Prints images per second, the share of the matmul
    ceiling, and memory."""


def run(arguments: list[str]) -> None:
    options = parse(Bench, arguments, "itpn bench infer")
    recipe = load_as(Classify, find(options.name))
    console = Console(highlight=False, soft_wrap=True)
    figures = measure(recipe, options, console)
    show(figures, console)
    if figures.speedup:
        console.print(
            f"relative positions add {1 / figures.speedup - 1:.1%} to the time of the same model without them"
        )
    if options.json:
        with writing(options.json, "--json") as file:
            file.write_text(json.dumps(figures.as_dict(), indent=2) + "\n")


def measure(recipe: Classify, options: Bench, console: Console) -> Figures:
    """The model and, where it has relative positions, the same without them, in turns with the products; as
    evaluations call them."""
    device = choose_device(options.device)
    precision = choose_precision(options.precision, device)
    size = options.device_batch or BATCH[device.type]
    set_numerics(device, precision)
    torch.manual_seed(0)
    backbone = recipe.model.backbone
    models = [build(recipe, device)]
    if backbone.relative_position_bias:
        plain = replace(recipe.model, backbone=replace(backbone, relative_position_bias=False))
        models.append(build(replace(recipe, model=plain), device))
    for model in models if options.compile else ():
        for block in model.backbone.blocks():
            block.compile()
    images = torch.randn(size, backbone.in_channels, *recipe.image_size, device=device)

    def seconds(model: Classifier) -> float:
        clock = Clock(device)
        clock.mark("begun")
        with evaluating(options.precision, device):
            model(images)
        clock.mark("forward")
        return clock.read()["forward"]

    with casting_once(device):
        for _ in range(WARM_UP):
            seconds(models[0])
        peak = peak_memory(device)
        for model in models[1:] * WARM_UP:
            seconds(model)
        ceiling = Ceiling(device, precision)
        passes: list[list[float]] = [[] for _ in models]
        turn = list(zip(models, passes, strict=True))
        for _ in track(range(options.steps), "timing", console=console, transient=True):
            ceiling.measure()
            for model, taken in turn:
                taken.append(seconds(model))
            turn.reverse()  # being first must be nobody's advantage
        ceiling.measure()
    flops_per_image = forward_flops(models[0], recipe.image_size)
    parts = [{"step": statistics.median(taken)} for taken in passes]
    return Figures(
        **setting(options, device, precision),
        config=recipe.name,
        device_batch=size,
        image_size=recipe.image_size,
        flops_per_image=flops_per_image,
        ceiling=ceiling.median,
        ratio=ceiling.share(size * flops_per_image, passes[0]),
        parts=parts[0],
        losses=[],
        peak_memory=peak,
        baseline_parts=parts[1] if len(parts) > 1 else None,
        baseline="without relative positions",
        baseline_losses=None,
        speedup=speedup_of(*passes) if len(passes) > 1 else None,
        kinds=None,
    )


def build(recipe: Classify, device: torch.device) -> Classifier:
    return Classifier(HiViT(recipe.model.backbone), recipe.classifier).to(device).eval()
