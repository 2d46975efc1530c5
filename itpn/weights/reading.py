"""Foreign weight files: read without running anything of theirs, nor believing what they claim.

The kind of a file is told by its first bytes. Before torch sees a pickle its opcodes are walked once: names
that torch does not know get inert placeholders, and what could take time or memory without limit is refused.
Tensors are mapped from the file, not copied, wherever its format allows.
"""

import hashlib
import io
import math
import pickletools
import re
import stat
import struct
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from itpn.errors import UserError, printable

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

MAX_ENTRIES = 100_000
"""Entries of a zip file: one a tensor, and a few more."""

MAX_PICKLE = 1 << 27
"""Bytes of the pickle itself, which holds no weights but may hold logs; torch holds them all."""

MAX_OPCODES = 2_000_000
"""A model of 1,000 tensors with its optimiser takes some 100,000; each may become an object of 64 bytes."""

MAX_NESTED = 64
"""Tuples in tuples: hashing one that is deeper than the C stack ends the process."""

MAX_HASHED = 1 << 20
"""Items of a tuple, as often as hashing meets them: of 60 tuples, each the last one twice, it takes years."""

MAX_NAMES = 1000
MAX_LISTED = 40
CHUNK = 1 << 20

# What torch's own list allows, and what weights have no use for: each can be asked for memory without limit.
_REFUSED = re.compile(
    r"(builtins|__builtin__) bytearray"
    r"|torch(\.\w+)? \w*Tensor|torch\._tensor \w+"
    r"|torch\._utils _rebuild_(sparse|q|meta|device|xla|wrapper|nested)\w*"
)
_BLOCKED = ("os", "sys", "posix", "nt")


@dataclass(frozen=True, kw_only=True)
class Foreign:
    path: Path
    sha256: str
    tensors: dict[str, Tensor]
    """Under the names that are left when all wrappings are off."""

    wrapping: tuple[str, ...] = ()
    """What was taken off, outermost first: entries (``state_dict``) and prefixes (``module.``); of files of
    whole detectors and segmentors also the word ``detector`` or ``segmentor``."""

    left_out: dict[str, str]
    """What else the file holds, and why it was left out."""

    placeholders: tuple[str, ...] = ()
    """Names of classes and functions that the file asks for, and that were not looked up."""

    nonfinite: dict[str, int]
    """How many values of a tensor are NaN or infinite, where any is."""


def read_foreign(path: Path, *, ema: bool = False) -> Foreign:
    """Weights of any file of ``torch.save`` (either format) or safetensors.

    Args:
        ema: take the averaged weights rather than the plain ones. A file that has only averaged ones gives
            them in either case.

    Raises:
        UserError: there is no such file; it is damaged, hostile or of another kind; it holds no weights by
            name, or no averaged ones where they are asked for.
    """
    try:
        kind = _kind(path)
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        loaded, placeholders = (_safetensors(path), []) if kind == "safetensors" else _torch(path, kind, ema)
        tensors, wrapping, left_out = _unwrapped(loaded, ema)
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
        left_out=_capped(left_out),
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


# Pickles


def _torch(path: Path, kind: str, ema: bool) -> tuple[Any, list[str]]:
    """What the file holds, and the names in it that placeholders stand for."""
    with _one_line("a file of torch.save"):
        records = _records(path) if kind == "zip" else {}
        pickles = _pickle_in_zip(path) if kind == "zip" else path.open("rb")
        with pickles:
            uses = _walk_all(pickles, 1 if kind == "zip" else 5)
        stand_ins = _stand_ins(uses)
        if kind == "pickle":
            with path.open("rb") as file:
                return _load(file, stand_ins, "cpu"), list(stand_ins)
        with path.open("rb") as file:  # tensors on the meta device have a shape and no memory
            planned = _load(file, stand_ins, "meta")
    _check_lengths(_unwrapped(planned, ema)[0], records)
    with _one_line("a file of torch.save"):
        if path.name.endswith(".safetensors"):  # torch goes by the suffix, where it is given a path
            with path.open("rb") as file:
                return _load(file, stand_ins, "cpu"), list(stand_ins)
        return _load(path, stand_ins, "cpu", mmap=True), list(stand_ins)


