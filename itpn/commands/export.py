"""`itpn export RUN_OR_FILE OUT`: a model, or a part of it, for other programs."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from itpn import __version__, hub, models
from itpn.commands.arguments import parse
from itpn.errors import UserError, printable
from itpn.models import ClassifierModel, FeatureModel
from itpn.nn.pyramid import ModelConfig
from itpn.outputs import claim
from itpn.weights import export, files, loading
from itpn.weights.export import Difference, Run, Size
from itpn.weights.files import Weights

Format = Literal["safetensors", "onnx", "torch-export"]
Part = Literal["backbone", "pyramid", "classifier"]
ENDINGS: dict[Format, str] = {"safetensors": ".safetensors", "onnx": ".onnx", "torch-export": ".pt2"}


@dataclass(frozen=True, kw_only=True)
class Export:
    """Export a model, or a part of it, for other programs. The file is read back and compared with PyTorch.

    Images go in normalised, [B, 3, H, W] in float32; the file's metadata has mean and std. The batch is free,
    the image size fixed.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_FILE")]
    """Run directory, or .safetensors file written by itpn."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """File to write, ending in .safetensors, .onnx or .pt2. An existing file is replaced only if itpn wrote
    it."""
    format: Format | None = None
    """Format to write: safetensors for itpn itself, ONNX, or torch.export. Default: given by the extension of
    OUT."""
    part: Part | None = None
    """Part to export. backbone: maps c4, c8, c16. pyramid: maps p4, p8, p16. classifier: logits. Default: the
    last of these that the file holds."""
    image_size: tuple[str, ...] = ()
    """Image size in pixels: a side (224) or height x width (320x256). Each size of several is written to a
    file OUT-HxW. Default: the model's."""
    levels: Literal[3, 5] = 3
    """Number of pyramid levels. 5 adds p32 and p64, pooled as in the authors' detectors."""


@dataclass(frozen=True)
class Job:
    """Options that all files of one export share."""

    weights: Weights
    part: Part
    format: Format
    levels: int


def run(arguments: list[str]) -> None:
    options = parse(Export, arguments, "itpn export")
    format = _format_of(options)
    sizes = list(dict.fromkeys(map(_size, options.image_size)))
    weights = hub.read(options.source)
    held = _parts(weights)
    job = Job(weights, options.part or held[-1], format, options.levels)
    if job.part not in held:
        raise UserError(f"{weights.path} holds no {job.part}; --part can be {' or '.join(held)}")
    if job.levels != 3 and (job.part != "pyramid" or format == "safetensors"):
        raise UserError("--levels 5 is for --part pyramid as onnx or torch-export")
    side = weights.part("model", ModelConfig).backbone.image_size
    out = options.out
    outs = {size: out for size in sizes or [(side, side)]}
    if len(outs) > 1:
        outs = {(H, W): out.with_name(f"{out.stem}-{H}x{W}{out.suffix}") for H, W in outs}
    for out in outs.values():
        if out.exists() and weights.path.samefile(out):
            raise UserError(f"{out} is the source itself; name another file to write")
    claim(*(("OUT", out) for out in outs.values()))
    for size, out in outs.items():
        _write(job, size, out)


def _format_of(options: Export) -> Format:
    by_ending = {ending: format for format, ending in ENDINGS.items()}
    format = options.format or by_ending.get(options.out.suffix)
    if format is None:
        raise UserError(f"{options.out}: give --format, or one of the extensions {', '.join(by_ending)}")
    if ENDINGS[format] != options.out.suffix:
        raise UserError(f"{options.out} must end in {ENDINGS[format]} for --format {format}")
    if not options.out.resolve().parent.is_dir():
        raise UserError(f"there is no folder {options.out.resolve().parent} to write {options.out.name} in")
    if format == "onnx":
        export.need_onnx()
    return format


def _size(text: str) -> Size:
    found = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text)
    if not found:
        raise UserError(f"--image-size {text!r} is neither pixels per side, like 224, nor like 320x256")
    return int(found[1]), int(found[2] or found[1])


