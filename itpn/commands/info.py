"""`itpn info CONFIG [--field value …]` or `itpn info FILE`: parameters by part, and multiply-adds.

A teacher is built without its weights, so nothing is downloaded.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from itpn.commands.arguments import parse
from itpn.commands.config import read_config
from itpn.commands.released import Reading, findings, read_released
from itpn.data.picture import Size
from itpn.errors import printable
from itpn.evaluate.count import count_parameters, multiply_adds
from itpn.heads.classify import Classifier
from itpn.heads.detect import Detector
from itpn.heads.segment import Segmenter
from itpn.nn.hivit import HiViT
from itpn.nn.pyramid import ModelConfig
from itpn.objectives.distill import DistillObjective
from itpn.objectives.pixel import PixelObjective
from itpn.objectives.teacher import Teacher, outline
from itpn.objectives.vision_transformers import CLIP
from itpn.recipes.classify import Classify
from itpn.recipes.detect import Detect
from itpn.recipes.lookup import Recipe
from itpn.recipes.pretrain import Pretrain
from itpn.recipes.segment import Segment
from itpn.tasks import classify, detect, segment
from itpn.weights import files
from itpn.weights.files import Weights

Countable = PixelObjective | DistillObjective | Classifier | Detector | Segmenter
COUNTED = "matrix products, convolutions and 5 x LayerNorm elements"


def run(arguments: list[str]) -> None:
    if arguments and is_weights(Path(arguments[0])):
        reading = parse(Reading, arguments[1:], f"itpn info {arguments[0]}")
        return info_of_file(Path(arguments[0]), reading)
    recipe = read_config("itpn info", arguments)
    objective = on_meta(recipe)
    teacher = None if isinstance(objective, Classifier | Detector | Segmenter) else teacher_of(objective)
    table = Table("part", title=recipe.name, title_justify="left")
    table.add_column("parameters", justify="right")
    table.add_column("trainable", justify="right")
    for name, part in parts(objective).items():
        counts = count_parameters(part)
        table.add_row(name, f"{counts.total:,}", f"{counts.trainable:,}")
    total = count_parameters(objective)
    table.add_section()
    table.add_row("total", f"{total.total:,}", f"{total.trainable:,}")
    if teacher is not None:
        table.add_row("teacher, frozen", f"{count_parameters(teacher).total:,}", "0")
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(f"{total.total / 1e6:.2f} M parameters, {total.trainable / 1e6:.2f} M of them trained.")
    if teacher is not None:
        console.print("\n".join(taught_by(teacher, total.total)))
    console.print(work(backbone_of(objective), recipe.image_size))


def on_meta(recipe: Recipe) -> Countable:
    """Build what a recipe trains, with as many classes as it says, on the meta device."""
    with torch.device("meta"):
        match recipe:
            case Classify():
                recipe = classify.settled(recipe, recipe.classifier.num_classes, None)
                return Classifier(HiViT(recipe.model.backbone), recipe.classifier)
            case Detect():
                recipe = detect.settled(recipe, None, None)
                return Detector(recipe.model, recipe.detector)
            case Segment():
                recipe = segment.settled(recipe, recipe.segmenter.num_classes, None)
                return Segmenter(recipe.model, recipe.segmenter)
            case Pretrain():
                return files.build_objective(recipe.model, recipe.objective)


def size_of(recipe: Recipe) -> dict[str, str]:
    """Count what `itpn configs` shows of a config: length, parameters, and the backbone's multiply-adds."""
    objective, loop = on_meta(recipe), recipe.loop
    total, trained = count_parameters(objective)
    macs = backbone_multiply_adds(backbone_of(objective), recipe.image_size)
    return {
        "epochs": f"{loop.iterations:,} steps" if loop.iterations else str(loop.epochs),
        "parameters": f"{total / 1e6:.2f} M",
        "trained": f"{trained / 1e6:.2f} M",
        "gmac": f"{macs / 1e9:.2f}",
    }


def backbone_of(objective: Countable) -> HiViT:
    return objective.backbone if isinstance(objective, Classifier) else objective.model.backbone


def teacher_of(objective: PixelObjective | DistillObjective) -> Teacher | None:
    """The teacher beside an objective, on the meta device; None if there is none, or only as a file.

    Raises:
        UserError: it does not fit the objective, as training would find.
    """
    if objective.teacher_config is None:
        return None
    teacher = outline(objective.teacher_config, objective.model.backbone.config.grid)
    if teacher is not None:
        objective.attach(teacher)
    return teacher


def taught_by(teacher: Teacher, student: int) -> Iterator[str]:
    """What a teacher sees and gives and, of CLIP B/16, what mmpretrain counts beside a student of so many."""
    (rows, cols), size, name = teacher.grid, teacher.image_size, teacher.config.teacher
    yield (
        f"Teacher {name}: {rows} x {cols} tokens of {size} x {size} pixels, targets {teacher.width} wide; "
        "it is not saved."
    )
    if name == CLIP:
        text = clip_text_tower()
        whole = student + count_parameters(teacher).total + text
        yield (
            f"As mmpretrain counts, with the teacher and CLIP's text tower: {whole / 1e6:.1f} M ({whole:,}). "
            f"The text tower, {text / 1e6:.1f} M ({text:,}) of them, is never loaded here."
        )


def clip_text_tower(
    *, vocabulary: int = 49_408, context: int = 77, width: int = 512, num_blocks: int = 12
) -> int:
    """Parameters of CLIP's text tower with its projection and the temperature; by default that of B/16."""
    attention, mlp, norm = 4 * (width + 1) * width, (2 * 4 * width + 4 + 1) * width, 2 * width
    blocks = num_blocks * (attention + mlp + 2 * norm)
    return (vocabulary + context) * width + blocks + norm + width * width + 1