def _records(path: Path) -> dict[int, int]:
    """Where the bytes of a zip file's entries start, and how many they are: uncompressed, apart, within."""
    records, end = {}, 0
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
        names = {entry.filename for entry in entries}
        if not 0 < len(entries) <= MAX_ENTRIES or len(names) < len(entries):
            raise UserError(f"is a zip file of {len(entries):,} entries, some of one name or too many")
        if any(name.endswith("/constants.pkl") for name in names):
            raise UserError("is a TorchScript program; save the model's state_dict() instead")
        if entries[0].header_offset != 0:
            raise UserError("is a zip file with something before its first entry; no weights start so")
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise UserError(
                    f"is a zip file whose entry {printable(entry.filename)} is compressed, which torch.save "
                    "never does; if an archive of weights was meant, unpack it first"
                )
            file.seek(entry.header_offset)
            name_length, extra_length = struct.unpack("<26x2H", file.read(30))
            start = entry.header_offset + 30 + name_length + extra_length
            if entry.header_offset < end or start + entry.file_size > archive.start_dir:
                raise UserError(f"is a zip file whose entry {printable(entry.filename)} overlaps others")
            end = start + entry.file_size
            records[start] = entry.file_size
    return records


def _pickle_in_zip(path: Path) -> IO[bytes]:
    with zipfile.ZipFile(path) as archive:
        found = [entry for entry in archive.infolist() if entry.filename.partition("/")[2] == "data.pkl"]
        if len(found) != 1:
            raise UserError("is a zip file, but none of torch.save; if it is an archive, unpack it first")
        if found[0].file_size > MAX_PICKLE:
            raise UserError(f"has a pickle of {found[0].file_size:,} bytes beside its weights, too large")
        return io.BytesIO(archive.read(found[0]))


@dataclass(frozen=True, slots=True)
class _Item:
    """What the walk knows of an object on the pickle's stack."""

    made_by: str = ""
    """The global that it is, or that was called for it."""

    depth: int = 0
    items: int = 1


_PLAIN = _Item()
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_CHANGES = {"SETITEM": 2, "SETITEMS": None, "APPEND": 1, "APPENDS": None, "BUILD": 1}


def _walk_all(file: IO[bytes], count: int) -> dict[str, set[str]]:
    """The globals in consecutive pickles, and the opcodes by which each one's objects are filled."""
    uses: dict[str, set[str]] = {}
    for _ in range(count):
        _walk(file, uses)
    if len(uses) > MAX_NAMES:
        raise UserError(f"asks for {len(uses):,} classes and functions; no weights do")
    for name in map(printable, uses):
        if _REFUSED.fullmatch(name):
            raise UserError(
                f"asks for {name.replace(' ', '.')}; byte arrays and sparse, quantised or special tensors "
                "are not read; save its weights as plain dense tensors"
            )
        if name.split(" ")[0] in _BLOCKED:
            raise UserError(f"asks for {name.replace(' ', '.')}, as an attack would; do not use this file")
    return uses


