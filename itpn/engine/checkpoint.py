"""Checkpoints: directories of safetensors and JSON, written so that a kill at any moment leaves a whole one.

checkpoints/last                          the step to go on from, as text
checkpoints/00012000/model.safetensors    state_dict() of the objective; the config without paths as metadata
checkpoints/00012000/optimizer.safetensors
checkpoints/00012000/state.json           step, progress, config, format, hashes of all three
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from itpn.engine.distributed import copy_share, whole_tensors
from itpn.errors import UserError

Tensors = Mapping[str, torch.Tensor]

FORMAT = 1
MODEL, OPTIMIZER, STATE, LAST = "model.safetensors", "optimizer.safetensors", "state.json", "last"
SAYS = "says"
"""In the run's run.json: what a file of weights says beyond the run's config."""


class DamagedError(Exception):
    """A checkpoint that is not what was written."""


def passed(point: str) -> None:
    """Called after each fsync and each rename of a save. Does nothing: tests put in its place what kills."""


def save(
    root: Path,
    step: int,
    model: Tensors,
    optimizer: Tensors,
    *,
    config: Mapping[str, Any],
    portable: Mapping[str, Any],
    progress: Mapping[str, Any],
) -> Path:
    """Written beside, fsynced, renamed; only then does `last` move.

    Args:
        model: a state dict, from `model_tensors`.
        optimizer: from `optimizer_tensors`.
        config: the run's, for state.json.
        portable: the same without what is of this machine alone, for the file of the model.
        progress: what else the run goes on from, as JSON-able values.

    Raises:
        OSError, SafetensorError: it cannot be written; what was written so far is removed.
    """
    directory, beside = root / f"{step:08d}", root / f".writing-{step:08d}"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        write_tensors(beside / MODEL, model, {"config": json.dumps(portable)})
        write_tensors(beside / OPTIMIZER, optimizer)
        hashes = {name: _hash(beside / name) for name in (MODEL, OPTIMIZER)}
        state = {
            "format": FORMAT,
            "step": step,
            "progress": dict(progress),
            "hashes": hashes,
            "config": dict(config),
        }
        (beside / STATE).write_text(json.dumps({**state, "checksum": _checksum(state)}, indent=1))
        for path in (*sorted(beside.iterdir()), beside):
            sync(path)
        # What stands there now is older than `last` allows: a damaged one, or one from before a step back.
        shutil.rmtree(directory, ignore_errors=True)
        beside.rename(directory)
        passed(f"rename {directory.name}")
        sync(root)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    write_text(root / LAST, directory.name)
    return directory


def latest(root: Path, say: Callable[[str], None]) -> int | None:
    """The step of the checkpoint that `last` names, or of the newest whole one before it; None without any.

    Raises:
        UserError: there are checkpoints, but none is whole.
    """
    found = steps(root)
    if not found:
        return None
    last = (root / LAST).read_text(errors="replace").strip() if (root / LAST).is_file() else ""
    named = int(last) if last.isdecimal() else -1
    newest = found[-1] if named < found[0] else named
    if named < found[-1]:  # set back by hand, or damaged
        say(f"{root / LAST} says {last or 'nothing'}: of steps {found[0]} to {found[-1]}, {newest} is taken")
    for step in reversed([step for step in found if step <= newest]):
        directory = root / f"{step:08d}"
        try:
            verify(directory)
            return step
        except DamagedError as error:
            say(f"checkpoint {directory} is damaged ({error}): going back to the one before")
    raise UserError(f"no undamaged checkpoint is left in {root}: start a new run with another --run-dir")


def verify(directory: Path) -> None:
    """Reads all of it once.

    Raises:
        DamagedError: a file is missing, cut short or changed.
        UserError: a later version wrote it.
    """
    for name, expected in read_state(directory)["hashes"].items():
        try:
            found = _hash(directory / name)
        except FileNotFoundError as error:
            raise DamagedError(f"{name} is missing") from error
        except OSError as error:
            raise DamagedError(f"{name}: {error.strerror}") from error
        if found != expected:
            raise DamagedError(f"{name}: its hash differs")


def read_state(directory: Path) -> dict[str, Any]:
    """The checked state.json; the same errors as `verify`."""
    try:
        state: dict[str, Any] = json.loads((directory / STATE).read_text())
        checksum = state.pop("checksum")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise DamagedError(f"{STATE}: {error}") from error
    if checksum != _checksum(state):
        raise DamagedError(f"{STATE}: its checksum differs")
    if state["format"] > FORMAT:
        raise UserError(
            f"{directory} has format {state['format']}, this version reads up to {FORMAT}: update itpn"
        )
    return state


def model_tensors(model: nn.Module, *, keep: bool = True) -> dict[str, torch.Tensor]:
    """The state dict as it is written; every rank must ask, and those that do not `keep` it get nothing."""
    return whole_tensors(model.state_dict(), keep=keep)


def load_model(directory: Path, model: nn.Module) -> None:
    """Strict: names and shapes must be the same, or UserError names the first that are not."""
    state = model.state_dict()
    here = {name: list(tensor.shape) for name, tensor in state.items()}
    with safe_open(directory / MODEL, framework="pt") as file:
        there = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a dict)
        differing = [name for name in {**here, **there} if here.get(name) != there.get(name)]
        if differing:
            shapes = "; ".join(
                f"{name} is {there.get(name, 'missing')} there, {here.get(name, 'missing')} here"
                for name in differing[:3]
            )
            raise UserError(
                f"{directory} holds another model ({len(differing)} tensors differ: {shapes}): "
                "train the model it was made with, or give this one its own --run-dir"
            )
        for name, tensor in state.items():
            copy_share(tensor, file.get_tensor(name))


def optimizer_tensors(optimizer: torch.optim.Optimizer, *, keep: bool = True) -> dict[str, torch.Tensor]:
    """The optimiser's state by parameter: `NAME.exp_avg` and so on; every rank must ask."""
    state = {
        f"{name}.{key}": value
        for name, parameter in _named(optimizer).items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    return whole_tensors(state, keep=keep)


def load_optimizer(directory: Path, optimizer: torch.optim.Optimizer) -> None:
    """Rates and decays stay this run's own; only the state is loaded."""
    parameters = _named(optimizer)
    index = {name: i for i, name in enumerate(parameters)}
    state: dict[int, dict[str, torch.Tensor]] = {}
    with safe_open(directory / OPTIMIZER, framework="pt") as file:
        for entry in file.keys():  # noqa: SIM118 (not a dict)
            name, _, key = entry.rpartition(".")
            if name not in index:
                raise UserError(
                    f"{directory} trained {name}, which is frozen now: "
                    "freeze what it froze, or use another --run-dir"
                )
            tensor = file.get_tensor(entry)
            if tensor.ndim:  # not the number of steps
                moment = torch.empty_like(parameters[name])
                copy_share(moment, tensor)
                tensor = moment
            state.setdefault(index[name], {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def prune(root: Path, step: int, *, keep_last: int, keep_every: int | None) -> None:
    """Deletes what is older than the last `keep_last` up to `step`, except every `keep_every` steps, and what
    a process that was killed left unfinished."""
    before = [other for other in steps(root) if other <= step]
    for old in before[: -max(keep_last, 1)]:
        if not keep_every or old % keep_every:
            shutil.rmtree(root / f"{old:08d}", ignore_errors=True)
    for unfinished in root.glob(".writing-*"):
        shutil.rmtree(unfinished, ignore_errors=True)


def write_tensors(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> None:
    """Write safetensors: equal tensors and metadata give equal bytes, and others may read the file as far as
    they may read what else we write."""
    save_file(dict(tensors), path, metadata)
    _sort_metadata(path)
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def _sort_metadata(path: Path) -> None:
    """Sort the entries of a safetensors file's metadata, which the library writes in random order. The header
    keeps its length, so that the tensors stay where they are."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
        if metadata := header.get("__metadata__"):
            header["__metadata__"] = dict(sorted(metadata.items()))
            text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
            if len(text) <= length:  # never longer than what the library wrote; then the order must do
                file.seek(8)
                file.write(text.ljust(length))


def write_text(path: Path, text: str) -> None:
    """Replaces the file at once: readers see the old text or the new one."""
    beside = path.with_name(f".{path.name}.writing")
    try:
        beside.write_text(text)
        sync(beside)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    passed(f"rename {path.name}")
    sync(path.parent)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    passed(f"fsync {path.name}")


def steps(root: Path) -> list[int]:
    """Of all checkpoints below `root`, whole or damaged."""
    return sorted(int(path.name) for path in root.glob("[0-9]*") if path.name.isdecimal() and path.is_dir())


def _named(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
