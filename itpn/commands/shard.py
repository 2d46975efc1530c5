"""`itpn shard DIR OUT`: images as tar shards, which disks and networks read faster than millions of files."""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from uuid import uuid4

import tyro

from itpn.commands.arguments import parse
from itpn.data.folders import split_folder
from itpn.data.images import find_images
from itpn.data.shard_writer import ShardSize, Written, write_shards
from itpn.errors import UserError, printable

PER_SHARD = 1000


@dataclass(frozen=True)
class Options:
    """Write the images of a folder as tar shards in the WebDataset layout, train and val, files unchanged.

    Samples are shuffled once, so that neighbours are not all of one class.

    Samples are shuffled once on the way, so that neighbours are not of one class.
    """

    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder of images, as for training: DIR/train and DIR/val, or DIR itself."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """New or empty folder to write to. It will hold OUT/train and, if there is such a split, OUT/val."""
    per_shard: int | None = None
    """Images per shard. Default: 1000, unless --megabytes is given."""
    megabytes: int | None = None
    """Largest size of a shard in millions of bytes. A single image may exceed it."""
    list: Path | None = None
    """Text file with one image path per line. It replaces the search, and only train is written."""
    seed: int = 0
    """Random seed of the shuffle. The same seed writes the same shards."""

    def __post_init__(self) -> None:
        if any(number is not None and number < 1 for number in (self.per_shard, self.megabytes)):
            raise UserError("--per-shard and --megabytes must be at least 1")

    @property
    def shard_size(self) -> ShardSize:
        if self.megabytes is None:
            return ShardSize(images=self.per_shard or PER_SHARD)
        return ShardSize(images=self.per_shard, bytes=self.megabytes * 1_000_000)


def run(arguments: list[str]) -> None:
    options = parse(Options, arguments, "itpn shard")
    directory, out = options.directory, options.out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{options.out} is not empty; name a new folder to write to")
    splits = {"train": find_images(directory, "train", options.list)}
    if not options.list and split_folder(directory, "val"):
        splits["val"] = find_images(directory, "val")
    with _written_beside(out) as beside:
        written = {
            split: write_shards(images, beside / split, split, options.shard_size, seed=options.seed)
            for split, images in splits.items()
        }
    for split, result in written.items():
        _report(split, result)
        for note in splits[split].notes:
            print(printable(f"warning: {split}: {note}"), file=sys.stderr)
    print(f"Samples were shuffled once with seed {options.seed}, so neighbours are of mixed classes.")
    print(f"Next: itpn train pretrain_own-data --data.root {options.out}")


def _report(split: str, written: Written) -> None:
    for bad in written.bad:
        print(printable(f"left out: {bad.path}: {bad.reason}"), file=sys.stderr)
    left_out = f"; {len(written.bad):,} unreadable files left out" if written.bad else ""
    print(f"{split}: {written.num_images:,} images in {written.num_shards:,} shards{left_out}")


@contextmanager
def _written_beside(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` once all is written, or is removed."""
    beside = out.with_name(f".{out.name}.writing-{uuid4().hex}")  # another start may write to the same
    try:
        yield beside
        beside.rename(out)
    except OSError as error:
        raise UserError(
            f"cannot write {out}: {error.strerror or error}; free space or name another folder"
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
