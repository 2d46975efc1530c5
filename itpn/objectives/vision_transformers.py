"""timm's vision transformers: which of them can teach, and their weights under timm's or OpenAI's names."""

import difflib
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from itpn.errors import UserError

if TYPE_CHECKING:  # timm takes two seconds to import; only those who build a teacher wait for it
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

Vit: TypeAlias = "VisionTransformer | Eva"
CLIP = "vit_base_patch16_clip_quickgelu_224.openai"


def pretrained_config(vit: nn.Module) -> dict[str, Any]:
    """What timm knows of a model's weights and their images, under timm's names."""
    return cast(dict[str, Any], vit.pretrained_cfg)


def from_timm(name: str, overlay: Mapping[str, Any], sizes: Mapping[str, Any] | None = None) -> Vit:
    """The timm model ``name`` with its weights; ``overlay`` and ``sizes`` go before what timm knows of them.

    Raises:
        UserError: no such model, no weights, weights of another model, or no plain vision transformer.
    """
    import timm

    sizes = sizes or {}
    untrained(name, overlay, sizes)  # what cannot teach is refused before it is downloaded
    expected = Exception if "state_dict" in overlay else (OSError, RuntimeError)  # files can be anything
    try:
        with _quiet_hub():
            vit = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(overlay), **sizes)
    except expected as error:
        reason = _short(error)
        if "state_dict" in overlay:
            raise UserError(f"--objective.teacher-weights: they do not fit {name}: {reason}") from error
        raise UserError(
            f"--objective.teacher: the weights of {name} could not be downloaded from the Hub ({reason}); "
            "connect to it, or give a file with --objective.teacher-weights"
        ) from error
    pretrained_config(vit).pop("state_dict", None)  # else the weights stay in memory twice
    return _without_added_bias(cast(Vit, vit))


def untrained(
    name: str,
    overlay: Mapping[str, Any] | None = None,
    sizes: Mapping[str, Any] | None = None,
    device: torch.device | str = "meta",
) -> Vit:
    """The timm model ``name`` as it starts.

    Raises:
        UserError: no such model, or none that can teach.
    """
    import timm
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    try:
        with torch.device(device), _quiet_hub():
            vit = timm.create_model(name, pretrained_cfg_overlay=dict(overlay or {}), **(sizes or {}))
    except (OSError, RuntimeError, ValueError) as error:
        near = difflib.get_close_matches(name, timm.list_models() + timm.list_pretrained())
        hint = f"; timm's nearest are {', '.join(near)}" if near else "; give a model as timm names it"
        raise UserError(f"--objective.teacher {name}: {_short(error).rstrip('.')}{hint}") from error
    if not isinstance(vit, VisionTransformer | Eva):
        raise UserError(f"--objective.teacher: {name} ({type(vit).__name__}) is no plain vision transformer")
    notes = pretrained_config(vit).get("notes", ())
    if any("quickgelu" in note for note in notes) and "quickgelu" not in name:
        raise UserError(
            f"--objective.teacher: {name} has GELU where its weights need QuickGELU; use "
            f"{name.replace('_clip_', '_clip_quickgelu_')}"
        )
    return _without_added_bias(vit)


def _without_added_bias(vit: Vit) -> Vit:
    """OpenAI's projections have no bias; timm gives them one, of zeros."""
    bias = getattr(vit.head, "bias", None)
    openai = pretrained_config(vit).get("tag") == "openai"
    if openai and bias is not None and (bias.is_meta or not bias.any()):
        vit.head.register_parameter("bias", None)
    return vit


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """The Hub's client tells of each of its tries, where one line at the end will do."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def from_openai(state: Mapping[str, Tensor], num_heads: int | None = None) -> Vit:
    """The vision tower of OpenAI's CLIP under its own names, with or without ``visual.``, as a timm model.

    All sizes follow from shapes; heads are 64 wide unless ``num_heads`` is given. Its head is the projection.

    Raises:
        UserError: there is no whole vision transformer in ``state``.
    """
    prefix = "visual." if "visual.class_embedding" in state else ""
    visual = {f"visual.{key.removeprefix(prefix)}": x for key, x in state.items() if key.startswith(prefix)}
    try:
        width, _, patch_size, _ = visual["visual.conv1.weight"].shape
        num_cells, _ = visual["visual.positional_embedding"].shape
        hidden, _ = visual["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape
        _, num_classes = visual["visual.proj"].shape
    except KeyError as error:
        raise UserError(
            f"--objective.teacher-weights: no vision transformer under OpenAI's names, {error} is missing; "
            "for weights under other names say which model they are of (--objective.teacher)"
        ) from error
    except ValueError as error:
        raise UserError(
            f"--objective.teacher-weights: OpenAI's names, but not a vision transformer's shapes ({error})"
        ) from error
    if min(width, patch_size, num_cells - 1) < 1:
        raise UserError("--objective.teacher-weights: a weight is empty; the file is not CLIP's")
    if num_heads is None and width % 64:
        raise UserError(f"--objective.teacher-weights: {width} channels are no whole number of heads of 64")
    sizes = {
        "img_size": patch_size * math.isqrt(num_cells - 1),
        "patch_size": patch_size,
        "embed_dim": width,
        "depth": sum(key.endswith(".ln_1.weight") for key in visual),
        "num_heads": num_heads or width // 64,
        "mlp_ratio": hidden / width,
    }
    overlay = {"state_dict": visual, "num_classes": num_classes}
    return from_timm(CLIP, overlay, sizes)  # all but the sizes is the same in OpenAI's other models