def _parts(weights: Weights) -> list[Part]:
    """Lists the parts that the file holds, the default last."""
    held: list[Part] = ["backbone"]
    if weights.part("model", ModelConfig).pyramid:
        held.append("pyramid")
    if "classifier" in weights.config:
        held.append("classifier")
    return held


def _model(job: Job, size: Size) -> FeatureModel | ClassifierModel:
    """With its tables resampled to a square size; for another they are resampled as it runs."""
    H, W = size
    fields: dict[str, Any] = {"image_size": H} if H == W else {}
    if job.format == "safetensors" and H != W:
        raise UserError(f"--image-size {H}x{W}: a safetensors file only stores tables for square images")
    if job.format != "safetensors" and H == W:
        fields["relative_image_size"] = None
    if job.part == "classifier":
        return ClassifierModel.from_weights(job.weights, **fields)
    features: models.Kind = "stages" if job.part == "backbone" else "pyramid"
    return FeatureModel.from_weights(job.weights, features, job.levels, **fields)


def _write(job: Job, size: Size, out: Path) -> None:
    model = _model(job, size)
    channels, expected = model.backbone.config.in_channels, export.run_of(model)
    images = torch.zeros(2, channels, *size)
    outputs = expected(images)
    metadata = _metadata(job, channels, size)
    with export.written_beside(out) as beside:
        found: Run
        match job.format:
            case "onnx":
                export.write_onnx(model, beside, images, metadata)
                found = export.read_onnx(beside)
            case "torch-export":
                export.write_torch(model, beside, images, metadata)
                found = export.read_torch(beside)
            case "safetensors":
                _save(model, job.weights, beside)
                found = export.run_of(models.load(beside))
        try:
            differences = export.compare(expected, found, channels, size)
        except UserError as error:
            raise UserError(f"{out} was not kept; when read back, {error}") from error
    shapes = {"images": images.shape} | {name: output.shape for name, output in outputs.items()}
    _report(job, out, shapes, metadata, differences)


def _save(model: FeatureModel | ClassifierModel, weights: Weights, path: Path) -> None:
    """The part's tensors in the precision that they have there, and what the config says of them."""
    tensors = loading.resampled(weights, model.backbone.config).tensors
    config = model.file_config() | {"input": model.input_config()}
    files.save(path, {name: tensors[name] for name in model.state_dict()}, config, weights.source)


def _metadata(job: Job, channels: int, size: Size) -> dict[str, object]:
    objective = job.weights.config.get("input") or job.weights.config.get("objective", {})
    mean, std = (list(objective.get(name, own)) for name, own in (("mean", models.MEAN), ("std", models.STD)))
    metadata: dict[str, object] = {
        "written_by": f"itpn {__version__}",
        "part": job.part,
        "image_size": list(size),
        "images": "float32 [batch, channels, height, width]: (pixel / 255 - mean) / std, channels R G B",
    }
    return metadata | {"mean": mean, "std": std} if len(mean) in (1, channels) else metadata


def _report(
    job: Job,
    out: Path,
    shapes: Mapping[str, torch.Size],
    metadata: Mapping[str, Any],
    differences: list[Difference],
) -> None:
    kind = f"ONNX, opset {export.OPSET}" if job.format == "onnx" else job.format
    print(f"wrote {printable(out)} ({out.stat().st_size / 1e6:.1f} MB): {kind}, {job.part}")
    for name, shape in shapes.items():
        direction = "input" if name == "images" else "output"
        print(f"  {direction} {name}: float32 [batch, {', '.join(map(str, shape[1:]))}]")
    if "mean" in metadata:
        mean, std = (" ".join(map(str, metadata[key])) for key in ("mean", "std"))
        print(f"  images are (pixel / 255 - mean) / std, mean {mean}, std {std}")
    for batch, absolute, share in differences:
        print(
            f"  read back, batch of {batch}: at most {absolute:.1e} from PyTorch, {share:.1e} of the largest"
        )
