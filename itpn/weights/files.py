"""Our own weight files: safetensors whose metadata carries the config, under portable names.

A portable name is the model's own, ``backbone.stage1.0.mlp.fc1.weight`` or ``pyramid.align.bias``; what
pre-training adds (``embed.*``, ``mask_token``, ``decoder.*``, ``head.*``, ``features.*``) keeps the
objective's. Fixed tables of decoders stay out: they follow from the config.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import cattrs
import torch
from cattrs.errors import BaseValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from itpn.engine import checkpoint
from itpn.errors import UserError, printable
from itpn.heads.classify import Classifier, ClassifierConfig
from itpn.heads.detect import Detector, DetectorConfig
from itpn.heads.segment import Segmenter
from itpn.heads.upernet import SegmenterConfig
from itpn.nn.hivit import LARGEST, HiViT
from itpn.nn.pyramid import Model, ModelConfig
from itpn.objectives.distill import DistillConfig, DistillObjective
from itpn.objectives.pixel import PixelConfig, PixelObjective

T = TypeVar("T")
NOWHERE = Path("(in memory)")
FOREIGN = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".tar")
MODEL_PARTS = ("backbone.", "pyramid.")
COUNTER = "num_batches_tracked"
"""Of batch norms: a whole number, which nothing here depends on and no file of weights keeps."""
NANO = Path(__file__).parents[1] / "data" / "nano.safetensors"
"""A nano model pre-trained on the bundled sample, with its decoder (its card is nano.md beside it)."""
_converter = cattrs.Converter(forbid_extra_keys=True)
_converter.register_structure_hook(
    PixelConfig | DistillConfig, lambda values, _: _converter.structure(values, kind_of(values))
)


def kind_of(objective: Any) -> type[PixelConfig] | type[DistillConfig]:
    """Which objective's config JSON values are."""
    distils = isinstance(objective, dict) and "mask_token" in objective
    return DistillConfig if distils else PixelConfig


