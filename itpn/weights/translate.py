"""A released checkpoint's tensors to a file of ours, and the way back."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

from torch import Tensor

from itpn.errors import UserError, printable
from itpn.nn.pyramid import ModelConfig
from itpn.weights import files, names
from itpn.weights.additions import without_additions
from itpn.weights.families import FAMILIES, Given, config_of, family_of, kind_of
from itpn.weights.files import Weights
from itpn.weights.names import Kind

NOT_OURS = dict.fromkeys(
    ["target_generator.*", "teacher.*"], "the teacher; distillation loads one from its own file"
)
"""Patterns of keys that belong to no model of ours, and why they stay out."""
CONCATENATING = dict.fromkeys(
    ["norm.*", "decoder_*", "mask_token"], "HiViT's own MAE decoder, which reads all stages side by side"
)
KINDS: dict[Kind, str] = {
    "pixel": "pixel decoder",
    "distill": "heads for a teacher's features",
    "mean-norm": "classifier with a norm after its mean",
    "norm-mean": "classifier with a norm before its mean",
    "mean": "classifier without a norm",
    "backbone": "backbone alone",
}
MOST_NAMED = 5
MAX_KEYS = 20_000
MAX_LENGTH = 300


@dataclass(frozen=True)
class Translated:
    tensors: dict[str, Tensor]
    """Under our names."""
    config: dict[str, Any]
    family: str
    """A name in FAMILIES."""
    kind: Kind
    left_out: dict[str, str]
    """What no tensor was made of: a key or several of one beginning, and why."""


def translate(
    state: Mapping[str, Tensor],
    *,
    family: str | None = None,
    wrapping: Iterable[str] = (),
    given: Given | None = None,
) -> Translated:
    """Recognise a checkpoint's tensors, rename and reshape them, and infer their config.

    Args:
        state: tensors under their names.
        family: a name in FAMILIES; recognised by the keys if None.
        wrapping: what a file's state was found in; see `families.family_of`.
        given: what the shapes cannot tell.

    Raises:
        UserError: it is of no known family, has keys that no rule knows, or does not make a whole model.
    """
    _check(state)
    given = given or Given()
    rules = NOT_OURS | (CONCATENATING if _concatenates(state) else {})
    left_out = dict(_left_out(state, rules))
    state = {key: value for key, value in state.items() if not _is_out(key, rules)}
    family = family or family_of(state, wrapping)
    if family not in FAMILIES:
        raise UserError(f"there is no family {family!r}; choose one of {', '.join(FAMILIES)}")
    known, kind = FAMILIES[family], kind_of(state.keys())
    state, added = without_additions(state, kind, given)
    left_out |= added
    tensors, unknown = names.to_ours(state, known.style, kind)
    if unknown:
        raise UserError(
            f"{known.title}: no place for {summary(unknown)}; to ignore them, give --leave-out and a "
            "quoted pattern for each"
        )
    config = config_of(tensors, known, kind, _patch(state), given)
    wrong = files.misfits(Weights(files.NOWHERE, tensors, config))
    if wrong:
        raise UserError(
            f"{known.title}: {len(wrong)} tensors do not make the model that the others imply "
            f"({'; '.join(wrong[:MOST_NAMED])}){_without_head(state, kind, wrong)}"
        )
    buffers = [key for key in state if key.endswith(names.COMPUTED)]
    left_out |= {summary(buffers): "computed from the grid"} if buffers else {}
    return Translated(tensors, config, family, kind, left_out)


def _without_head(state: Mapping[str, Tensor], kind: Kind, wrong: Iterable[str]) -> str:
    """How to take the rest of a model whose head alone is another one, as options."""
    if any(misfit.startswith(files.MODEL_PARTS) for misfit in wrong):
        return ""
    starts = {pattern.split(".")[0] for pattern in names.HEADS[kind]}
    patterns = sorted({f"'{start}*'" for start in starts if any(key.split(".")[0] == start for key in state)})
    return f"; without its head: --leave-out {' '.join(patterns)}" if patterns else ""


def write_back(weights: Weights, family: str) -> dict[str, Tensor]:
    """Tensors of a file of ours under a family's names and in its shapes.

    Raises:
        UserError: the family has no place for what the file holds.
    """
    if family not in FAMILIES:
        raise UserError(f"there is no family {family!r}; choose one of {', '.join(FAMILIES)}")
    style, backbone = FAMILIES[family].style, weights.part("model", ModelConfig).backbone
    if (backbone.shape.layers == "fast") != (style == "fast"):
        raise UserError(f"{weights.path} has {backbone.shape.layers} layers, which {family} does not have")
    kind = _kind(weights)
    if kind not in FAMILIES[family].kinds:
        raise UserError(f"{weights.path}: files of {family} hold no {KINDS[kind]}")
    return names.to_theirs(weights.tensors, style, kind, backbone.in_channels, backbone.relative_grid)


def summary(keys: Iterable[str]) -> str:
    """Keys with their numbers replaced, each once with its count, the first few of them."""
    counts = Counter(re.sub(r"\b\d+\b", "*", key) for key in keys)
    named = [key if count == 1 else f"{key} ({count})" for key, count in counts.most_common(MOST_NAMED)]
    rest = len(counts) - len(named)
    return ", ".join(named) + (f" and {rest} more" if rest else "")


def _kind(weights: Weights) -> Kind:
    if weights.parts <= {"backbone", "pyramid"}:
        return "backbone"
    if "classifier" in weights.config:
        return cast(Kind, weights.config["classifier"]["pooling"])
    return "pixel" if "mask_ratio" in weights.config["objective"] else "distill"


def _check(state: Mapping[str, Tensor]) -> None:
    """Nothing that no model has: it would only take time or memory, or be loaded as something else."""
    if len(state) > MAX_KEYS:
        raise UserError(f"it has {len(state):,} tensors; no model here has as many as {MAX_KEYS:,}")
    for key, value in state.items():
        if len(key) > MAX_LENGTH or not key.isprintable():
            raise UserError(f"a key of {len(key):,} characters, {printable(key)[:60]} …: no parameter's name")
        if not key.endswith(names.COMPUTED) and not files.is_real(value):
            raise UserError(f"{key} holds {value.dtype}; weights are real numbers of 16 bits or more")


def _concatenates(state: Mapping[str, Tensor]) -> bool:
    """HiViT's own MAE decodes c4, c8 and c16 side by side: seven times the width of stage 3."""
    embed, positions = state.get("decoder_embed.weight"), state.get("absolute_pos_embed")
    if embed is None or positions is None or embed.ndim != 2:
        return False
    return embed.shape[1] == 7 * positions.shape[-1]


def _is_out(key: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _left_out(state: Mapping[str, Tensor], rules: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    for pattern, reason in rules.items():
        if keys := [key for key in state if _is_out(key, [pattern])]:
            yield f"{pattern} ({len(keys)})", reason


def _patch(state: Mapping[str, Tensor]) -> tuple[int, int]:
    """Channels of an image and pixels per side of a cell, from the stem's convolution."""
    for key in ("patch_embed.proj.weight", "backbone.patch_embed.proj.weight"):
        if key in state:
            shape = state[key].shape
            if len(shape) == 4 and shape[2] == shape[3] and min(shape) > 0:
                return shape[1], shape[2]
            raise UserError(f"{key} is no square convolution: {list(shape)}")
    raise UserError("there is no patch_embed.proj.weight")
