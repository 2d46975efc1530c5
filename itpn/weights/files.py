"""Our own weight files: safetensors whose metadata carries the config, under portable names.

A portable name is the model's own, ``backbone.stage1.0.mlp.fc1.weight`` or ``pyramid.align.bias``; what
pre-training adds (``embed.*``, ``mask_token``, ``decoder.*``, ``head.*``, ``features.*``) keeps the
objective's. Fixed tables of decoders stay out: they follow from the config.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import cattrs
from cattrs.errors import BaseValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from itpn.engine import checkpoint
from itpn.errors import UserError
from itpn.nn.positions import resample_relative, resample_table
from itpn.nn.pyramid import ModelConfig
from itpn.objectives.pixel import PixelObjective

T = TypeVar("T")
MODEL_PARTS = ("backbone.", "pyramid.")
NANO = Path(__file__).parents[1] / "data" / "nano.safetensors"
"""A nano model pre-trained on the bundled sample, with its decoder (its card is nano.md beside it)."""
_converter = cattrs.Converter(forbid_extra_keys=True)


@dataclass(frozen=True)
class Weights:
    path: Path
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    """The run's whole config, as JSON values."""

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
            raise UserError(f"{self.path}: its config has no {name!r}; it was not written by itpn")
        return self._structure(self.config[name], kind, name)

    def recipe(self, kind: type[T]) -> T:
        """The whole config as the recipe's dataclass."""
        return self._structure(self.config, kind, "recipe")

    def _structure(self, values: Any, kind: type[T], name: str) -> T:
        try:
            return _converter.structure(values, kind)
        except BaseValidationError as error:
            reasons = "; ".join(cattrs.transform_error(error))
            raise UserError(
                f"{self.path}: its config does not fit this version's {name}: {reasons}"
            ) from error


def portable(objective: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """An objective's state under portable names; every rank must ask, as for `checkpoint.model_tensors`."""
    return {
        name.removeprefix("model."): tensor
        for name, tensor in checkpoint.model_tensors(objective, keep=keep).items()
        if not name.endswith("decoder.position")
    }


def save(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Written beside and renamed, so that a file of that name is always whole."""
    beside = path.with_name(f".{path.name}.writing")
    try:
        checkpoint.write_tensors(beside, tensors, {"format": "pt", "config": json.dumps(config)})
        checkpoint.sync(beside)
        beside.replace(path)
        checkpoint.sync(path.parent)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def read(path: Path) -> Weights:
    """A ``pretrained.safetensors``, a ``model.safetensors``, or a run directory's newest checkpoint.

    Raises:
        UserError: there is no such file, or it is none of ours.
    """
    file_path = _newest(path) if path.is_dir() else path
    try:
        with safe_open(file_path, framework="pt") as file:
            names = list(file.keys())
            tensors = {name.removeprefix("model."): file.get_tensor(name) for name in names}
            metadata = file.metadata() or {}
    except FileNotFoundError as error:
        raise UserError(
            f"there is no file {path}; name a .safetensors file of weights, or a run directory"
        ) from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read {file_path} as safetensors ({error})") from error
    if "config" not in metadata:
        raise UserError(f"{file_path} carries no config of ours in its metadata; it was not written by itpn")
    return Weights(file_path, tensors, json.loads(metadata["config"]))


def _newest(run: Path) -> Path:
    last = run / "checkpoints" / "last"
    if not last.is_file():
        raise UserError(
            f"{run} is no run directory with a checkpoint; name a run directory or a .safetensors file"
        )
    return run / "checkpoints" / last.read_text().strip() / "model.safetensors"


def load_into(objective: PixelObjective, weights: Weights) -> str:
    """Load weights into an objective and say in one line what came from the file.

    Backbone and pyramid must be there and fit; position tables of another image size are resampled. What
    pre-training adds is taken, part by part, where the file has it; a feature teacher that the file lacks
    starts as a copy of the loaded backbone.

    Raises:
        UserError: something is missing, has another shape, or is unknown to the model.
    """
    own = {name.removeprefix("model."): name for name in objective.state_dict()}
    state = objective.state_dict()
    weights = _on_grid_of(objective, weights)
    parts = sorted({name.split(".")[0] for name in own})
    taken = [part for part in parts if part in weights.parts]
    wrong = [
        f"{name} is {_shape(weights.tensors.get(name))} there, {_shape(state.get(own.get(name, '')))} here"
        for name in {**own, **weights.tensors}
        if (name.startswith(MODEL_PARTS) or name.split(".")[0] in taken)
        and not name.endswith("decoder.position")
        and _shape(weights.tensors.get(name)) != _shape(state.get(own.get(name, "")))
    ]
    if wrong:
        raise UserError(
            f"--init {weights.path}: {len(wrong)} tensors do not fit ({'; '.join(wrong[:3])}); "
            "give the model the file's size and parts with --model.backbone.* and --model.pyramid.*"
        )
    tensors = {
        name: value for name, value in weights.tensors.items() if not name.endswith("decoder.position")
    }
    state |= {own[name]: value for name, value in tensors.items() if name in own}
    if "features" not in taken:
        teacher = "features.teacher."
        state |= {
            name: state[f"model.backbone.{name.removeprefix(teacher)}"]
            for name in state
            if name.startswith(teacher)
        }
    objective.load_state_dict(state)
    fresh = [part for part in parts if part not in taken]
    return f"loaded {', '.join(taken)} from {weights.path}" + (
        f"; {', '.join(fresh)} start anew" if fresh else ""
    )


def _on_grid_of(objective: PixelObjective, weights: Weights) -> Weights:
    """The same weights with their position tables resampled to the objective's image size."""
    here, there = objective.model.config.backbone, weights.part("model", ModelConfig).backbone
    if here.grid == there.grid:
        return weights
    tensors = dict(weights.tensors)
    for name, table in weights.tensors.items():
        if name.endswith(".relative_position"):
            tensors[name] = resample_relative(table, there.grid, here.grid)
        elif name == "backbone.position" or name.endswith("teacher.position"):
            tensors[name] = resample_table(table, there.grid, here.grid)
    return replace(weights, tensors=tensors)


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else str(list(tensor.shape))
