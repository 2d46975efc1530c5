"""What a foreign pickle asks for, found by walking its opcodes without running it, and stand-ins for that."""

import io
import pickletools
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from itpn.errors import UserError, printable

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

# What torch's own list allows, and what weights have no use for: each can be asked for memory without limit.
_REFUSED = re.compile(
    r"(builtins|__builtin__) bytearray"
    r"|torch(\.\w+)? \w*Tensor|torch\._tensor \w+"
    r"|torch\._utils _rebuild_(sparse|q|meta|device|xla|wrapper|nested)\w*"
)
_BLOCKED = ("os", "sys", "posix", "nt")


def records_of(path: Path) -> dict[int, int]:
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


def pickle_in_zip(path: Path) -> IO[bytes]:
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


def globals_in(file: IO[bytes], count: int) -> dict[str, set[str]]:
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


class Placeholder:
    """Stands for an object of a class that is not looked up, and forgets all it is given."""

    def __new__(cls, *_: object) -> "Placeholder":
        return object.__new__(cls)

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


class _PlaceholderDict:
    """The same for kinds of dict; torch fills no others than its own."""

    def __new__(cls, *_: object) -> OrderedDict[Any, Any]:  # type: ignore[misc]  # not an instance, on purpose
        return OrderedDict()


class _PlaceholderList:
    def __new__(cls, *_: object) -> list[Any]:  # type: ignore[misc]  # likewise
        return []


def stand_ins_for(uses: Mapping[str, set[str]]) -> dict[str, type]:
    """A placeholder for each global that torch does not know, by the name that torch has for it."""
    stand_ins = {}
    for name, changes in uses.items():
        for unknown in _unknown_to_torch(name):
            kind: type = Placeholder
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
    with allowing({}):
        return torch.serialization.get_unsafe_globals_in_checkpoint(probe)


@contextmanager
def allowing(stand_ins: Mapping[str, type]) -> Iterator[None]:
    """Nothing but these beside torch's own list: other libraries may have added real functions to it."""
    others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([(kind, name) for name, kind in stand_ins.items()])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(others)
