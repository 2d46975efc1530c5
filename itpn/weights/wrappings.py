"""What checkpoints wrap their weights in, and what they hold beside them."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from itpn.errors import UserError, printable
from itpn.weights.pickles import Placeholder

WRAPPERS = ("model", "module", "state_dict", "model_state_dict", "net")
AVERAGES = ("model_ema", "state_dict_ema", "ema_state_dict", "model_state_dict_ema", "module_ema", "ema")
COUNTERS = ("n_averaged", "steps")
"""What torch's and mmengine's averaging counts, as tensors among the weights."""
TRAINING = re.compile(
    r"optim|.*sched|.*scaler|amp$|.*epoch|iter|(global_)?step|rng|message_hub|callbacks|loops|best|stats"
)
SETTINGS = ("args", "meta", "config", "cfg", "hparams", "hyper_parameters", "settings")
DETECTOR = ("rpn_head.", "roi_head.", "bbox_head.", "mask_head.")
SEGMENTOR = ("decode_head.", "auxiliary_head.")
BODIES = ("backbone.body.", "encoder.body.", "encoder.")
"""Prefixes of the backbone among other parts; the authors' loaders, too, keep the encoder alone."""

MAX_LISTED = 40


def unwrapped(loaded: Any, ema: bool) -> tuple[dict[str, Tensor], list[str], dict[str, str]]:
    """Tensors by their plain names, what was taken off, and what was left out."""
    wrapping: list[str] = []
    left_out: dict[str, str] = {}
    seen = set()
    while isinstance(loaded, dict):
        if id(loaded) in seen:
            raise UserError("its entries contain one another")
        seen.add(id(loaded))
        entry = _entry(loaded, ema)
        if entry is None:
            break
        ema = ema and entry not in AVERAGES
        wrapping.append(entry)
        left_out |= {_label(name): _reason(name, value) for name, value in loaded.items() if name != entry}
        loaded = loaded[entry]
    if not isinstance(loaded, dict):
        raise UserError(f"holds {_described(loaded)}, no weights by name; save the model's state_dict()")
    if ema:
        raise UserError(
            f"holds no averaged weights (an entry {', '.join(AVERAGES[:2])} …); read the plain ones"
        )
    tensors = {name: value.detach() for name, value in loaded.items() if _is_weight(name, value)}
    rest: dict[str, list[str]] = {}
    for name, value in loaded.items():
        if not _is_weight(name, value):
            rest.setdefault(_reason(name, value), []).append(_label(name))
    for reason, names in rest.items():
        left_out |= _grouped(names, reason, "entries")
    if not tensors:
        entries = ", ".join(printable(_label(name))[:40] for name in list(loaded)[:8])
        raise UserError(f"holds no weights by name; its {len(loaded):,} entries: {entries or 'none'}")
    return *_without_prefixes(tensors, wrapping, left_out), left_out


def _entry(loaded: Mapping[Any, Any], ema: bool) -> str | None:
    """The entry that holds the weights, where this dict is not the weights itself."""
    choice = (*AVERAGES, *WRAPPERS) if ema else (*WRAPPERS, *AVERAGES)
    return next((name for name in choice if isinstance(loaded.get(name), dict)), None)


def _is_weight(name: Any, value: Any) -> bool:
    return (
        isinstance(name, str)
        and isinstance(value, Tensor)
        and value.device.type in ("cpu", "meta")
        and value.layout is torch.strided
        and name not in COUNTERS
    )


def _reason(name: Any, value: Any) -> str:
    if not isinstance(name, str):
        return "its name is no text"
    if name in AVERAGES and isinstance(value, dict):
        return "averaged weights, not asked for"
    if name in WRAPPERS and isinstance(value, dict):
        return "plain weights; the averaged ones were asked for"
    if TRAINING.match(name) or name in COUNTERS:
        return "training state"
    if name in SETTINGS:
        return "settings"
    if isinstance(value, Tensor):
        return "a tensor beside the weights"
    return f"{_described(value)}, no tensor"


def _label(name: Any) -> str:
    return name if isinstance(name, str) else _described(name)


def _described(value: Any) -> str:
    if isinstance(value, Placeholder):
        return f"an object of {printable(type(value).__name__)[:80]}"
    return f"a value of type {type(value).__name__}"


def _without_prefixes(
    tensors: dict[str, Tensor], wrapping: list[str], left_out: dict[str, str]
) -> tuple[dict[str, Tensor], list[str]]:
    while prefix := next((p for p in ("module.", "_orig_mod.", "model.") if _all_start(tensors, p)), None):
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
        wrapping.append(prefix)
    if (prefix := next((p for p in BODIES if _any_start(tensors, p)), None)) is not None:
        return _only(tensors, prefix, "no part of the backbone", left_out), [*wrapping, prefix]
    for kind, heads in {"detector": DETECTOR, "segmentor": SEGMENTOR}.items():
        if _any_start(tensors, "backbone.") and any(_any_start(tensors, head) for head in heads):
            kept = _only(tensors, "backbone.", f"{kind} head: the backbone alone is read", left_out)
            return kept, [*wrapping, "backbone.", kind]
    # mmpretrain's files stay as they are: its names are told by their parts, backbone, neck and head.
    # Trackers have the authors' names after the prefix, or Fast-iTPN's, with three projections in attention.
    theirs = "backbone.absolute_pos_embed" in tensors
    if theirs or any(n.startswith("backbone.") and n.endswith(".attn.q_proj.weight") for n in tensors):
        kept = _only(tensors, "backbone.", "no part of the backbone", left_out)
        return kept, [*wrapping, "backbone."]
    return tensors, wrapping


def _all_start(names: Iterable[str], prefix: str) -> bool:
    return all(name.startswith(prefix) and name != prefix for name in names)


def _any_start(names: Iterable[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)


def _only(
    tensors: dict[str, Tensor], prefix: str, reason: str, left_out: dict[str, str]
) -> dict[str, Tensor]:
    left_out |= _grouped((name for name in tensors if not name.startswith(prefix)), reason)
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _grouped(names: Iterable[str], reason: str, kind: str = "tensors") -> dict[str, str]:
    """One entry for all names of one part."""
    names = list(names)
    counts = Counter(name.partition(".")[0] for name in names)
    whole = set(names)
    return {
        part if count == 1 and part in whole else f"{part}.* ({count:,} {kind})": reason
        for part, count in counts.items()
    }


def capped(left_out: Mapping[str, str]) -> dict[str, str]:
    entries = [(printable(name)[:80], reason) for name, reason in left_out.items()]
    if len(entries) > MAX_LISTED:
        entries = [*entries[:MAX_LISTED], (f"{len(entries) - MAX_LISTED:,} more", "of these kinds")]
    return dict(entries)
