"""Prefixes of the names of a model, and what else stands beside it under other ones."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from itpn.errors import UserError, printable

AVERAGED = re.compile(r"(?<![a-z])(ema|swa)(?![a-z])", re.IGNORECASE)
"""What tells averaged weights by their entry or prefix: ``model_ema``, ``net_ema.module.``."""
DETECTOR = ("rpn_head.", "roi_head.", "bbox_head.", "mask_head.")
SEGMENTOR = ("decode_head.", "auxiliary_head.")
STEM = "patch_embed.proj.weight"
"""The tensor that tells where a model's names begin: what stands before it is a prefix."""
TORCHS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch puts into names where it compiles, shards or recomputes a module."""
MAX_NAMED = 6


def model_of(
    tensors: dict[str, Tensor], given: str | None, ema: bool, wrapping: list[str], left_out: dict[str, str]
) -> dict[str, Tensor]:
    """The tensors of the one model among them, by its own names.

    Raises:
        UserError: there are several models, none of averaged weights, or none of the prefix given.
    """
    tensors = _without_torchs(tensors, wrapping)
    start = TORCHS.sub("", given or "")
    if start and _any_start(tensors, f"{start}."):
        start = f"{start}."
    models = _prefixes(tensors)
    if not _any_start(tensors, start):
        starts = ", ".join(printable(name)[:60] for name in models[:MAX_NAMED] if name)
        raise UserError(
            f"--prefix {printable(start)}: no tensor's name starts so; models start with {starts or 'none'}"
        )
    found = as_wanted([name for name in models if name.startswith(start)], ema)
    if ema and not any(map(AVERAGED.search, found)):
        raise UserError(
            "holds no averaged weights (an entry model_ema, state_dict_ema …); read the plain ones"
        )
    if len(found) > 1 and "" not in found:
        raise several("prefix", found)
    if found and "" not in found:
        return _body(tensors, found[0], wrapping, left_out)
    if start:
        tensors = _only(tensors, start, "not asked for", left_out)
        wrapping.append(start)
    while prefix := next((p for p in ("module.", "model.") if _all_start(tensors, p)), None):
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
        wrapping.append(prefix)
    return tensors


def without(tensors: dict[str, Tensor], patterns: Sequence[str], counts: Counter[str]) -> dict[str, Tensor]:
    """The tensors whose names match none of the patterns; ``counts`` has the others by pattern."""
    kept = {}
    for name, value in tensors.items():
        matching = [pattern for pattern in patterns if fnmatchcase(name, pattern)]
        counts.update(matching)
        if not matching:
            kept[name] = value
    return kept


def _without_torchs(tensors: dict[str, Tensor], wrapping: list[str]) -> dict[str, Tensor]:
    plain = {TORCHS.sub("", name): value for name, value in tensors.items()}
    if len(plain) < len(tensors):  # two names would become one
        return tensors
    wrapping += dict.fromkeys(found[0] for name in tensors for found in TORCHS.finditer(name))
    return plain


def is_stem(name: Any) -> bool:
    return isinstance(name, str) and (name == STEM or name.endswith(f".{STEM}"))


def _prefixes(tensors: Iterable[str]) -> list[str]:
    """What stands before the names of each model."""
    return [name.removesuffix(STEM) for name in tensors if is_stem(name)]


def as_wanted(models: Sequence[str], ema: bool) -> list[str]:
    """The averaged ones where they are asked for or the only ones, else the others."""
    averaged = [name for name in models if AVERAGED.search(name)]
    plain = [name for name in models if name not in averaged]
    return averaged if averaged and (ema or not plain) else plain


def several(option: str, names: Sequence[str]) -> UserError:
    choice = [f"--{option} {printable(name)[:80]}" for name in names[:MAX_NAMED]]
    more = f" ({len(names) - len(choice):,} more)" if len(names) > len(choice) else ""
    return UserError(
        f"holds {len(names):,} models; save one alone, or say which with {' or '.join(choice)}{more}"
    )


def _body(
    tensors: dict[str, Tensor], prefix: str, wrapping: list[str], left_out: dict[str, str]
) -> dict[str, Tensor]:
    """The tensors of the one model that starts with ``prefix``, and why the others are left out."""
    reason, kind = "no part of the backbone", None
    if prefix.endswith("backbone."):
        outer = prefix.removesuffix("backbone.")
        for name, heads in {"detector": DETECTOR, "segmentor": SEGMENTOR}.items():
            if kind is None and any(_any_start(tensors, outer + head) for head in heads):
                reason, kind = f"{name} head: the backbone alone is read", name
        if kind is None and _is_mmpretrains(tensors, prefix):
            prefix = outer
    if prefix:
        tensors = _only(tensors, prefix, reason, left_out)
        wrapping.append(prefix)
    wrapping += [f"{kind} heads"] if kind else []
    return tensors


def _is_mmpretrains(tensors: Iterable[str], prefix: str) -> bool:
    """Whether the names are mmpretrain's, whose parts are told by backbone, neck and head.

    Trackers have the authors' names after the prefix, or Fast-iTPN's, with three projections in attention.
    """
    split = (name.startswith(prefix) and name.endswith(".attn.q_proj.weight") for name in tensors)
    return f"{prefix}pos_embed" in tensors and not any(split)


def _all_start(names: Iterable[str], prefix: str) -> bool:
    return all(name.startswith(prefix) and name != prefix for name in names)


def _any_start(names: Iterable[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)


def _only(
    tensors: dict[str, Tensor], prefix: str, reason: str, left_out: dict[str, str]
) -> dict[str, Tensor]:
    left_out |= grouped((name for name in tensors if not name.startswith(prefix)), reason)
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def grouped(names: Iterable[str], reason: str, kind: str = "tensors") -> dict[str, str]:
    """One entry for all names of one part."""
    names = list(names)
    counts = Counter(name.partition(".")[0] for name in names)
    whole = set(names)
    return {
        part if count == 1 and part in whole else f"{part}.* ({count:,} {kind})": reason
        for part, count in counts.items()
    }
