"""Names of parameters in released checkpoints and ours, both ways, and the shapes of their kernels.

History stays here; nothing else knows these names. Ours are the portable names of `itpn.weights.files`.
"""

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from math import isqrt
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from itpn.errors import UserError
from itpn.nn.positions import Grid, relative_index

Kind = Literal["pixel", "distill", "mean-norm", "norm-mean", "mean", "backbone"]
"""What a checkpoint holds beside backbone and pyramid: what predicts pixels or a teacher's features, a
classifier with one of three poolings, or nothing."""
Style = Literal["official", "fast", "mmpretrain"]

# Theirs to ours; `*` stands for one part of a name, at the end for one or more, and is carried over. `early`,
# `merge` and `late` are the entries of their one list of blocks: stages 1 and 2, the merges between the
# stages, stage 3.
BACKBONE = {
    "patch_embed.proj.*": "backbone.stem_proj.*",
    "patch_embed.norm.*": "backbone.stem_norm.*",
    "absolute_pos_embed": "backbone.position",
    "early.*.*.norm2.*": "early.*.*.norm.*",
    "early.*.*.mlp.fc*.*": "early.*.*.mlp.fc*.*",
    "early.*.*.gamma_2": "early.*.*.scale.gamma",
    "merge.*.norm.*": "merge.*.norm.*",
    "merge.*.reduction.*": "merge.*.reduce.*",
    "late.*.*.attn.relative_position_bias_table": "late.*.*.attn.relative_position",
    "late.*.*.attn.rel_pos_h": "late.*.*.attn.relative_position_rows",
    "late.*.*.attn.rel_pos_w": "late.*.*.attn.relative_position_cols",
    "late.*.*.gamma_1": "late.*.*.scale1.gamma",
    "late.*.*.gamma_2": "late.*.*.scale2.gamma",
    "late.*.*.norm*.*": "late.*.*.norm*.*",
    "late.*.*.attn.qkv.*": "late.*.*.attn.qkv.*",
    "late.*.*.attn.proj.*": "late.*.*.attn.proj.*",
    "late.*.*.attn.*_bias": "late.*.*.attn.*_bias",
    "late.*.*.mlp.fc*.*": "late.*.*.mlp.fc*.*",
}
PYRAMID = {
    "align_dim_16tofpn.*": "pyramid.align.*",
    "align_dim_16to8.*": "pyramid.lateral8.*",
    "align_dim_8to4.*": "pyramid.lateral4.*",
    "split_16to8.norm.*": "pyramid.split8.norm.*",
    "split_16to8.reduction.weight": "pyramid.split8.expand.weight",
    "split_16to8.reduction.bias": "pyramid.split8.bias",
    "split_8to4.norm.*": "pyramid.split4.norm.*",
    "split_8to4.reduction.weight": "pyramid.split4.expand.weight",
    "split_8to4.reduction.bias": "pyramid.split4.bias",
    "block_16to8.*.norm2.*": "pyramid.blocks8.*.norm.*",
    "block_16to8.*.mlp.*": "pyramid.blocks8.*.mlp.*",
    "block_8to4.*.norm2.*": "pyramid.blocks4.*.norm.*",
    "block_8to4.*.mlp.*": "pyramid.blocks4.*.mlp.*",
    "fpn_modules.0.norm2.*": "pyramid.out16.norm.*",
    "fpn_modules.0.mlp.*": "pyramid.out16.mlp.*",
    "fpn_modules.1.norm2.*": "pyramid.out8.norm.*",
    "fpn_modules.1.mlp.*": "pyramid.out8.mlp.*",
    "fpn_modules.2.norm2.*": "pyramid.out4.norm.*",
    "fpn_modules.2.mlp.*": "pyramid.out4.mlp.*",
}
FAST = {
    "pos_embed": "backbone.position",
    "early.*.*.mlp.ffn_ln.*": "early.*.*.mlp.norm.*",
    "late.*.*.mlp.w1.*": "late.*.*.mlp.gate.*",
    "late.*.*.mlp.w2.*": "late.*.*.mlp.fc1.*",
    "late.*.*.mlp.w3.*": "late.*.*.mlp.fc2.*",
    "late.*.*.mlp.ffn_ln.*": "late.*.*.mlp.norm.*",
    "norm.*": "pyramid.norm.*",
}
EMBED = {
    "mask_token": "mask_token",
    "decoder_embed.0.0.*": "embed.p16.norm.*",
    "decoder_embed.0.1.*": "embed.p16.proj.*",
    "decoder_embed.1.0.*": "embed.p8.norm.*",
    "decoder_embed.1.1.*": "embed.p8.proj.*",
    "decoder_embed.2.0.*": "embed.p4.norm.*",
    "decoder_embed.2.1.*": "embed.p4.proj.*",
}
HEADS: dict[Kind, dict[str, str]] = {
    "pixel": {
        **EMBED,
        "decoder_embed.*": "embed.*",  # of MAE, which has one level
        "decoder_pos_embed": "decoder.position",
        "decoder_blocks.*": "decoder.blocks.*",
        "decoder_norm.*": "decoder.norm.*",
        "decoder_pred.*": "head.*",
    },
    "distill": {
        **EMBED,
        "norm.*": "norm.*",
        "lm_head.*": "head.*",
        "norm_cls.*": "auxiliary.norm.*",
        "lm_cls_head.*": "auxiliary.head.*",
        "cls_pt_layers.*.attn.relative_position_bias_table": "auxiliary.blocks.*.attn.relative_position",
        "cls_pt_layers.*.gamma_1": "auxiliary.blocks.*.scale1.gamma",
        "cls_pt_layers.*.gamma_2": "auxiliary.blocks.*.scale2.gamma",
        "cls_pt_layers.*": "auxiliary.blocks.*",
    },
    "mean-norm": {"fc_norm.*": "norm.*", "head.*": "head.*"},
    "norm-mean": {"norm.*": "norm.*", "head.*": "head.*"},
    "mean": {"head.*": "head.*"},
    "backbone": {},
}
MMPRETRAIN = {  # theirs to the authors'
    "backbone.pos_embed": "absolute_pos_embed",
    "backbone.patch_embed.*": "patch_embed.*",
    "backbone.blocks.*": "blocks.*",
    "neck.ln1.*": "decoder_norm.*",
    "neck.decoder_blocks.*.ln1.*": "decoder_blocks.*.norm1.*",
    "neck.decoder_blocks.*.ln2.*": "decoder_blocks.*.norm2.*",
    "neck.decoder_blocks.*.ffn.layers.0.0.*": "decoder_blocks.*.mlp.fc1.*",
    "neck.decoder_blocks.*.ffn.layers.1.*": "decoder_blocks.*.mlp.fc2.*",
    "head.cls_head.*": "lm_head.*",
    "head.fc.*": "head.*",
}
BLOCK = re.compile(r"^blocks\.(0|[1-9][0-9]{0,3})(?=\.)")
COMPUTED = "relative_position_index"
"""The end of the names of buffers that follow from the grid."""


