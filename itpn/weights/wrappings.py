"""What checkpoints wrap their weights in, and what they hold beside them."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from itpn.errors import UserError, printable
from itpn.weights.pickles import Placeholder
from itpn.weights.prefixes import AVERAGED, as_wanted, grouped, is_stem, model_of, several, without

WRAPPERS = ("model", "module", "state_dict", "model_state_dict", "net")
COUNTERS = ("n_averaged", "steps")
"""What torch's and mmengine's averaging counts, as tensors among the weights."""
TRAINING = re.compile(
    r"optim|.*sched|.*scaler|amp$|.*epoch|iter|(global_)?step|rng|message_hub|callbacks|loops|best|stats"
)
SETTINGS = ("args", "meta", "config", "cfg", "hparams", "hyper_parameters", "settings")

MAX_LISTED = 40


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Selection of weights in a file that holds several."""

    ema: bool = False
    """Take the averaged (EMA) weights if the source has both."""
    entry: str | None = None
    """Entry that holds the weights, such as `student`. An entry within another is `checkpoint.student`."""
    prefix: str | None = None
    """Read only the tensors whose names start with this prefix, such as `encoder.body.`."""


Unwrapped = tuple[dict[str, Tensor], list[str], dict[str, str]]
"""Tensors by their plain names, what was taken off them, and what was left out with the reason."""


def unwrapped(loaded: Any, wanted: Wanted, leave_out: Sequence[str] = ()) -> Unwrapped:
    """Find the weights in what a file holds.

    Args:
        leave_out: patterns of names to leave out, as they stand in the file or without their prefix.
    """
    wrapping: list[str] = []
    left_out: dict[str, str] = {}
    loaded, ema = _weights_in(loaded, wanted, wrapping, left_out)
    tensors = {name: value.detach() for name, value in loaded.items() if _is_weight(name, value)}
    rest: dict[str, list[str]] = {}
    for name, value in loaded.items():
        if not _is_weight(name, value):
            rest.setdefault(_reason(name, value), []).append(_label(name))
    for reason, names in rest.items():
        left_out |= grouped(names, reason, "entries")
    counts: Counter[str] = Counter()
    tensors = without(tensors, leave_out, counts)
    tensors = model_of(tensors, wanted.prefix, ema, wrapping, left_out)
    tensors = without(tensors, leave_out, counts)
    for pattern in leave_out:
        if not counts[pattern]:
            raise UserError(f"--leave-out {printable(pattern)}: no key matches")
        left_out[f"{pattern} ({counts[pattern]})"] = "as asked"
    return tensors, wrapping, left_out


def _weights_in(
    loaded: Any, wanted: Wanted, wrapping: list[str], left_out: dict[str, str]
) -> tuple[dict[Any, Any], bool]:
    """The dict that holds the weights, and whether averaged ones are still to be found in it."""
    holding, ema, seen = _holding(loaded), wanted.ema, set()
    steps = _steps(loaded, wanted.entry)
    while isinstance(loaded, dict):
        if id(loaded) in seen:
            raise UserError("its entries contain one another")
        seen.add(id(loaded))
        entry = steps.pop(0) if steps else _entry(loaded, ema, holding, wrapping)
        if entry is None:
            break
        if entry not in loaded:
            raise UserError(
                f"--entry {printable(wanted.entry)}: there is no {printable(entry)} in {_names(loaded)}"
            )
        ema = ema and not AVERAGED.search(entry)
        wrapping.append(entry)
        others = ((name, value) for name, value in loaded.items() if name != entry)
        left_out |= {_label(name): _reason(name, value, id(value) in holding) for name, value in others}
        loaded = loaded[entry]
    if not isinstance(loaded, dict):
        raise UserError(f"holds {_described(loaded)}, no weights by name; save the model's state_dict()")
    if not any(_is_weight(name, value) for name, value in loaded.items()):
        raise UserError(f"holds no weights by name; its {_names(loaded)}")
    return loaded, ema


def _steps(loaded: Any, entry: str | None) -> list[str]:
    """The entry, or the entries inside one another that a name with dots stands for."""
    if entry is None:
        return []
    return [entry] if isinstance(loaded, dict) and entry in loaded else entry.split(".")


def _holding(loaded: Any) -> set[int]:
    """The ids of all dicts that hold a model, or another such dict; each is looked at once."""
    parents: dict[int, list[int]] = {id(loaded): []}
    todo, found = [loaded], []
    while todo:
        here = todo.pop()
        for name, value in here.items() if isinstance(here, dict) else ():
            if isinstance(value, Tensor) and is_stem(name):
                found.append(id(here))
            elif isinstance(value, dict) and not (isinstance(name, str) and name.startswith("optim")):
                if id(value) not in parents:
                    todo.append(value)
                parents.setdefault(id(value), []).append(id(here))
    holding: set[int] = set()
    while found:
        if (each := found.pop()) not in holding:
            holding.add(each)
            found += parents[each]
    return holding


def _entry(loaded: Mapping[Any, Any], ema: bool, holding: set[int], within: Sequence[str]) -> str | None:
    """The entry that holds the weights, where this dict is not the weights itself.

    Raises:
        UserError: several do.
    """
    if any(is_stem(name) for name in loaded):
        return None
    models = [name for name, value in loaded.items() if isinstance(name, str) and id(value) in holding]
    if not models:  # a model of another kind
        averaged = [name for name in loaded if isinstance(name, str) and AVERAGED.search(name)]
        choice = [*averaged, *WRAPPERS] if ema else [*WRAPPERS, *averaged]
        return next((name for name in choice if isinstance(loaded.get(name), dict)), None)
    found = as_wanted(models, ema)
    found = [name for name in found if name in WRAPPERS] or found
    if len(found) > 1:
        raise several("entry", [".".join((*within, name)) for name in found])
    return found[0]


def _is_weight(name: Any, value: Any) -> bool:
    return (
        isinstance(name, str)
        and isinstance(value, Tensor)
        and value.device.type in ("cpu", "meta")
        and value.layout is torch.strided
        and name not in COUNTERS
    )


def _reason(name: Any, value: Any, model: bool = False) -> str:
    if not isinstance(name, str):
        return "its name is no text"
    averaged = AVERAGED.search(name)
    if model or (isinstance(value, dict) and (averaged or name in WRAPPERS)):
        return f"{'averaged' if averaged else 'plain'} weights, not asked for"
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


def _names(entries: Mapping[Any, Any]) -> str:
    named = ", ".join(printable(_label(name))[:40] for name in list(entries)[:8])
    return f"{len(entries):,} entries: {named or 'none'}"


def capped(left_out: Mapping[str, str]) -> dict[str, str]:
    entries = [(printable(name)[:80], reason) for name, reason in left_out.items()]
    if len(entries) > MAX_LISTED:
        entries = [*entries[:MAX_LISTED], (f"{len(entries) - MAX_LISTED:,} more", "of these kinds")]
    return dict(entries)