def is_weights(path: Path) -> bool:
    """Whether an argument is a file of weights, a run directory or a folder of `save_pretrained`."""
    if path.suffix in (".safetensors", *files.FOREIGN):
        return True
    folder = (path / "checkpoints").is_dir() or (path / "model.safetensors").is_file()
    return folder or (path.is_file() and path.suffix != ".py")


def info_of_file(path: Path, reading: Reading) -> None:
    console = Console(highlight=False, soft_wrap=True, markup=False)
    weights = files.read(path) if path.is_dir() else files.read_if_ours(path)
    if weights is not None:
        files.check(weights)
        lines = [f"{printable(weights.path)}: an itpn file", *origin(weights)]
    else:
        foreign, translated = read_released(path, reading)
        weights = Weights(path, translated.tensors, translated.config)
        lines = list(findings(foreign, translated))
    print("\n".join(lines))
    console.print(contents(weights))
    print("\n".join(described(weights)))


def origin(weights: Weights) -> Iterator[str]:
    """What a converted file was made from."""
    if weights.source is not None:
        source = weights.source
        family, sha256 = printable(source["family"]), printable(source["sha256"])
        yield f"converted from {printable(source['file'])} ({family}), sha256 {sha256}"
        for name, reason in source["left_out"].items():
            yield f"left out: {printable(name)}: {printable(reason)}"


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
        table.add_row(printable(part), str(tensors[part]), f"{values[part]:,}")
    table.add_section()
    table.add_row("total", str(tensors.total()), f"{values.total():,}")
    return table


def described(weights: Weights) -> Iterator[str]:
    """The numbers that a file's config gives, in a few lines."""
    model = weights.part("model", ModelConfig)
    config, (width, depths, heads, layers) = model.backbone, model.backbone.shape
    channels = "" if config.in_channels == 3 else f"{config.in_channels} channels, "
    yield (
        f"backbone {config.label}: {width} wide, blocks "
        f"{' + '.join(map(str, depths))}, {heads} heads, {layers} layers, {channels}units of "
        f"{config.patch_size} pixels, positions for {config.image_size} pixels"
    )
    relative = ("a table per block", "decomposed")[config.relative_position_decomposed]
    yield (
        f"relative position: {relative if config.relative_position_bias else 'none'}; layer scale: "
        f"{'yes' if config.layer_scale else 'none'}; LayerNorm epsilon: {config.norm_eps:g}; position tables "
        f"resampled: {config.position_resampling}"
    )
    if model.pyramid:
        yield f"pyramid: {model.pyramid.width} wide, blocks per step: {model.pyramid.depth}"
    with torch.device("meta"):
        module = files.module_of(weights)
    match module:
        case Classifier():
            yield f"classifier: {module.config.num_classes} classes, pooling {module.config.pooling}"
        case Detector():
            kind = "Cascade Mask R-CNN" if module.config.regions.cascade else "Mask R-CNN"
            masks = "" if module.config.masks else ", boxes alone"
            yield f"detector: {kind}{masks}, {module.config.num_classes} classes"
        case Segmenter():
            yield f"segmenter: UPerNet, {module.config.width} wide, {module.config.num_classes} classes"
        case PixelObjective():
            decoder = module.config.decoder
            yield f"pixel decoder: {decoder.width} wide, {decoder.depth} blocks"
        case DistillObjective():
            number, width = 1 + bool(module.auxiliary), module.config.target_width
            yield f"distillation: heads for a teacher's tokens ({number}), {width} channels"
    with torch.device("meta"):
        yield work(HiViT(config), (config.image_size, config.image_size))


def backbone_multiply_adds(backbone: HiViT, image_size: Size) -> int:
    """Of one image, on the meta device."""
    images = torch.empty(1, backbone.config.in_channels, *image_size, device="meta")
    backbone(images)  # makes the matrices that resample position tables, once for all images
    return multiply_adds(lambda: backbone(images))


def work(backbone: HiViT, image_size: Size) -> str:
    macs = backbone_multiply_adds(backbone, image_size)
    return (
        f"{macs / 1e9:.2f} G multiply-adds ({macs:,}): {COUNTED};\n"
        f"the backbone alone, one image of {image_size[0]} x {image_size[1]} pixels, nothing masked."
    )


def parts(objective: Countable) -> dict[str, nn.Module | nn.Parameter]:
    """The parts that together hold every parameter once."""
    if isinstance(objective, Classifier):
        return {"backbone": objective.backbone, "norm": objective.norm, "head": objective.head}
    found: dict[str, nn.Module | nn.Parameter | None] = {
        "backbone": objective.model.backbone,
        "pyramid": objective.model.pyramid,
    }
    if isinstance(objective, Detector):
        found |= {"proposals": objective.proposals, "regions": objective.regions}
        return {name: part for name, part in found.items() if part is not None}
    if isinstance(objective, Segmenter):
        found |= {"UPerNet": objective.decode_head, "auxiliary head": objective.auxiliary_head}
        return {name: part for name, part in found.items() if part is not None}
    if isinstance(objective, DistillObjective):
        found |= {
            "level embed": objective.embed,
            "mask token": objective.mask_token,
            "norm": objective.norm,
            "head": objective.head,
            "auxiliary branch": objective.auxiliary,
            "stage heads": objective.frozen,
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
    found["stage heads"] = objective.frozen
    return {name: part for name, part in found.items() if part is not None}
