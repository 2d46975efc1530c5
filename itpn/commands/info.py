"""`itpn info CONFIG [--field value …]`: parameters by part, and multiply-adds."""

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from itpn.commands.config import read_config
from itpn.evaluate.count import count_parameters, multiply_adds
from itpn.objectives.pixel import PixelObjective

COUNTED = "matrix products, convolutions and 5 x LayerNorm elements"


def run(arguments: list[str]) -> None:
    recipe = read_config("itpn info", arguments)
    with torch.device("meta"):
        objective = PixelObjective(recipe.model, recipe.objective)
    table = Table("part", title=recipe.name, title_justify="left")
    table.add_column("parameters", justify="right")
    table.add_column("trainable", justify="right")
    for name, part in parts(objective).items():
        counts = count_parameters(part)
        table.add_row(name, f"{counts.total:,}", f"{counts.trainable:,}")
    total = count_parameters(objective)
    table.add_section()
    table.add_row("total", f"{total.total:,}", f"{total.trainable:,}")
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    size, macs = recipe.model.backbone.image_size, backbone_multiply_adds(objective)
    console.print(f"{total.total / 1e6:.2f} M parameters, {total.trainable / 1e6:.2f} M of them trained.")
    console.print(
        f"{macs / 1e9:.2f} G multiply-adds ({macs:,}): {COUNTED};\n"
        f"the backbone alone, one image of {size} x {size} pixels, nothing masked."
    )


def parts(objective: PixelObjective) -> dict[str, nn.Module | nn.Parameter]:
    """The parts that together hold every parameter once."""
    model, features = objective.model, objective.features
    found = {
        "backbone": model.backbone,
        "pyramid": model.pyramid,
        "decoder embed": objective.embed,
        "mask token": objective.mask_token,
        "decoder": objective.decoder,
        "pixel head": objective.head,
    }
    if features is not None:
        found |= {"teacher": features.teacher, "feature heads": features.heads}
        if features.config.branches == "levels":
            found |= {"feature decoder": features.decoder, "feature tokens": features.level_tokens}
    return {name: part for name, part in found.items() if part is not None}


def backbone_multiply_adds(objective: PixelObjective) -> int:
    backbone = objective.model.backbone
    config = backbone.config
    images = torch.empty(1, config.in_channels, config.image_size, config.image_size, device="meta")
    return multiply_adds(lambda: backbone(images))