@dataclass(frozen=True)
class Weights:
    path: Path
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    """The run's config without its paths, as JSON values."""
    source: dict[str, Any] | None = None
    """Origin of a converted file: name and sha256 of the source, its family, and what was left out."""

    @property
    def parts(self) -> set[str]:
        """What the file holds: backbone, pyramid, decoder …"""
        return {name.split(".")[0] for name in self.tensors}

    def without(self, part: str) -> "Weights":
        kept = {name: tensor for name, tensor in self.tensors.items() if name.split(".")[0] != part}
        return replace(self, tensors=kept)

    def part(self, name: str, kind: type[T]) -> T:
        """A part of the config as its dataclass, e.g. ``part("model", ModelConfig)``."""
        if name not in self.config:
            raise UserError(f"{self.path}: its config has no {name!r}, so it holds none")
        return structured(self.config[name], kind, f"{self.path}: its {name}")

    def statistics(
        self, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of the images that the weights saw; those given if it does not say."""
        parts = ("input", "objective", "finetune", "detector", "segmenter")
        given: Any = next(filter(None, map(self.config.get, parts)), {})
        try:
            return tuple(map(float, given.get("mean") or mean)), tuple(map(float, given.get("std") or std))
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{self.path}: its mean or std are no numbers") from error

    def input_size(self) -> tuple[int, int] | None:
        """Height and width in pixels of the images that a fine-tuned model wants; None if it does not say."""
        return self._pixels("image_size", "[height, width]")

    def scale(self) -> tuple[int, int] | None:
        """Pixels that a segmenter's images are scaled to, the shorter side and at most the longer; None if it
        does not say."""
        return self._pixels("scale", "[shorter, longer]")

    def _pixels(self, name: str, what: str) -> tuple[int, int] | None:
        given = self.config.get("input")
        size = given.get(name) if isinstance(given, dict) else None
        match size:
            case None:
                return None
            case [first, second] if all(type(side) is int and 0 < side <= LARGEST for side in size):
                return first, second
        raise UserError(f"{self.path}: its {name.replace('_', ' ')} is {printable(size)[:100]}, not {what}")

    def class_names(self) -> tuple[str, ...] | None:
        """The names of the classes that a fine-tuned model tells apart, by id; None if it does not say."""
        names = self.config.get("classes")
        if names is None:
            return None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{self.path}: its classes are no list of names")
        head: ClassifierConfig | DetectorConfig | SegmenterConfig
        if "segmenter" in self.config:
            head = self.part("segmenter", SegmenterConfig)
        elif "detector" in self.config:
            head = self.part("detector", DetectorConfig)
        else:
            head = self.part("classifier", ClassifierConfig)
        count = head.num_classes
        if len(names) != count:
            raise UserError(f"{self.path}: it names {len(names):,} classes, but predicts {count:,}")
        return tuple(names)

    def category_ids(self) -> tuple[int, ...] | None:
        """The ids of a detector's classes in its annotations; None if it does not say."""
        ids = self.config.get("category_ids")
        if ids is None:
            return None
        if not isinstance(ids, list) or not all(type(number) is int for number in ids):
            raise UserError(f"{self.path}: its category_ids are no list of whole numbers")
        if len(ids) != self.part("detector", DetectorConfig).num_classes:
            raise UserError(f"{self.path}: it has {len(ids):,} category_ids, another number than classes")
        return tuple(ids)

    def recipe(self, kind: type[T]) -> T:
        """The whole config as the recipe's dataclass."""
        return structured(self.config, kind, f"{self.path}: its recipe")


def structured(values: Any, kind: type[T], what: str = "it") -> T:
    """JSON values of a config as its dataclass; fields that they lack have their defaults.

    Raises:
        UserError: a field is unknown or of another type.
    """
    try:
        return _converter.structure(values, kind)
    except BaseValidationError as error:
        reasons = "; ".join(cattrs.transform_error(error))
        raise UserError(f"{what} does not fit this version: {printable(reasons)[:500]}") from error
    except (TypeError, AttributeError, ValueError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{what} is no itpn config ({printable(error)[:200]})") from error


def portable(objective: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """An objective's state under portable names; every rank must ask, as for `checkpoint.model_tensors`."""
    return {
        name.removeprefix("model."): tensor
        for name, tensor in checkpoint.model_tensors(objective, keep=keep).items()
        if not name.endswith(("decoder.position", COUNTER))
    }


def save(
    path: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any] | None,
    source: Mapping[str, Any] | None = None,
) -> None:
    """Write a file of ours: beside and renamed, so that a file of that name is always whole.

    Equal tensors, config and source give equal bytes.
    """
    beside = path.with_name(f".{path.name}.writing")
    metadata = {"format": "pt"}
    metadata |= {key: json.dumps(value) for key, value in (("config", config), ("source", source)) if value}
    try:
        checkpoint.write_tensors(beside, tensors, metadata)
        checkpoint.sync(beside)
        beside.replace(path)
        checkpoint.sync(path.parent)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def read(path: Path) -> Weights:
    """A ``pretrained.safetensors``, a ``model.safetensors`` or the folder that holds it, or a run directory's
    ``best.safetensors``, else its newest checkpoint.

    Raises:
        UserError: there is no such file, or it is none of ours.
    """
    file_path = _newest(path) if path.is_dir() else path
    if file_path.is_file() and file_path.suffix in FOREIGN:
        raise UserError(
            f"{file_path} is a checkpoint of another library; convert it first: itpn convert {file_path} "
            f"{file_path.with_suffix('.safetensors').name}"
        )
    try:
        with safe_open(file_path, framework="pt") as file:
            names = [name for name in file.keys() if not name.endswith(COUNTER)]  # noqa: SIM118
            tensors = {name.removeprefix("model."): file.get_tensor(name) for name in names}
            metadata = file.metadata() or {}
            if len(tensors) < len(names):
                raise UserError(
                    f"{file_path} has tensors twice, with and without model. in front of the name"
                )
    except FileNotFoundError as error:
        raise UserError(
            f"there is no file {path}; name a .safetensors file of weights, or a run directory"
        ) from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read {file_path} as safetensors ({error})") from error
    if "config" not in metadata:
        raise UserError(
            f"{file_path} has no itpn config in its metadata; if it is a released checkpoint, convert "
            "it first: itpn convert"
        )
    try:
        config, source = (json.loads(metadata.get(key, "null")) for key in ("config", "source"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file_path}: its metadata is damaged ({error})") from error
    if not isinstance(config, dict) or not (source is None or _is_source(source)):
        raise UserError(f"{file_path}: its metadata is no itpn config")
    config = _said_by_run(file_path) | config
    if odd := next((name for name, tensor in tensors.items() if not is_real(tensor)), None):
        raise UserError(f"{file_path}: {printable(odd)} holds {tensors[odd].dtype}, no weights")
    return Weights(file_path, tensors, config, source)


def averaged(weights: Weights) -> Weights:
    """The average of the weights alone, where a checkpoint holds it too; a run keeps that as its best."""
    prefix = "average."
    tensors = {
        name.removeprefix(prefix): tensor
        for name, tensor in weights.tensors.items()
        if name.startswith(prefix)
    }
    return replace(weights, tensors=tensors) if tensors else weights


def is_real(tensor: Tensor) -> bool:
    """Whether a tensor holds real numbers of 16 bits or more."""
    return tensor.is_floating_point() and tensor.itemsize > 1


def _is_source(source: Any) -> bool:
    if not isinstance(source, dict) or not isinstance(source.get("left_out"), dict):
        return False
    texts = [source.get(key) for key in ("file", "sha256", "family")]
    return all(isinstance(text, str) for text in [*texts, *source["left_out"].values()])


def read_if_ours(path: Path) -> Weights | None:
    """Like `read`, but None for what is no file of ours."""
    try:
        return read(path)
    except UserError:
        return None


def module_of(weights: Weights) -> nn.Module:
    """What the file holds, built from its config with starting weights: backbone and pyramid alone, or with
    what pre-training, a classifier, a detector or a segmenter adds to them. Its state has the file's names,
    some with `model.` in front."""
    model = weights.part("model", ModelConfig)
    if "classifier" in weights.config:
        return Classifier(HiViT(model.backbone), weights.part("classifier", ClassifierConfig))
    if "regions" in weights.parts:
        return Detector(model, detector_config(weights))
    if "decode_head" in weights.parts:
        return Segmenter(model, weights.part("segmenter", SegmenterConfig))
    if weights.parts <= {"backbone", "pyramid"}:
        return Model(model)
    return build_objective(model, weights.part("objective", kind_of(weights.config.get("objective"))))


def detector_config(weights: Weights) -> DetectorConfig:
    """Of a detector's file, with the mean and deviation of its images."""
    config = weights.part("detector", DetectorConfig)
    mean, std = weights.statistics(config.mean or PixelConfig.mean, config.std or PixelConfig.std)
    return replace(config, mean=mean, std=std)


def build_objective(
    model: ModelConfig, config: PixelConfig | DistillConfig
) -> PixelObjective | DistillObjective:
    """An objective with starting weights; one that distils still lacks its teacher."""
    match config:
        case PixelConfig():
            return PixelObjective(model, config)
        case DistillConfig():
            return DistillObjective(model, config)


def misfits(weights: Weights, module: nn.Module | None = None) -> list[str]:
    """What of a file's tensors does not fit a module, by default the one that its config describes: what is
    missing, unknown, or has another shape. Tables that follow from the config may be missing."""
    if module is None:
        with torch.device("meta"):
            module = module_of(weights)
    own = {name.removeprefix("model."): tensor for name, tensor in module.state_dict().items()}
    derived = ("decoder.position", COUNTER)
    names = [name for name in {**own, **weights.tensors} if not name.endswith(derived)]
    names += [name for name in weights.tensors if name.endswith("decoder.position")]
    return [
        f"{name} is {shape_of(weights.tensors.get(name))} there, {shape_of(own.get(name))} here"
        for name in names
        if shape_of(weights.tensors.get(name)) != shape_of(own.get(name))
    ]


def check(weights: Weights) -> None:
    """That a file's tensors are those of its own config.

    Raises:
        UserError: they are not.
    """
    if wrong := misfits(weights):
        raise UserError(
            f"{weights.path}: {len(wrong)} tensors do not match its config ({'; '.join(wrong[:3])})"
        )


def _newest(run: Path) -> Path:
    for file in ("best.safetensors", "model.safetensors"):  # of a fine-tuned run; of a checkpoint or folder
        if (run / file).is_file():
            return run / file
    last = run / "checkpoints" / "last"
    if not last.is_file():
        raise UserError(
            f"{run} is no run directory with a checkpoint; name a run directory or a .safetensors file"
        )
    name = last.read_bytes().strip()
    if not re.fullmatch(rb"[0-9]{1,20}", name):
        raise UserError(f"{last} names no checkpoint; give the model.safetensors of one beside it")
    return run / "checkpoints" / name.decode() / "model.safetensors"


def _said_by_run(path: Path) -> dict[str, Any]:
    """What the run of a checkpoint's file says of its classes and images; nothing of other files."""
    folder = path.absolute().parent
    if folder.parent.name != "checkpoints":
        return {}
    try:
        says = json.loads((folder.parent.parent / "run.json").read_text())[checkpoint.SAYS]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}
    return says if isinstance(says, dict) else {}


def shape_of(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else str(list(tensor.shape))
