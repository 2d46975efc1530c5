"""The families of released checkpoints: which one a file is of, and the config that its shapes imply."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from math import isqrt
from typing import Any, Literal

from torch import Tensor

from itpn.errors import UserError
from itpn.heads.classify import ClassifierConfig
from itpn.nn.hivit import SIZES, HiViTConfig, Shape
from itpn.nn.positions import RelativeMethod
from itpn.nn.pyramid import ModelConfig, PyramidConfig
from itpn.objectives.decoder import DecoderConfig
from itpn.objectives.distill import DistillConfig
from itpn.objectives.features import FeaturesConfig
from itpn.objectives.pixel import PixelConfig
from itpn.weights.names import Kind, Style

HEAD_WIDTH = 64
"""Channels of an attention head in every published backbone; of a decoder's, half."""
LAYER_SCALE = 0.1
"""What the published layer scales started from; a trained one does not tell."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Common properties of a family's files that their shapes do not show."""

    title: str
    style: Style = "official"
    kinds: tuple[Kind, ...]
    """Kinds of model that its files may hold beside backbone and pyramid."""
    norm_eps: float = 1e-6
    embed_norm_eps: float = 1e-6
    relative_resampling: RelativeMethod = "fraction"
    mean: tuple[float, ...] = PixelConfig.mean
    std: tuple[float, ...] = PixelConfig.std
    positions: Literal["hidden", "all"] = "hidden"
    """Units that distillation supervised."""


