"""Images as tar shards in the WebDataset layout, their files byte for byte as they are."""

import io
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from itpn.data.picture import BadImageError, open_bytes
from itpn.data.progress import watched
from itpn.data.randomness import permutation
from itpn.data.shard_index import read_index
from itpn.data.shards import CLASSES
from itpn.data.source import SUFFIXES, Images
from itpn.errors import UserError

WRITTEN_AT = 1_577_836_800
"""The time of every member, the start of 2020: the same images give the same bytes."""

_OVERHEAD = 1 << 15
"""More than the headers and the padding of one more image take."""


@dataclass(frozen=True, kw_only=True)
class ShardSize:
    """A shard is full when the next image would exceed either."""

    images: int | None = None
    bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Written:
    num_images: int
    num_shards: int
    bad: Sequence[BadImageError]
    """What could not be read, and was left out."""


def write_shards(images: Images, folder: Path, prefix: str, size: ShardSize, *, seed: int) -> Written:
    """Writes `PREFIX-000000.tar` …, `classes.txt` and the index into a new folder, in an order drawn once.

    A JPEG is only opened, other images are decoded as well; those that cannot be are left out.

    Raises:
        UserError: A class name cannot be written, or no image can be read.
    """
    folder.mkdir(parents=True)
    if images.class_names is not None:
        _write_classes(images.class_names, folder / CLASSES)
    shards, bad = _Shards(folder, prefix, size), []
    order = permutation(seed, 0, len(images)).tolist()
    for i in watched(order, f"writing {prefix}"):
        try:
            data = images.read(i)
            with open_bytes(data, images.name(i)):
                pass
        except BadImageError as error:
            bad.append(error)
        else:
            shards.add(images.names[i], data, None if images.labels is None else int(images.labels[i]))
    shards.close()
    if not shards.paths:
        raise UserError(f"none of {len(images):,} images can be read, the first is {bad[0]}")
    read_index(folder, shards.paths)
    return Written(num_images=len(images) - len(bad), num_shards=len(shards.paths), bad=bad)


class _Shards:
    """A growing row of shards."""

    def __init__(self, folder: Path, prefix: str, size: ShardSize) -> None:
        self.folder, self.prefix, self.size = folder, prefix, size
        self.paths: list[Path] = []
        self.tar: tarfile.TarFile | None = None
        self.keys: set[str] = set()
        """Of the images in the current shard."""

    def add(self, name: str, data: bytes, label: int | None) -> None:
        if self.tar is None or self._is_full(self.tar, len(data)):
            self.tar = self._next()
        suffix = os.path.splitext(name)[1]
        if suffix.lower() not in SUFFIXES:  # a list may name such files; images are read by what is in them
            suffix = ".jpg"
        key = self._key(name)
        _add(self.tar, key + suffix, data)
        if label is not None:
            _add(self.tar, f"{key}.cls", str(label).encode())

    def close(self) -> None:
        if self.tar is not None:
            self.tar.close()

    def _is_full(self, tar: tarfile.TarFile, num_bytes: int) -> bool:
        images, size = self.size.images, self.size.bytes
        return (images is not None and len(self.keys) >= images) or (
            size is not None and tar.offset + num_bytes + _OVERHEAD > size
        )

    def _next(self) -> tarfile.TarFile:
        self.close()
        self.keys.clear()
        self.paths.append(self.folder / f"{self.prefix}-{len(self.paths):06d}.tar")
        return tarfile.open(self.paths[-1], "w", format=tarfile.GNU_FORMAT)

    def _key(self, name: str) -> str:
        """The name without ending and dots, at the first of which a key would end; unique in its shard."""
        *folders, last = [part for part in PurePosixPath(name).parts if part not in ("/", "..")]
        key = "/".join([*folders, os.path.splitext(last)[0].replace(".", "_")])
        while key in self.keys:
            key += f"-{len(self.keys)}"
        self.keys.add(key)
        return key


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mtime = len(data), WRITTEN_AT
    tar.addfile(member, io.BytesIO(data))


def _write_classes(class_names: Sequence[str], path: Path) -> None:
    broken = [name for name in class_names if "\n" in name or "\r" in name]
    if broken:
        raise UserError(f"the class folder {broken[0]!r} has a line break in its name; rename it")
    path.write_text("".join(f"{name}\n" for name in class_names), encoding="utf-8", errors="surrogateescape")
