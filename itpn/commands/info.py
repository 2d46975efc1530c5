"""`itpn info CONFIG [--field value …]` or `itpn info FILE`: parameters by part, and multiply-adds."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from itpn.commands.config import read_config
from itpn.errors import UserError, printable
from itpn.evaluate.count import count_parameters, multiply_adds
from itpn.nn.hivit import HiViT
from itpn.nn.pyramid import ModelConfig
from itpn.objectives.distill import DistillObjective
from itpn.objectives.pixel import PixelObjective
from itpn.weights import files
from itpn.weights.convert import Foreign, read_foreign
from itpn.weights.families import FAMILIES
from itpn.weights.files import Weights
from itpn.weights.translate import Translated, translate

COUNTED = "matrix products, convolutions and 5 x LayerNorm elements"


def run(arguments: list[str]) -> None:
    if arguments and is_weights(Path(arguments[0])):
        if arguments[1:]:
            raise UserError(f"itpn info {arguments[0]} takes nothing more; there is {arguments[1]}")
        return info_of_file(Path(arguments[0]))
    recipe = read_config("itpn info", arguments)
    with torch.device("meta"):
        objective = files.build_objective(recipe.model, recipe.objective)
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
    console.print(f"{total.total / 1e6:.2f} M parameters, {total.trainable / 1e6:.2f} M of them trained.")
    console.print(work(objective.model.backbone))


def is_weights(path: Path) -> bool:
    """Whether an argument is a file of weights, or a run directory, and no config."""
    return (path.is_file() and path.suffix != ".py") or (path / "checkpoints").is_dir()


def info_of_file(path: Path) -> None:
    console = Console(highlight=False, soft_wrap=True)
    weights = files.read_if_ours(path)
    if weights is not None:
        lines = [f"{printable(weights.path)}: a file of ours", *origin(weights)]
    else:
        foreign = read_foreign(path)
        try:
            translated = translate(foreign.tensors, wrapping=foreign.wrapping)
        except UserError as error:
            raise UserError(f"{printable(path)}: {error}") from error
        weights = Weights(path, translated.tensors, translated.config)
        lines = list(findings(foreign, translated))
    print("\n".join(lines))
    console.print(contents(weights))
    print("\n".join(described(weights)))


def origin(weights: Weights) -> Iterator[str]:
    """What a converted file was made from."""
    if weights.source is not None:
        source = weights.source
        yield f"converted from {printable(source['file'])} ({source['family']}), sha256 {source['sha256']}"
        for name, reason in source["left_out"].items():
            yield f"left out: {printable(name)}: {printable(reason)}"


def findings(foreign: Foreign, translated: Translated) -> Iterator[str]:
    """What a foreign file is, what was taken off or left out and why, and what looks wrong."""
    yield f"{printable(foreign.path)}: {FAMILIES[translated.family].title} ({translated.family})"
    yield f"sha256 {foreign.sha256}"
    if foreign.wrapping:
        yield f"unwrapped: {', '.join(map(printable, foreign.wrapping))}"
    for name, reason in (foreign.left_out | translated.left_out).items():
        yield f"left out: {printable(name)}: {printable(reason)}"
    if foreign.placeholders:
        yield f"skipped over, never imported: {', '.join(foreign.placeholders)}"
    for name, count in foreign.nonfinite.items():
        yield f"warning: {printable(name)} has {count:,} values that are NaN or infinite"


def contents(weights: Weights) -> Table:
    """A file's parts."""
    tensors: Counter[str] = Counter()
    values: Counter[str] = Counter()
    for name, tensor in weights.tensors.items():
        tensors[name.split(".")[0]] += 1
        values[name.split(".")[0]] += tensor.numel()
    table = Table("part")
    table.add_column("tensors", justify="right")
    table.add_column("parameters", justify="right")
    for part in tensors:
        table.add_row(part, str(tensors[part]), f"{values[part]:,}")
    table.add_section()
    table.add_row("total", str(tensors.total()), f"{values.total():,}")
    return table


def described(weights: Weights) -> Iterator[str]:
    """The numbers that a file's config gives, in a few lines."""
    model = weights.part("model", ModelConfig)
    config, (width, depths, heads, layers) = model.backbone, model.backbone.shape
    published = (config.width, config.depths, config.num_heads, config.layers) == (None,) * 4
    yield (
        f"backbone {config.size if published else 'of its own size'}: {width} wide, blocks "
        f"{' + '.join(map(str, depths))}, {heads} heads, {layers} layers, units of {config.patch_size} "
        f"pixels, positions for {config.image_size} pixels"
    )
    relative = ("a table per block", "decomposed")[config.relative_position_decomposed]
    yield (
        f"relative position: {relative if config.relative_position_bias else 'none'}; layer scale: "
        f"{'yes' if config.layer_scale else 'none'}; LayerNorm epsilon: {config.norm_eps:g}; position tables "
        f"resampled: {config.position_resampling}"
    )
    if model.pyramid:
        yield f"pyramid: {model.pyramid.width} wide, blocks per step: {model.pyramid.depth}"
    if "classifier" in weights.config:
        head = weights.config["classifier"]
        yield f"classifier: {head['num_classes']} classes, pooling {head['pooling']}"
    with torch.device("meta"):
        yield work(HiViT(config))


def backbone_multiply_adds(backbone: HiViT) -> int:
    """Of one image of the backbone's own size, on the meta device."""
    size, channels = backbone.config.image_size, backbone.config.in_channels
    images = torch.empty(1, channels, size, size, device="meta")
    return multiply_adds(lambda: backbone(images))


def work(backbone: HiViT) -> str:
    size, macs = backbone.config.image_size, backbone_multiply_adds(backbone)
    return (
        f"{macs / 1e9:.2f} G multiply-adds ({macs:,}): {COUNTED};\n"
        f"the backbone alone, one image of {size} x {size} pixels, nothing masked."
    )


def parts(objective: PixelObjective | DistillObjective) -> dict[str, nn.Module | nn.Parameter]:
    """The parts that together hold every parameter once."""
    found: dict[str, nn.Module | nn.Parameter | None] = {
        "backbone": objective.model.backbone,
        "pyramid": objective.model.pyramid,
    }
    if isinstance(objective, DistillObjective):
        found |= {
            "level embed": objective.embed,
            "mask token": objective.mask_token,
            "norm": objective.norm,
            "head": objective.head,
            "auxiliary branch": objective.auxiliary,
        }
        return {name: part for name, part in found.items() if part is not None}
    features = objective.features
    found |= {
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