def to_ours(state: Mapping[str, Tensor], style: Style, kind: Kind) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors under our names and in our shapes, and the keys that no rule knows.

    Raises:
        UserError: two keys have the same name here.
    """
    state = {key: value for key, value in state.items() if not key.endswith(COMPUTED)}
    state = _fuse(state) if style == "fast" else state
    official = {key: _rename(key, _mmpretrain(kind)) if style == "mmpretrain" else key for key in state}
    places, table = _places(official.values()), _table(style, kind)
    ours, unknown = {}, []
    for key, value in state.items():
        placed = BLOCK.sub(lambda found: places.get(int(found[1]), "?"), official[key] or "")
        name = _rename(placed, table)
        if name is None:
            unknown.append(key)
            continue
        name = re.sub(r"^(early|merge|late)\.", "backbone.", name)
        if name in ours:
            raise UserError(f"{key} and another key both become {name}; leave one out with --leave-out")
        ours[name] = _our_shape(name, value)
    if style == "mmpretrain" and "embed.weight" in ours and "decoder.position" in ours:
        # MAE's decoder keeps the position of a class token that it does not have.
        ours["decoder.position"] = ours["decoder.position"][1:]
    return ours, unknown


def to_theirs(
    tensors: Mapping[str, Tensor], style: Style, kind: Kind, in_channels: int, relative_grid: Grid | None
) -> dict[str, Tensor]:
    """The way back: tensors under their names and in their shapes, with the buffers that they keep.

    Args:
        relative_grid: what relative-position tables are made for, or None where there are none.

    Raises:
        UserError: a name that their models have no place for.
    """
    table = _merged([{ours: theirs} for theirs, ours in _table(style, kind).items()])
    blocks = {place: i for i, place in enumerate(_order(tensors))}
    official = {}
    for name, value in tensors.items():
        place = _place(name)
        area = {"stage1": "early", "stage2": "early", "stage3": "late"}.get(place[:6], "merge")
        key = _rename(f"{area}.{name.removeprefix('backbone.')}" if place else name, table)
        if key is None:
            raise UserError(f"their models have no place for {name}")
        if place:
            key = key.replace(f"{area}.{place}", f"blocks.{blocks[place]}")
        official[key] = _their_shape(name, value, style == "fast", in_channels)
    if style == "fast":
        official = _split(official)
    if style == "mmpretrain" and "embed.weight" in tensors and "decoder_pos_embed" in official:
        official["decoder_pos_embed"] = F.pad(official["decoder_pos_embed"], (0, 0, 1, 0))
    if relative_grid:
        official[COMPUTED] = relative_index(relative_grid)
    if style != "mmpretrain":
        return official
    if relative_grid:
        late = [i for place, i in blocks.items() if place.startswith("stage3")]
        official |= {f"blocks.{i}.attn.{COMPUTED}": official[COMPUTED] for i in late}
    back = {theirs: ours for ours, theirs in _mmpretrain(kind).items()}
    back = {COMPUTED: f"backbone.{COMPUTED}", **back}
    return {str(_rename(key, back)): value for key, value in official.items()}


def _table(style: Style, kind: Kind) -> dict[str, str]:
    if style != "fast":
        return _merged([HEADS[kind], PYRAMID, BACKBONE])
    # In pre-training the fused levels share the norm that stands in front of the pyramid.
    order = [FAST, HEADS[kind]] if kind == "distill" else [HEADS[kind], FAST]
    return _merged([*order, PYRAMID, BACKBONE])


def _merged(tables: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """One table in which the first of several rows of the same name holds."""
    merged: dict[str, str] = {}
    for table in tables:
        merged = {**merged, **{key: value for key, value in table.items() if key not in merged}}
    return merged


def _mmpretrain(kind: Kind) -> dict[str, str]:
    token = "backbone.mask_token" if kind == "distill" else "neck.mask_token"
    return {token: "mask_token", **MMPRETRAIN, "neck.*": "*"}


@lru_cache(maxsize=1024)
def _pattern(theirs: str) -> re.Pattern[str]:
    start = theirs.removesuffix("*")
    end = "" if start == theirs else "(.+)"
    return re.compile(re.escape(start).replace(r"\*", "([^.]+)") + end)


def _rename(key: str, names: Mapping[str, str]) -> str | None:
    """The first pattern of ``names`` that fits, applied; None where none fits."""
    for pattern, name in names.items():
        if match := _pattern(pattern).fullmatch(key):
            return name.replace("*", "{}").format(*match.groups())
    return None


def _places(keys: Iterable[str | None]) -> dict[int, str]:
    """Where ``blocks.i`` goes: their one list holds all three stages and the two merges between them."""
    known = {key or "" for key in keys}
    numbers = {int(match[1]) for key in known if (match := BLOCK.match(key))}
    merges = sorted(i for i in numbers if f"blocks.{i}.reduction.weight" in known)
    if len(merges) != 2:
        raise UserError(f"{len(merges)} of its blocks are merges (reduction.weight); these models have 2")
    if missing := set(range(max(numbers))) - numbers:
        raise UserError(f"blocks.{min(missing)} is missing: they go up to blocks.{max(numbers)}")
    merge1, merge2 = merges
    places = {i: f"early.stage1.{i}" for i in numbers if i < merge1}
    places |= {i: f"early.stage2.{i - merge1 - 1}" for i in numbers if merge1 < i < merge2}
    places |= {i: f"late.stage3.{i - merge2 - 1}" for i in numbers if i > merge2}
    return places | {merge1: "merge.merge1", merge2: "merge.merge2"}


def _place(name: str) -> str:
    """``stage1.0`` or ``merge1`` of one of our names, or nothing."""
    found = re.match(r"backbone\.(stage[123]\.\d+|merge[12])\.", name)
    return found[1] if found else ""


def _order(names: Iterable[str]) -> list[str]:
    """Our blocks and merges in the order of their list."""

    def position(place: str) -> tuple[str, bool, int]:
        stage, _, number = place.removeprefix("stage").removeprefix("merge").partition(".")
        return stage, not number, int(number or 0)

    return sorted({_place(name) for name in names} - {""}, key=position)


def _fuse(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fast-iTPN's three projections of attention as one, where all three are there."""
    fused = dict(state)
    for key in state:
        names = [key.replace("q_proj", f"{letter}_proj") for letter in "qkv"]
        if not key.endswith(".attn.q_proj.weight") or not all(name in state for name in names):
            continue
        target = key.replace("q_proj", "qkv")
        if target in state:
            raise UserError(f"{key} and {target} are the same here; leave one out with --leave-out")
        if len({state[name].shape for name in names}) > 1 or not state[key].ndim:
            raise UserError(f"{key}, k_proj and v_proj have different shapes")
        fused[target] = torch.cat([fused.pop(name) for name in names])
    return fused