def _walk(file: IO[bytes], uses: dict[str, set[str]]) -> None:
    stack: list[_Item] = []
    marks: list[int] = []
    memo: dict[Any, _Item] = {}

    def taken(count: int | None) -> list[_Item]:
        start = marks.pop() if count is None else len(stack) - count
        if start < 0:
            raise UserError("is a broken pickle")
        items = stack[start:]
        del stack[start:]
        return items

    for number, (opcode, argument, position) in enumerate(pickletools.genops(file)):
        if number > MAX_OPCODES or (position or 0) > MAX_PICKLE:
            raise UserError(
                f"is a pickle of more than {MAX_OPCODES:,} steps or {MAX_PICKLE:,} bytes, too large"
            )
        name = opcode.name
        if opcode.proto > 2:
            raise UserError(f"is a pickle of protocol {opcode.proto}; torch.save's own, 2, can be read")
        if name == "MARK":
            marks.append(len(stack))
        elif name == "GLOBAL":
            uses.setdefault(str(argument), set())
            stack.append(_Item(str(argument)))
        elif name in _TUPLES or name == "TUPLE":
            stack.append(_tuple(taken(_TUPLES.get(name))))
        elif name in ("REDUCE", "NEWOBJ"):
            called, _ = taken(2)
            stack.append(_Item(called.made_by))
        elif name in _CHANGES:
            taken(_CHANGES[name])
            if stack[-1].made_by:
                uses[stack[-1].made_by].add(name)
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        else:
            taken(len(opcode.stack_before))
            stack.extend([_PLAIN] * len(opcode.stack_after))


def _tuple(items: list[_Item]) -> _Item:
    made = _Item("", 1 + max((i.depth for i in items), default=0), 1 + sum(i.items for i in items))
    if made.depth > MAX_NESTED or made.items > MAX_HASHED:
        raise UserError("is a pickle of tuples nested without end; no weights are")
    return made


class _Placeholder:
    """Stands for an object of a class that is not looked up, and forgets all it is given."""

    def __new__(cls, *_: object) -> "_Placeholder":
        return object.__new__(cls)

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


class _PlaceholderDict:
    """The same for kinds of dict; torch fills no others than its own."""

    def __new__(cls, *_: object) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        return OrderedDict()


class _PlaceholderList:
    def __new__(cls, *_: object) -> list[Any]:  # type: ignore[misc]
        return []


def _stand_ins(uses: Mapping[str, set[str]]) -> dict[str, type]:
    """A placeholder for each global that torch does not know, by the name that torch has for it."""
    stand_ins = {}
    for name, changes in uses.items():
        for unknown in _unknown_to_torch(name):
            kind: type = _Placeholder
            if changes & {"SETITEM", "SETITEMS"}:
                kind = _PlaceholderDict
            elif changes & {"APPEND", "APPENDS"}:
                kind = _PlaceholderList
            stand_ins[unknown] = type(unknown, (kind,), {})
    return stand_ins


def _unknown_to_torch(name: str) -> list[str]:
    """Asked of torch by a checkpoint of nothing else; it also turns Python 2's names into today's."""
    module, _, attribute = name.partition(" ")
    probe = io.BytesIO()
    with zipfile.ZipFile(probe, "w") as archive:
        archive.writestr("probe/data.pkl", b"\x80\x02c" + f"{module}\n{attribute}\n.".encode())
        archive.writestr("probe/version", "3\n")
    probe.seek(0)
    with _allowing({}):
        return torch.serialization.get_unsafe_globals_in_checkpoint(probe)


@contextmanager
def _allowing(stand_ins: Mapping[str, type]) -> Iterator[None]:
    """Nothing but these beside torch's own list: other libraries may have added real functions to it."""
    others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([(kind, name) for name, kind in stand_ins.items()])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(others)


def _load(file: Path | IO[bytes], stand_ins: Mapping[str, type], device: str, mmap: bool = False) -> Any:
    with _allowing(stand_ins), warnings.catch_warnings():
        warnings.simplefilter("ignore")
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


# Wrappings


def _unwrapped(loaded: Any, ema: bool) -> tuple[dict[str, Tensor], list[str], dict[str, str]]:
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
    if isinstance(value, _Placeholder):
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
    if _all_start(tensors, "backbone.") and "backbone.absolute_pos_embed" in tensors:
        return _only(tensors, "backbone.", "", left_out), [*wrapping, "backbone."]
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


def _capped(left_out: Mapping[str, str]) -> dict[str, str]:
    entries = [(printable(name)[:80], reason) for name, reason in left_out.items()]
    if len(entries) > MAX_LISTED:
        entries = [*entries[:MAX_LISTED], (f"{len(entries) - MAX_LISTED:,} more", "of these kinds")]
    return dict(entries)
