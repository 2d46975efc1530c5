"""Images in tar shards of the WebDataset layout: `KEY.jpg` beside `KEY.cls`, the class id as text."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from itpn.data.limits import MAX_BYTES
from itpn.data.picture import Picture, blame, open_bytes
from itpn.data.randomness import block_permutation
from itpn.data.shard_index import FILE, Index, Shard, read_index
from itpn.data.source import Images
from itpn.errors import UserError, printable

SHARDS_PER_BLOCK = 8
"""Shards whose samples are mixed in training; more mixes better, fewer are read from at a time."""
CLASSES = "classes.txt"
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")

_NUM_OPEN = 2 * SHARDS_PER_BLOCK + 1
"""Shards that a process holds open: those of one block, and of the next where the two meet."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardedImages(Images):
    """Attributes:
    folder: Where the shards and their index are.
    """

    folder: Path
    index: Index

    def name(self, index: int) -> Path:
        shard = self.index.shards[int(self.index.rows[index, 0])]
        return Path(f"{shard.name}/{self.names[index]}")

    @contextmanager
    def open(self, index: int) -> Iterator[Picture]:
        with open_bytes(self.read(index), self.name(index)) as picture:
            yield picture

    def read(self, index: int) -> bytes:
        number, offset, size, _ = self.index.rows[index].tolist()
        shard = self.index.shards[number]
        with blame(self.name(index)):
            if size > MAX_BYTES:
                raise ValueError(f"{size:,} bytes are more than the limit of {MAX_BYTES:,}")
            file = _open_shard(self.folder, shard)
            data = os.pread(file.descriptor, size, offset)
            status = os.fstat(file.descriptor)
            if (status.st_size, status.st_mtime_ns) != shard[1:]:
                raise ValueError(f"{shard.name} was changed after it was indexed; start again")
            if len(data) < size:
                raise ValueError(f"the shard ends before byte {offset + size:,}")
        return data

    def order(self, seed: int, epoch: int) -> Tensor:
        """Block shuffle: the shards permuted, then the samples inside each group of eight shards."""
        sizes = np.bincount(self.index.rows[:, 0], minlength=len(self.index.shards))
        return block_permutation(seed, epoch, sizes.tolist(), SHARDS_PER_BLOCK)

    @property
    def fingerprint(self) -> str:
        shards = [(shard.name, shard.size) for shard in self.index.shards]
        digest = sha256(f"{super().fingerprint} {shards}".encode())
        digest.update(self.index.rows[:, :3].tobytes())
        return digest.hexdigest()


class _OpenShard:
    """Closed when the last reader lets go of it. Reads name their offset, so a forked process may read on."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@lru_cache(maxsize=_NUM_OPEN)
def _open_shard(folder: Path, shard: Shard) -> _OpenShard:
    return _OpenShard(folder / shard.name)


def archives_in(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The visible files of a folder with one of these endings, sorted by name."""
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.name.lower().endswith(suffixes))
    return [folder / name for name in names if name[0] != "." and os.path.isfile(folder / name)]


def find_sharded(folder: Path, tars: Sequence[Path]) -> ShardedImages:
    """The images in these shards of a folder, with labels if every one of them has one.

    Raises:
        UserError: A shard is damaged, a label has no class, or there is no image.
        OSError: A shard cannot be read.
    """
    index, stored = read_index(folder, tars)
    if not len(index.names):
        raise UserError(f"the shards under {folder} hold no image; looked for members like KEY.jpg")
    ids = index.rows[:, 3]
    num_labelled = int((ids >= 0).sum())
    class_names = _class_names(folder, int(ids.max())) if num_labelled == len(ids) else None
    kind = f"in {len(class_names):,} classes" if class_names else "without labels"
    if class_names is None and num_labelled:
        kind += f" (only {num_labelled:,} have one)"
    notes = [
        f"; {index.num_left_out:,} members left out that are no plain files of the form KEY.jpg"
        if index.num_left_out
        else "",
        "" if stored else f"; {FILE} cannot be written there, so the next start reads all headers again",
    ]
    bare = int((ids < 0).argmax())
    return ShardedImages(
        names=index.names,
        labels=None if class_names is None else torch.from_numpy(ids.copy()),
        class_names=class_names,
        description=f"{len(ids):,} images {kind} in {len(tars):,} shards under {printable(folder)}"
        + "".join(notes),
        unlabelled="" if class_names else f"{index.names[bare]} has no label: give each image one in KEY.cls",
        folder=folder,
        index=index,
    )


def _class_names(folder: Path, largest: int) -> tuple[str, ...]:
    """A line each of classes.txt; without one the class ids."""
    path = folder / CLASSES
    if not path.is_file():
        return tuple(map(str, range(largest + 1)))
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    names = tuple(text.removesuffix("\n").split("\n"))
    if largest >= len(names):
        raise UserError(f"{path} names {len(names):,} classes, but there are ids up to {largest:,}; add them")
    return names
