"""Key maps from the released checkpoints' names to ours. History stays here; nothing else knows these
names."""

import re
from collections.abc import Mapping

from torch import Tensor

# Theirs -> ours; `*` stands for one or more name parts and is carried over.
OFFICIAL = {
    "patch_embed.proj.*": "model.backbone.stem_proj.*",
    "patch_embed.norm.*": "model.backbone.stem_norm.*",
    "absolute_pos_embed": "model.backbone.position",
    "early.*.norm2.*": "model.backbone.*.norm.*",
    "early.*.mlp.*": "model.backbone.*.mlp.*",
    "early.*.gamma_2": "model.backbone.*.scale.gamma",
    "merge.*.norm.*": "model.backbone.*.norm.*",
    "merge.*.reduction.*": "model.backbone.*.reduce.*",
    "late.*.norm1.*": "model.backbone.*.norm1.*",
    "late.*.norm2.*": "model.backbone.*.norm2.*",
    "late.*.attn.qkv.*": "model.backbone.*.attn.qkv.*",
    "late.*.attn.proj.*": "model.backbone.*.attn.proj.*",
    "late.*.attn.relative_position_bias_table": "model.backbone.*.attn.relative_position",
    "late.*.mlp.*": "model.backbone.*.mlp.*",
    "late.*.gamma_1": "model.backbone.*.scale1.gamma",
    "late.*.gamma_2": "model.backbone.*.scale2.gamma",
    "align_dim_16tofpn.*": "model.pyramid.align.*",
    "align_dim_16to8.*": "model.pyramid.lateral8.*",
    "align_dim_8to4.*": "model.pyramid.lateral4.*",
    "split_16to8.norm.*": "model.pyramid.split8.norm.*",
    "split_16to8.reduction.*": "model.pyramid.split8.expand.*",
    "split_8to4.norm.*": "model.pyramid.split4.norm.*",
    "split_8to4.reduction.*": "model.pyramid.split4.expand.*",
    "block_16to8.*.norm2.*": "model.pyramid.blocks8.*.norm.*",
    "block_16to8.*.mlp.*": "model.pyramid.blocks8.*.mlp.*",
    "block_8to4.*.norm2.*": "model.pyramid.blocks4.*.norm.*",
    "block_8to4.*.mlp.*": "model.pyramid.blocks4.*.mlp.*",
    "fpn_modules.0.norm2.*": "model.pyramid.out16.norm.*",
    "fpn_modules.0.mlp.*": "model.pyramid.out16.mlp.*",
    "fpn_modules.1.norm2.*": "model.pyramid.out8.norm.*",
    "fpn_modules.1.mlp.*": "model.pyramid.out8.mlp.*",
    "fpn_modules.2.norm2.*": "model.pyramid.out4.norm.*",
    "fpn_modules.2.mlp.*": "model.pyramid.out4.mlp.*",
    "mask_token": "mask_token",
    "decoder_embed.0.0.*": "embed.p16.norm.*",
    "decoder_embed.0.1.*": "embed.p16.proj.*",
    "decoder_embed.1.0.*": "embed.p8.norm.*",
    "decoder_embed.1.1.*": "embed.p8.proj.*",
    "decoder_embed.2.0.*": "embed.p4.norm.*",
    "decoder_embed.2.1.*": "embed.p4.proj.*",
    "decoder_pos_embed": "decoder.position",
    "decoder_blocks.*": "decoder.blocks.*",
    "decoder_norm.*": "decoder.norm.*",
    "decoder_pred.*": "head.*",
}

MMPRETRAIN = {
    "backbone.pos_embed": "absolute_pos_embed",
    "backbone.*": "*",
    "neck.ln1.*": "decoder_norm.*",
    "neck.decoder_blocks.*.ln1.*": "decoder_blocks.*.norm1.*",
    "neck.decoder_blocks.*.ln2.*": "decoder_blocks.*.norm2.*",
    "neck.decoder_blocks.*.ffn.layers.0.0.*": "decoder_blocks.*.mlp.fc1.*",
    "neck.decoder_blocks.*.ffn.layers.1.*": "decoder_blocks.*.mlp.fc2.*",
    "neck.*": "*",
}

IGNORED = re.compile(r"relative_position_index$")  # recomputed from the grid


def rename(key: str, names: Mapping[str, str]) -> str | None:
    """The first pattern of ``names`` that fits ``key``, applied; None where none fits."""
    for theirs, ours in names.items():
        if match := re.fullmatch(re.escape(theirs).replace(r"\*", "(.+?)"), key):
            return ours.replace("*", "{}").format(*match.groups())
    return None


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' pixel models: pre-training, or a backbone with or without pyramid; no classifier heads.

    Raises:
        KeyError: a key that no rule knows.
    """
    places = _places(state)
    converted = {}
    for key, value in state.items():
        if IGNORED.search(key) or key.startswith(("head.", "fc_norm.")):
            continue
        name = rename(re.sub(r"^blocks\.(\d+)", lambda m: places[int(m[1])], key), OFFICIAL)
        if name is None:
            raise KeyError(f"no rule for {key!r} {tuple(value.shape)}")
        converted[name] = _reshape(name, value)
    return converted


def from_mmpretrain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """mmpretrain's pixel ``iTPN``."""
    return from_official({rename(key, MMPRETRAIN) or key: value for key, value in state.items()})


def _places(state: Mapping[str, Tensor]) -> dict[int, str]:
    """Where ``blocks.i`` goes: their one list holds all three stages and the two merges between them."""
    numbers = {int(key.split(".")[1]) for key in state if key.startswith("blocks.")}
    merge1, merge2 = sorted(i for i in numbers if f"blocks.{i}.reduction.weight" in state)
    places = {i: f"early.stage1.{i}" for i in range(merge1)}
    places |= {i: f"early.stage2.{i - merge1 - 1}" for i in range(merge1 + 1, merge2)}
    places |= {i: f"late.stage3.{i - merge2 - 1}" for i in numbers if i > merge2}
    return places | {merge1: "merge.merge1", merge2: "merge.merge2"}


def _reshape(name: str, value: Tensor) -> Tensor:
    if name.endswith(
        "stem_proj.weight"
    ):  # a convolution as one linear layer per cell, pixels in (row, col, channel)
        return value.permute(0, 2, 3, 1).flatten(1)
    if name.endswith((".position", "mask_token")):  # tables and tokens carry leading axes of 1
        return value.view(-1, value.shape[-1]) if name.endswith(".position") else value.flatten()
    return value
