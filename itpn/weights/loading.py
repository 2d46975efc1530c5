"""From a file's tensors into a module: whole, or as far as a new run has use for them."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from itpn.errors import UserError
from itpn.nn.hivit import HiViT, HiViTConfig
from itpn.nn.positions import resample_axis, resample_relative, resample_table
from itpn.nn.pyramid import Model, ModelConfig
from itpn.objectives.distill import DistillConfig, DistillObjective
from itpn.objectives.pixel import PixelConfig, PixelObjective
from itpn.weights.files import MODEL_PARTS, Weights, kind_of, misfits, shape_of

SHAPING = (
    "size", "width", "depths", "num_heads", "layers", "image_size", "patch_size", "in_channels",
    "early_mlp_ratio", "mlp_ratio", "relative_position_bias", "relative_position_decomposed",
    "relative_image_size", "layer_scale", "depth",
)  # fmt: skip
"""Fields of the configs that shapes of tensors follow from."""


def load_into(objective: PixelObjective | DistillObjective, weights: Weights) -> str:
    """Load weights into an objective and say in one line what came from the file.

    Backbone and pyramid must be there and fit; position tables of another image size are resampled. What
    pre-training adds is taken, part by part, where the file has it; a feature teacher that the file lacks
    starts as a copy of the loaded backbone.

    Raises:
        UserError: something is missing, has another shape, or is unknown to the model.
    """
    own = {name.removeprefix("model."): name for name in objective.state_dict()}
    state = objective.state_dict()
    weights = resampled(weights, objective.model.config.backbone)
    if not _is_of(objective.config, weights.config):  # its other parts are of another kind, or a classifier's
        for part in weights.parts - {"backbone", "pyramid"}:
            weights = weights.without(part)
    parts = sorted({name.split(".")[0] for name in own})
    taken = [part for part in parts if part in weights.parts]
    wrong = [
        f"{name} is {shape_of(theirs)} there, {shape_of(state.get(own.get(name, '')))} here"
        for name in {**own, **weights.tensors}
        for theirs in [weights.tensors.get(name)]
        if (name.startswith(MODEL_PARTS) or name.split(".")[0] in taken)
        and not name.endswith("decoder.position")
        and shape_of(theirs) != shape_of(state.get(own.get(name, "")))
    ]
    if wrong and "pyramid" not in weights.parts and objective.model.pyramid is not None:
        raise UserError(f"--init {weights.path}: it holds no pyramid, and this model has one to load")
    there = weights.part("model", ModelConfig)
    if wrong:
        raise UserError(
            f"--init {weights.path}: {len(wrong)} tensors do not fit ({'; '.join(wrong[:3])}); the file's "
            f"model has {' '.join(_flags(there, objective.model.config, SHAPING)) or 'other parts'}"
        )
    remarks = _unlike(there, objective.model.config, weights.path)
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
    anew = f"; {', '.join(fresh)} start anew" if fresh else ""
    return f"loaded {', '.join(taken)} from {weights.path}{anew}{remarks}"


def _unlike(there: ModelConfig, here: ModelConfig, path: Path) -> str:
    """What no tensor's shape tells: an error for heads, a remark for epsilons and ways of resampling.

    Raises:
        UserError: the models have another number of attention heads.
    """
    heads = there.backbone.shape.num_heads
    if heads != here.backbone.shape.num_heads:
        raise UserError(
            f"--init {path}: it has {heads} attention heads, the model {here.backbone.shape.num_heads}; "
            f"give --model.backbone.num-heads {heads}"
        )
    flags = _flags(there, here, ("norm_eps", "position_resampling", "relative_resampling"))
    return f"; these weights saw {' '.join(flags)}, which this run does not have" if flags else ""


def _flags(there: ModelConfig, here: ModelConfig, names: Collection[str]) -> list[str]:
    """Arguments that make one model's config another's, of the fields named."""
    flags = []
    for part, theirs, ours in (
        ("backbone", there.backbone, here.backbone),
        ("pyramid", there.pyramid, here.pyramid),
    ):
        for name in names:
            value = getattr(theirs, name, None)
            if ours is None or value == getattr(ours, name, None):
                continue
            flag = f"--model.{part}.{name.replace('_', '-')}"
            if isinstance(value, bool):
                flags.append(flag if value else flag.replace(f"{part}.", f"{part}.no-"))
            else:
                text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
                flags.append(f"{flag} {text}")
    return flags


def resampled(weights: Weights, backbone: HiViTConfig) -> Weights:
    """The same weights with their position tables resampled to another image size, as the model does."""
    there = weights.part("model", ModelConfig).backbone
    offset = 0.1 if backbone.position_resampling == "published" else 0.0
    tensors = dict(weights.tensors)
    positions = tensors.get("backbone.position")
    if positions is not None and len(positions) != there.num_units:
        raise UserError(
            f"{weights.path}: its position table is not for the {there.image_size} pixels it says"
        )
    for name, table in weights.tensors.items():
        old, new = there.relative_grid, backbone.relative_grid
        if name.startswith("auxiliary."):  # its blocks have tables even where the backbone has none
            old, new = old or there.grid, new or backbone.grid
        try:
            if name.endswith(".relative_position") and old and new:
                tensors[name] = resample_relative(table, old, new, backbone.relative_resampling)
            elif name.endswith(".relative_position_rows") and new:
                tensors[name] = resample_axis(table, new[0])
            elif name.endswith(".relative_position_cols") and new:
                tensors[name] = resample_axis(table, new[1])
            elif name.endswith(("backbone.position", "teacher.position")) and there.grid != backbone.grid:
                tensors[name] = resample_table(table, there.grid, backbone.grid, offset)
        except RuntimeError as error:
            raise UserError(f"{weights.path}: {name} is not for the size that its config says") from error
    return replace(weights, tensors=tensors)


def load_backbone(backbone: HiViT, weights: Weights) -> str:
    """Load a file's backbone and say in one line what came from the file and what was left in it.

    Position tables of another size are resampled; relative-position tables that the file lacks stay zero.

    Raises:
        UserError: a tensor is missing, unknown, or has another shape.
    """
    added, num_tensors = _load_parts({"backbone": backbone}, backbone.config, weights)
    left = sorted(weights.parts - {"backbone"})
    return (
        f"loaded the backbone from {weights.path}, {num_tensors} tensors; the head starts anew"
        f"{added}{'; left out: ' + ', '.join(left) if left else ''}"
    )


def load_model(model: Model, weights: Weights, *, pyramid: bool = True) -> str:
    """Load a file's backbone and the whole pyramid, or the backbone alone, and say in one line how much of
    the model came from the file; otherwise like `load_backbone`.

    Raises:
        UserError: a tensor is missing, unknown, or has another shape; there is no pyramid.
    """
    parts: dict[str, nn.Module] = {"backbone": model.backbone}
    if pyramid and model.pyramid is not None:
        parts["pyramid"] = model.pyramid
    added, _ = _load_parts(parts, model.backbone.config, weights)
    shares = []
    for name, part in (("backbone", model.backbone), ("pyramid", model.pyramid)):
        total = 0 if part is None else sum(parameter.numel() for parameter in part.parameters())
        shares.append(f"{total if name in parts else 0:,} of the {name}'s {total:,} parameters")
    left = sorted(weights.parts - parts.keys())
    return (
        f"loaded {' and '.join(shares)} from {weights.path}; heads start anew{added}"
        f"{'; left out: ' + ', '.join(left) if left else ''}"
    )


def _load_parts(parts: Mapping[str, nn.Module], backbone: HiViTConfig, weights: Weights) -> tuple[str, int]:
    """Every tensor of the parts from those of the same names; what to add of relative positions, and how many
    tensors there were."""
    if missing := parts.keys() - weights.parts:
        raise UserError(f"--init {weights.path}: it holds no {' and no '.join(sorted(missing))}")
    there = weights.part("model", ModelConfig).backbone
    tensors = {
        name: value
        for name, value in resampled(weights, backbone).tensors.items()
        if name.split(".")[0] in parts
    }
    own = {f"{part}.{name}": value for part in parts for name, value in parts[part].state_dict().items()}
    added = [name for name in own if ".relative_position" in name and not there.relative_position_bias]
    wrong = [
        f"{name} is {shape_of(tensors.get(name))} there, {shape_of(own.get(name))} here"
        for name in {**own, **tensors}
        if shape_of(tensors.get(name)) != shape_of(own.get(name)) and name not in added
    ]
    if wrong:
        raise UserError(
            f"--init {weights.path}: {len(wrong)} tensors do not fit the {' and '.join(parts)} "
            f"({'; '.join(wrong[:3])})"
        )
    for part, module in parts.items():
        state = {name: tensors.get(f"{part}.{name}", value) for name, value in module.state_dict().items()}
        module.load_state_dict(state)
    return ", relative positions at zero" if added else "", len(tensors)


def load_exactly(module: nn.Module, weights: Weights) -> None:
    """Load weights into a module of the same names.

    Raises:
        UserError: a tensor is missing, unknown, or has another shape.
    """
    if wrong := misfits(weights, module):
        raise UserError(f"{weights.path}: {len(wrong)} tensors do not fit the model ({'; '.join(wrong[:3])})")
    state = module.state_dict()
    own = {name.removeprefix("model."): name for name in state}
    module.load_state_dict(state | {own[name]: tensor for name, tensor in weights.tensors.items()})


def _is_of(objective: PixelConfig | DistillConfig, config: Mapping[str, Any]) -> bool:
    return "objective" in config and isinstance(objective, kind_of(config["objective"]))