FAMILIES = {
    "official-pixel": Family(title="the authors' iTPN, pixels", kinds=("pixel", "mean-norm", "backbone")),
    "official-clip": Family(
        title="the authors' iTPN, CLIP",
        kinds=("distill", "mean-norm", "backbone"),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        positions="all",
    ),
    "official-fast": Family(
        title="the authors' Fast-iTPN",
        style="fast",
        kinds=("distill", "mean-norm", "norm-mean", "backbone"),
    ),
    "official-detection": Family(title="the authors' detection backbone", kinds=("backbone",), norm_eps=1e-5),
    "official-segmentation": Family(
        title="the authors' segmentation backbone",
        kinds=("backbone",),
        norm_eps=1e-5,
        relative_resampling="size",
    ),
    "mmpretrain-itpn": Family(
        title="mmpretrain's iTPN or MAE-HiViT",
        style="mmpretrain",
        kinds=("pixel", "distill", "backbone"),
        embed_norm_eps=1e-5,
    ),
    "mmpretrain-hivit": Family(
        title="mmpretrain's HiViT classifier",
        style="mmpretrain",
        kinds=("mean", "backbone"),
        norm_eps=1e-5,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Given:
    """Properties that a file's shapes cannot show. None: as in the published models."""

    num_heads: int | None = None
    """Number of attention heads of stage 3. None: from the bias tables, else 64 channels per head."""
    decoder_heads: int | None = None
    """Number of attention heads of the pixel decoder. None: 32 channels per head."""
    norm_eps: float | None = None
    """Epsilon of the LayerNorms. None: the family's."""
    position_rows: tuple[int, int] | None = None
    """First row of the image's part of the position table, and the one after its last. None: all rows, or a
    tracker's search-image rows if a template's follow them."""
    stem: Literal["all", "sum", "first"] = "all"
    """Treatment of a stem with more than three input channels. all: keep them. sum: add every three, which
    equals giving one RGB image to all. first: keep the first three."""


def family_of(state: Mapping[str, Tensor], wrapping: Iterable[str] = ()) -> str:
    """The name in FAMILIES that a checkpoint's keys point to.

    Args:
        wrapping: what it was unwrapped from; a detector's or a segmentor's backbone has another epsilon.

    Raises:
        UserError: it is none of these families.
    """
    ends = {key.removeprefix("backbone.") for key in state}
    if "patch_embed.proj.weight" not in ends or not any(key.endswith(".reduction.weight") for key in ends):
        first = ", ".join(list(state)[:3]) or "no tensor at all"
        raise UserError(
            f"none of the known families: no patch_embed.proj.weight with blocks and merges (has {first} …)"
        )
    if "backbone.patch_embed.proj.weight" in state:
        with_neck = any(key.startswith("neck.") for key in state)
        return "mmpretrain-itpn" if with_neck else "mmpretrain-hivit"
    if "pos_embed" in state or any(key.endswith(".attn.q_proj.weight") for key in state):
        return "official-fast"
    if "detector heads" in wrapping or any(key.endswith(".rel_pos_h") for key in state):
        return "official-detection"
    if "segmentor heads" in wrapping or _other_grid(state):
        return "official-segmentation"
    return "official-clip" if "blocks.0.gamma_2" in state else "official-pixel"


def _other_grid(state: Mapping[str, Tensor]) -> bool:
    """Whether bias tables and position table are made for different grids, as only segmentation's are."""
    tables = [value for key, value in state.items() if key.endswith(".relative_position_bias_table")]
    positions = state.get("absolute_pos_embed")
    if not tables or positions is None or positions.ndim != 3:
        return False
    return len(tables[0]) != (2 * isqrt(positions.shape[1]) - 1) ** 2


def kind_of(keys: Collection[str]) -> Kind:
    """What a checkpoint holds beside backbone and pyramid, by its keys."""
    if "decoder_pred.weight" in keys or "neck.decoder_pred.weight" in keys:
        return "pixel"
    if "lm_head.weight" in keys or "head.cls_head.weight" in keys:
        return "distill"
    if "head.fc.weight" in keys:
        return "mean"
    if "head.weight" in keys:
        return "norm-mean" if "norm.weight" in keys and "fc_norm.weight" not in keys else "mean-norm"
    return "backbone"


def config_of(
    tensors: Mapping[str, Tensor], family: Family, kind: Kind, patch: tuple[int, int], given: Given
) -> dict[str, Any]:
    """The config, as JSON values, of tensors under our names.

    Args:
        patch: channels of an image, and pixels per side of a cell, of the stem's convolution.

    Raises:
        UserError: the shapes contradict one another, or do not tell the number of heads.
    """
    if given.norm_eps is not None:
        family = replace(family, norm_eps=given.norm_eps)
    model = ModelConfig(
        backbone=_backbone(tensors, family, kind, patch, given), pyramid=_pyramid(tensors, family)
    )
    config: dict[str, Any] = {"model": asdict(model)}
    match kind:
        case "pixel":
            config["objective"] = asdict(_pixel(tensors, family, given))
        case "distill":
            config["objective"] = asdict(_distill(tensors, family))
        case "mean-norm" | "norm-mean" | "mean":
            num_classes = len(_need(tensors, "head.weight"))
            config["classifier"] = asdict(ClassifierConfig(num_classes=num_classes, pooling=kind))
        case "backbone":
            pass
    return config


def _backbone(
    tensors: Mapping[str, Tensor], family: Family, kind: Kind, patch: tuple[int, int], given: Given
) -> HiViTConfig:
    width = _need(tensors, "backbone.position").shape[-1]
    depths = tuple(_count(tensors, f"backbone.stage{stage}") for stage in (1, 2, 3))
    in_channels, patch_size = patch[0], 4 * patch[1]
    early = "backbone.stage1.0.mlp.fc1.weight"
    late = "backbone.stage3.0."
    table = tensors.get(f"{late}attn.relative_position")
    rows = tensors.get(f"{late}attn.relative_position_rows")
    relative = isqrt(len(table)) if table is not None else len(rows) if rows is not None else None
    image_size = patch_size * _side(len(_need(tensors, "backbone.position")), "the position table")
    relative_size = patch_size * (relative + 1) // 2 if relative else image_size
    layers = "fast" if family.style == "fast" else "hivit"
    heads = _num_heads(width, table, rows) if given.num_heads is None else given.num_heads
    shape = Shape(width, depths, heads, layers)  # type: ignore[arg-type]  # three of them
    size = next((name for name, row in SIZES.items() if row == shape), None)
    numbers = {"size": size} if size else dict(shape._asdict())
    return HiViTConfig(
        **numbers,
        image_size=image_size,
        patch_size=patch_size,
        in_channels=in_channels,
        early_mlp_ratio=_ratio(tensors, early),
        mlp_ratio=_ratio(tensors, f"{late}mlp.fc1.weight"),
        relative_position_bias=relative is not None,
        relative_position_decomposed=rows is not None,
        relative_image_size=None if relative_size == image_size else relative_size,
        layer_scale=LAYER_SCALE if f"{late}scale1.gamma" in tensors else None,
        norm_eps=family.norm_eps,
        position="sincos-row" if family.style == "mmpretrain" and kind == "pixel" else "sincos-column",
        position_frozen=family.style == "mmpretrain" and kind in ("pixel", "distill"),
        relative_resampling=family.relative_resampling,
        position_resampling="exact" if family.style == "fast" else "published",
    )


def _pyramid(tensors: Mapping[str, Tensor], family: Family) -> PyramidConfig | None:
    if not any(name.startswith("pyramid.") for name in tensors):
        return None
    return PyramidConfig(
        width=len(_need(tensors, "pyramid.lateral8.weight")),
        depth=_count(tensors, "pyramid.blocks8"),
        mlp_ratio=_ratio(tensors, "pyramid.out16.mlp.fc1.weight"),
        norm_eps=family.norm_eps,
        layers="fast" if family.style == "fast" else "hivit",
    )


def _pixel(tensors: Mapping[str, Tensor], family: Family, given: Given) -> PixelConfig:
    width = len(_need(tensors, "mask_token"))
    decoder = DecoderConfig(
        width=width,
        depth=_count(tensors, "decoder.blocks"),
        num_heads=max(1, 2 * width // HEAD_WIDTH) if given.decoder_heads is None else given.decoder_heads,
        mlp_ratio=_ratio(tensors, "decoder.blocks.0.mlp.fc1.weight"),
        embed_norm_eps=family.embed_norm_eps,
    )
    return PixelConfig(decoder=decoder, features=FeaturesConfig(weight=0.0))


def _distill(tensors: Mapping[str, Tensor], family: Family) -> DistillConfig:
    fast = family.style == "fast"
    return DistillConfig(
        target_width=len(_need(tensors, "head.weight")),
        mask_token="after-stem" if fast else "after-local",
        fuse="units" if fast else "cells",
        auxiliary="auxiliary.head.weight" in tensors,
        positions=family.positions,
        mean=family.mean,
        std=family.std,
        embed_norm_eps=family.embed_norm_eps,
    )


def _num_heads(width: int, table: Tensor | None, rows: Tensor | None) -> int:
    if table is not None:
        return table.shape[-1]
    head_width = HEAD_WIDTH if rows is None else rows.shape[-1]
    if width % head_width:
        raise UserError(
            f"the shapes do not tell the number of attention heads, and {width} channels are no multiple of "
            f"the published {head_width} per head: give it with --num-heads"
        )
    return width // head_width


def _need(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors or not tensors[name].ndim:
        raise UserError(f"the checkpoint has nothing that becomes {name}")
    return tensors[name]


def _count(tensors: Mapping[str, Tensor], stem: str) -> int:
    numbers = {name.removeprefix(f"{stem}.").split(".")[0] for name in tensors if name.startswith(f"{stem}.")}
    return len(numbers)


def _side(cells: int, what: str) -> int:
    side = isqrt(cells)
    if side * side != cells:
        raise UserError(f"{what} has {cells} rows, which is no square grid")
    return side


def _ratio(tensors: Mapping[str, Tensor], name: str) -> float:
    """Hidden over outer width of an MLP, such that truncating their product gives the hidden width back."""
    weight = _need(tensors, name)
    if weight.ndim != 2 or not weight.numel():
        raise UserError(f"what becomes {name} has the shape {list(weight.shape)}")
    hidden, width = weight.shape
    return next(ratio for ratio in (hidden / width, (hidden + 0.5) / width) if int(width * ratio) == hidden)
