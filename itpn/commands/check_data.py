"""`itpn check-data DIR`: reads every image as training would, and lists those that cannot be read."""

import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TextIO

import numpy as np
import tyro
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from itpn.commands.arguments import parse
from itpn.data.check import Tally, check
from itpn.data.images import find_images, split_folder
from itpn.data.loader import DataConfig, default_workers
from itpn.data.source import Images
from itpn.errors import UserError, printable


@dataclass(frozen=True)
class CheckData:
    """Decode every image of a data set, name those that cannot be read, and sum up the others.

    The exit status is 0 if all can be read, else 1.
    """

    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder of images, searched as --data.root is: train, and val if there is one."""
    list: Path | None = None
    """Text file with one image path a line, as --data.list takes it; replaces the search."""
    workers: int | None = None
    """Processes that decode; as many as there are cores, up to 16, if not given."""
    out: Path | None = None
    """Write the unreadable images to this file, one JSON object a line: split, file, reason."""
    image_size: int = 224
    """Images with a side shorter than this are counted; training enlarges them."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise UserError(f"--workers is {self.workers}; it is a number of processes, 1 or more")
        if self.image_size < 1:
            raise UserError(f"--image-size is {self.image_size}; it is a number of pixels, 1 or more")


def run(arguments: list[str]) -> None:
    options = parse(CheckData, arguments, "itpn check-data")
    splits = images_of(options)
    for images in splits.values():
        print(printable(images.description))
    tallies = {split: Tally(images) for split, images in splits.items()}
    read_all(tallies, options.workers or default_workers(on_cpu=False), options.out)
    for split, tally in tallies.items():
        print("\n".join([f"{split}:", *(f"  {line}" for line in summary(tally, options.image_size))]))
    if len(tallies) == 2:
        print(shared(*tallies.values()))
    if any(tally.bad for tally in tallies.values()):
        raise SystemExit(1)


def images_of(options: CheckData) -> dict[str, Images]:
    """What training and evaluation would find, by split."""
    if options.list or not split_folder(options.directory, "val"):
        return {"train": find_images(options.directory, "train", options.list)}
    return {split: find_images(options.directory, split) for split in ("train", "val")}


def read_all(tallies: Mapping[str, Tally], num_workers: int, out: Path | None) -> None:
    """Fills the tallies; each unreadable image is named as soon as it is met."""
    with ExitStack() as stack:
        file = stack.enter_context(_created(out)) if out else None
        console = Console(stderr=True, soft_wrap=True)
        bar = stack.enter_context(_bar(console))
        for split, tally in tallies.items():
            task = bar.add_task(split, total=len(tally.images))
            for index, found in check(tally.images, num_workers):
                tally.add(index, found)
                bar.advance(task)
                if isinstance(found, str):
                    name = tally.images.name(index)
                    print(f"{printable(name)}: {printable(found)}")
                    if file:
                        line = {"split": split, "file": str(name), "reason": found}
                        print(json.dumps(line), file=file, flush=True)


def _created(path: Path) -> TextIO:
    try:
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; name another file with --out") from error


def _bar(console: Console) -> Progress:
    return Progress(
        *Progress.get_default_columns(),
        MofNCompleteColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
        redirect_stdout=sys.stdout.isatty(),  # a file that stdout goes to must not miss the bad ones
    )


def summary(tally: Tally, image_size: int) -> Iterator[str]:
    yield f"{tally.num_read:,} of {len(tally.images):,} images can be read"
    yield from _bad(tally)
    if sizes := tally.sizes():
        yield "width x height: smallest {}, median {}, largest {}".format(*sizes)
    if smaller := tally.num_smaller(image_size):
        yield f"with a side shorter than {image_size} pixels: {smaller:,}"
    if tally.formats:
        yield "formats: " + ", ".join(f"{count:,} {kind}" for kind, count in tally.formats.most_common())
    if tally.traits:
        yield "of these: " + ", ".join(f"{count:,} {trait}" for trait, count in tally.traits.most_common())
    if classes := tally.class_counts():
        (fewest, smallest), (most, largest) = classes[0], classes[-1]
        yield (
            f"{len(classes):,} classes of {fewest:,} ({printable(smallest)}) "
            f"to {most:,} ({printable(largest)}) images"
        )
    if copies := tally.num_read - len(np.unique(tally.digests)):
        yield f"exact copies of others: {copies:,}"


def _bad(tally: Tally) -> Iterator[str]:
    if not tally.bad:
        return
    share, limit = len(tally.bad) / len(tally.images), DataConfig.max_bad_share
    stops = f"; training stops at {limit:.0%}" if share > limit else ""
    yield f"{len(tally.bad):,} cannot ({share:.2%}{stops}):"
    alike: dict[str, list[str]] = defaultdict(list)  # but for numbers, such as that of missing bytes
    for reason in tally.bad.values():
        alike[re.sub(r"\d[\d,]*", "…", reason)].append(reason)
    for pattern, reasons in sorted(alike.items(), key=lambda item: -len(item[1])):
        yield f"  {len(reasons):,} {printable(reasons[0] if len({*reasons}) == 1 else pattern)}"


def shared(train: Tally, val: Tally) -> str:
    """A warning, unless the splits have nothing in common."""
    num_shared = int(np.isin(val.digests, train.digests).sum())
    if not num_shared:
        return "no image of val is in train"
    return f"warning: {num_shared:,} images of val are in train, byte for byte; evaluation would flatter"
