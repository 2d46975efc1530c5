"""Foreign weight files: read without running anything of theirs, nor believing what they claim.

The kind of a file is told by its first bytes. Before torch sees a pickle its opcodes are walked once: names
that torch does not know get inert placeholders, and what could take time or memory without limit is refused.
Tensors are mapped from the file, not copied, wherever its format allows.
"""

import hashlib
import math
import stat
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from itpn.errors import UserError, printable
from itpn.weights.pickles import allowing, globals_in, pickle_in_zip, records_of, stand_ins_for
from itpn.weights.wrappings import Unwrapped, Wanted, capped, unwrapped

CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Foreign:
    path: Path
    sha256: str
    tensors: dict[str, Tensor]
    """Under the names that are left when all wrappings are off."""

    wrapping: tuple[str, ...] = ()
    """Removed wrappings, outermost first: entries (``state_dict``) and prefixes (``module.``). For whole
    detectors and segmenters also ``detector heads`` or ``segmentor heads``."""

    left_out: dict[str, str]
    """Other contents of the file, and why they were left out."""

    placeholders: tuple[str, ...] = ()
    """Names of classes and functions that the file asks for, and that were not looked up."""

    nonfinite: dict[str, int]
    """How many values of a tensor are NaN or infinite, where any is."""


def read_foreign(path: Path, wanted: Wanted | None = None, leave_out: Sequence[str] = ()) -> Foreign:
    """Weights of any file of ``torch.save`` (either format) or safetensors.

    Args:
        wanted: which of the weights. A file that has only averaged ones gives them in any case.
        leave_out: patterns such as ``norm.*`` of names to leave out, with or without their prefix.

    Raises:
        UserError: there is no such file; it is damaged, hostile or of another kind; it holds no weights by
            name, several models, or none of what is asked for.
    """
    unwrap = partial(unwrapped, wanted=wanted or Wanted(), leave_out=leave_out)
    try:
        kind = _kind(path)
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        loaded, placeholders = (
            (_safetensors(path), []) if kind == "safetensors" else _torch(path, kind, unwrap)
        )
        tensors, wrapping, left_out = unwrap(loaded)
        _check_bytes(tensors, path.stat().st_size)
        with _one_line("weights"):  # some kinds of numbers that safetensors knows, torch cannot convert
            nonfinite = {name: count for name, tensor in tensors.items() if (count := _nonfinite(tensor))}
    except UserError as error:
        raise UserError(f"{printable(path)}: {error}") from error
    except OSError as error:
        raise UserError(f"{printable(path)}: cannot be read ({error.strerror or error})") from error
    return Foreign(
        path=path,
        sha256=sha256,
        tensors=tensors,
        wrapping=tuple(wrapping),
        left_out=capped(left_out),
        placeholders=tuple(sorted(map(printable, placeholders))),
        nonfinite=nonfinite,
    )


def _kind(path: Path) -> Literal["zip", "pickle", "safetensors"]:
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise UserError("there is no such file") from error
    if stat.S_ISDIR(status.st_mode):
        raise UserError("is a directory; name the file of weights in it")
    if not stat.S_ISREG(status.st_mode):
        raise UserError("is no regular file")
    with path.open("rb") as file:
        start = file.read(1024)
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not start:
        raise UserError("is empty; the download or copy broke off")
    if text.startswith(b"version https://git-lfs"):
        raise UserError("is a git-lfs pointer, not the file itself; fetch it with `git lfs pull`")
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise UserError("is a web page, so the download failed; download the file itself")
    if start[8:9] == b"{":  # first, as the length before it may look like the others' marks
        if int.from_bytes(start[:8], "little") > status.st_size - 8:
            raise UserError("is a broken safetensors file: its header is longer than the file")
        return "safetensors"
    if start.startswith(b"PK\x03\x04"):
        return "zip"
    if start.startswith(b"\x80"):
        return "pickle"
    raise UserError("is no file of torch.save or safetensors")


def _safetensors(path: Path) -> dict[str, Tensor]:
    with _one_line("a safetensors file"), safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 it is no dict


@contextmanager
def _one_line(kind: str) -> Iterator[None]:
    """There is no end to what torch, zipfile and safetensors raise on damaged files."""
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:
        message = str(error).rpartition("WeightsUnpickler error: ")[2].strip() or type(error).__name__
        raise UserError(
            f"cannot be read as {kind}, it is damaged or not one ({printable(message.splitlines()[0])[:200]})"
        ) from error


def _torch(path: Path, kind: str, unwrap: Callable[[Any], Unwrapped]) -> tuple[Any, list[str]]:
    """What the file holds, and the names in it that placeholders stand for."""
    with _one_line("a file of torch.save"):
        records = records_of(path) if kind == "zip" else {}
        pickles = pickle_in_zip(path) if kind == "zip" else path.open("rb")
        with pickles:
            uses = globals_in(pickles, 1 if kind == "zip" else 5)
        stand_ins = stand_ins_for(uses)
        if kind == "pickle":
            with path.open("rb") as file:
                return _load(file, stand_ins, "cpu"), list(stand_ins)
        with path.open("rb") as file:  # tensors on the meta device have a shape and no memory
            planned = _load(file, stand_ins, "meta")
    _check_lengths(unwrap(planned)[0], records)
    with _one_line("a file of torch.save"):
        if path.name.endswith(".safetensors"):  # torch goes by the suffix, where it is given a path
            with path.open("rb") as file:
                return _load(file, stand_ins, "cpu"), list(stand_ins)
        return _load(path, stand_ins, "cpu", mmap=True), list(stand_ins)


def _load(file: Path | IO[bytes], stand_ins: Mapping[str, type], device: str, mmap: bool = False) -> Any:
    with allowing(stand_ins), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # The one place where a pickle is read; weights_only lets it name nothing but tensors and stand-ins.
        return torch.load(file, map_location=device, weights_only=True, mmap=mmap)


def _check_lengths(planned: Mapping[str, Tensor], records: Mapping[int, int]) -> None:
    """Every tensor lies within its own record of the file; ``planned`` is on the meta device."""
    for name, tensor in planned.items():
        if tensor.numel() == 0:
            continue
        last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        needed = (tensor.storage_offset() + last + 1) * tensor.itemsize
        record = records.get(tensor.untyped_storage()._checkpoint_offset or -1)
        if record is None:
            raise UserError(
                f"has no data for {printable(name)} where torch.save puts it; it was packed again by another "
                "program, or damaged: load it with torch and save it again"
            )
        if needed > record:
            raise UserError(
                f"{printable(name)} {list(tensor.shape)} needs {needed:,} bytes, the file has {record:,}"
            )


def _check_bytes(tensors: Mapping[str, Tensor], file_size: int) -> None:
    """Strides of 0 and shared storages make much of little; twice the file is more than tied weights need."""
    total = 0
    for name, tensor in tensors.items():
        total += math.prod(tensor.shape) * tensor.itemsize
        if total > 2 * file_size:
            raise UserError(
                f"its tensors up to {printable(name)} {list(tensor.shape)} are {total:,} bytes, in a file of "
                f"{file_size:,}; they repeat themselves without end"
            )


def _nonfinite(tensor: Tensor) -> int:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return 0
    count = 0
    for part in torch.split(tensor.reshape(-1), CHUNK):
        part = part.float() if part.itemsize == 1 else part
        count += part.numel() - int(part.isfinite().sum())
    return count
