"""Which images lie where in a folder of tar shards: found from the headers once, then stored."""

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from itpn.data.progress import watched
from itpn.data.source import SUFFIXES, Names
from itpn.data.tar import BadTarError, Member, members

FILE = "index.safetensors"
MAX_CLASSES = 1 << 20
MAX_LABEL_BYTES = 1 << 20

_FORMAT = 1
_COLUMNS = ("shard", "offset", "size", "label")


class Shard(NamedTuple):
    """An archive as it was when its headers were read; another size or time means another content."""

    name: str
    size: int
    modified_ns: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Index:
    """Where the images lie, in the order of shards and, inside each, of the archive.

    Attributes:
        rows: int64 [n, 4]: number of the shard, offset and size in bytes, class id or -1.
        num_left_out: Members that look like images but are no plain files of the form KEY.jpg.
    """

    shards: tuple[Shard, ...]
    names: Names
    rows: NDArray[Any]
    num_left_out: int


def read_index(folder: Path, tars: Sequence[Path]) -> tuple[Index, bool]:
    """The stored index if it is of these archives, otherwise a new one, and whether that is stored now.

    Raises:
        UserError: An archive is damaged, truncated, compressed or unreadable, or a label is no class id.
    """
    shards = tuple(_shard(path) for path in tars)
    index = _load(folder / FILE, shards)
    if index is not None:
        return index, True
    index = _build(folder, shards)
    return index, _store(folder / FILE, index)


def _shard(path: Path) -> Shard:
    status = os.stat(path)
    return Shard(path.name, status.st_size, status.st_mtime_ns)


def _build(folder: Path, shards: tuple[Shard, ...]) -> Index:
    names: list[str] = []
    parts, num_left_out = [np.empty((0, 4), np.int64)], 0
    for number, shard in watched(list(enumerate(shards)), f"indexing {folder}"):
        found, left_out = _scan(folder / shard.name)
        names += [name for name, *_ in found]
        parts.append(np.array([(number, *row) for _, *row in found], np.int64).reshape(-1, 4))
        num_left_out += left_out
    return Index(shards=shards, names=Names(names), rows=np.concatenate(parts), num_left_out=num_left_out)


def _scan(path: Path) -> tuple[list[tuple[str, int, int, int]], int]:
    """Name, offset, size and label (or -1) of each image, and how many image-like members are none."""
    images: list[tuple[str, Member]] = []
    labels: dict[str, int] = {}
    num_left_out = 0
    with open(path, "rb", buffering=0) as file:
        for member in members(path):
            key, suffix = _split(member.name)
            if key and member.is_file and suffix in SUFFIXES:
                images.append((key, member))
            elif os.path.splitext(member.name)[1].lower() in SUFFIXES:
                num_left_out += 1
            elif member.is_file and suffix in (".cls", ".json"):
                label = _label(path, member, suffix, file.fileno())
                if label is not None and (suffix == ".cls" or key not in labels):
                    labels[key] = label
    return [(m.name, m.offset, m.size, labels.get(key, -1)) for key, m in images], num_left_out


def _split(name: str) -> tuple[str, str]:
    """Key and ending; the key ends at the first dot of the last part."""
    folder, slash, last = name.rpartition("/")
    stem, dot, ending = last.partition(".")
    return (folder + slash + stem if stem else ""), dot + ending.lower()


def _label(path: Path, member: Member, suffix: str, descriptor: int) -> int | None:
    """A .cls must hold a class id; a .json may hold one as "label"."""
    if member.size > MAX_LABEL_BYTES:
        if suffix == ".json":
            return None
        raise BadTarError(
            path, member.offset, f"{member.name} has {member.size:,} bytes, too many for a label"
        )
    content = os.pread(descriptor, member.size, member.offset)
    try:
        label = int(content.decode("ascii")) if suffix == ".cls" else _json_label(content)
    except ValueError:
        label = -1
    if label is None or 0 <= label < MAX_CLASSES:
        return label
    raise BadTarError(path, member.offset, f"{member.name} is no class id from 0 to {MAX_CLASSES - 1:,}")


def _json_label(content: bytes) -> int | None:
    try:
        label = json.loads(content).get("label")
    except (ValueError, AttributeError, RecursionError):  # metadata of another kind
        return None
    return label if type(label) is int and 0 <= label < MAX_CLASSES else None


def _store(path: Path, index: Index) -> bool:
    """Written beside and renamed, so that several processes may do so at once; False if it cannot be."""
    columns = {name: index.rows[:, i].copy() for i, name in enumerate(_COLUMNS)}
    names = {"names": index.names.characters, "name_ends": index.names.ends}
    about = {"format": _FORMAT, "shards": index.shards, "num_left_out": index.num_left_out}
    beside = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        beside.write_bytes(save(columns | names, {"index": json.dumps(about)}))
        beside.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        return False
    return True


def _load(path: Path, shards: tuple[Shard, ...]) -> Index | None:
    """None if there is no index, if it is of other archives or if it is damaged."""
    try:
        with safe_open(path, framework="numpy") as file:
            about = json.loads(file.metadata()["index"])
            if about["format"] != _FORMAT or [Shard(*shard) for shard in about["shards"]] != list(shards):
                return None
            names = Names.packed(file.get_tensor("names"), file.get_tensor("name_ends"))
            rows = np.stack([file.get_tensor(name) for name in _COLUMNS], axis=1)
            left_out = int(about["num_left_out"])
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None
    index = Index(shards=shards, names=names, rows=rows, num_left_out=left_out)
    return index if _fits(index) else None


def _fits(index: Index) -> bool:
    """Whether every image lies inside its archive: an index can be damaged, or made to mislead."""
    rows, names = index.rows, index.names
    if rows.dtype != np.int64 or names.ends.dtype != np.int64 or names.characters.dtype != np.uint8:
        return False
    if rows.ndim != 2 or names.ends.ndim != 1 or names.characters.ndim != 1 or len(names) != len(rows):
        return False
    number, offset, size, label = rows.T
    bounds = np.concatenate([[0], names.ends, [len(names.characters)]])
    if (np.diff(bounds) < 0).any() or bounds[-1] != bounds[-2]:
        return False
    if (np.diff(number, prepend=0, append=len(index.shards) - 1) < 0).any():
        return False
    limit = np.array([shard.size for shard in index.shards])[number]
    return bool(
        ((offset >= 0) & (size >= 0) & (size <= limit - offset) & (label >= -1) & (label < MAX_CLASSES)).all()
    )