def _split(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back from `_fuse`."""
    split = dict(state)
    for key in state:
        if key.endswith(".attn.qkv.weight"):
            for letter, part in zip("qkv", split.pop(key).chunk(3), strict=True):
                split[key.replace("qkv", f"{letter}_proj")] = part
    return split


def _our_shape(name: str, value: Tensor) -> Tensor:
    """Convolutions as one linear layer per cell or unit, tables and tokens without leading axes of 1."""
    if value.ndim == 4:
        if re.search(r"merge[12]\.reduce\.weight$", name):
            return value.permute(0, 3, 2, 1).flatten(1)  # the row changes fastest, as in `Merge`
        if name.endswith(".expand.weight"):
            return value.permute(2, 3, 1, 0).flatten(0, 2)
        return value.permute(0, 2, 3, 1).flatten(1)
    if name.endswith(".position") and value.ndim == 3 and len(value) == 1:
        return value[0]
    return value.flatten() if name == "mask_token" else value


def _their_shape(name: str, value: Tensor, fast: bool, in_channels: int) -> Tensor:
    if name == "backbone.stem_proj.weight":
        side = isqrt(value.shape[1] // in_channels)
        return value.reshape(-1, side, side, in_channels).permute(0, 3, 1, 2)
    if name.endswith(".position"):
        return value[None]
    if name == "mask_token":
        return value[None, None]
    if not fast or value.ndim != 2:
        return value
    if re.search(r"merge[12]\.reduce\.weight$", name):
        return value.reshape(len(value), 2, 2, -1).permute(0, 3, 2, 1)
    if name.endswith(".expand.weight"):
        return value.reshape(2, 2, -1, value.shape[1]).permute(3, 2, 0, 1)
    if name.startswith("embed."):
        side = {"p4": 4, "p8": 2, "p16": 1}[name.split(".")[1]]
        return value.reshape(len(value), side, side, -1).permute(0, 3, 1, 2)
    if name.startswith(("backbone.stage1.", "backbone.stage2.", "pyramid.")):
        return value[:, :, None, None]
    return value
