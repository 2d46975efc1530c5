"""`itpn check-data DIR`: reads images, labels and annotations as training would, and lists what is bad."""

import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, TextIO

import numpy as np
import tyro
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from itpn.commands.arguments import parse
from itpn.data.check import Tally
from itpn.data.check_labels import LabelTally, tally_of
from itpn.data.check_labels import summary as label_summary
from itpn.data.check_objects import described
from itpn.data.check_objects import summary as objects_summary
from itpn.data.class_names import names_file
from itpn.data.classes import check_same_classes, class_names_of
from itpn.data.coco import Coco, Finding
from itpn.data.coco_file import find_coco, places, read_coco
from itpn.data.folders import Split, split_folder
from itpn.data.images import find_images
from itpn.data.labelled import IGNORED
from itpn.data.labels import MAX_CLASSES
from itpn.data.loader import DataConfig, default_workers
from itpn.data.segmentation import SegmentationDataConfig, find_labelled, has_split
from itpn.data.source import Images
from itpn.errors import UserError, printable
from itpn.outputs import claim, growing


@dataclass(frozen=True)
class CheckData:
    """Decode every image of a data set, check its labels or annotations, name what cannot be used, and sum up
    the rest.

    The exit status is 0 if all can be used and nothing is odd, else 1.
    """

    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder of images, searched as --data.root is: train, and val if it exists."""
    format: Literal["images", "ade20k", "masks", "coco"] = "images"
    """Layout of the data set. images: an image folder. ade20k: images and label maps, laid out as ADE20K.
    masks: images/train beside labels/train. coco: images and annotations, laid out as COCO."""
    list: Path | None = None
    """Text file with one image path per line, as for --data.list. It replaces the search."""
    workers: int | None = None
    """Number of decoding processes. Default: one per core, at most 16."""
    out: Path | None = None
    """JSON-lines file for what cannot be used: split, file, reason. For an annotation: split, place,
    annotation, image, reason, left_out."""
    image_size: int = 224
    """Count images with a side shorter than this many pixels. Training enlarges them."""
    num_classes: Annotated[int | None, tyro.conf.arg(aliases=["--data.num-classes"])] = None
    """Number of classes of masks, if no file names them."""
    names: Annotated[Path | None, tyro.conf.arg(aliases=["--data.names"])] = None
    """Text file with one class name per line, for masks. Default: DIR/classes.txt if it exists."""
    ignored: Annotated[int | None, tyro.conf.arg(aliases=["--data.ignored"])] = IGNORED
    """Value that marks unlabelled pixels in masks."""
    zero_is_no_label: Annotated[bool, tyro.conf.arg(aliases=["--data.zero-is-no-label"])] = False
    """Treat 0 in masks as unlabelled; the classes then start at 1."""
    values: Annotated[tuple[int, ...], tyro.conf.arg(aliases=["--data.values"])] = ()
    """Value that masks store for each class, such as 0 255. Empty: consecutive numbers."""
    annotations: Path | None = None
    """COCO instances file for the images in DIR. It replaces the search."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise UserError(f"--workers is {self.workers}; it is a number of processes, 1 or more")
        if self.image_size < 1:
            raise UserError(f"--image-size is {self.image_size}; it is a number of pixels, 1 or more")
        if self.list and self.format != "images":
            raise UserError(f"--list is for images without labels; leave out --format {self.format}")
        if self.annotations and self.format != "coco":
            raise UserError("--annotations needs --format coco")


def run(arguments: list[str]) -> None:
    options = parse(CheckData, arguments, "itpn check-data")
    claim(("--out", options.out))
    splits = images_of(options)
    for images in splits.values():
        print(printable(images.description))
    tallies = {split: tally_of(images) for split, images in splits.items()}
    read_all(tallies, options.workers or default_workers(on_cpu=False), options.out)
    for split, tally in tallies.items():
        print("\n".join([f"{split}:", *(f"  {line}" for line in summary(tally, options.image_size))]))
    copies = shared(*tallies.values()) if len(tallies) == 2 else []
    if len(tallies) == 2 and not copies:
        print("no image of val is in train")
    warnings = [f"{split}: {line}" for split, tally in tallies.items() for line in tally.warnings()]
    warnings += [*_about_classes(splits), *copies]
    for warning in warnings:
        print(f"warning: {printable(warning)}")
    if warnings or any(tally.bad or tally.unpaired or _left_out(tally.images) for tally in tallies.values()):
        raise SystemExit(1)


def _about_classes(splits: Mapping[str, Images]) -> list[str]:
    """Why no classifier could be trained on class folders, if so."""
    train = splits["train"]
    if train.class_names is None:
        return []
    try:
        class_names_of(train)
        if "val" in splits:
            check_same_classes(train, splits["val"])
    except UserError as error:
        return [str(error)]
    return []


def images_of(options: CheckData) -> dict[str, Images]:
    """What training and evaluation would find, by split."""
    if options.format == "coco":
        return coco_of(options)
    if options.format != "images":
        data = labelled(options)
        found: dict[str, Images] = {"train": find_labelled(data, "train")}
        return found | ({"val": find_labelled(data, "val")} if has_split(data, "val") else {})
    if options.list or not split_folder(options.directory, "val"):
        return {"train": find_images(options.directory, "train", options.list)}
    return {split: find_images(options.directory, split) for split in ("train", "val")}


def coco_of(options: CheckData) -> dict[str, Images]:
    if options.annotations:
        return {"train": read_coco(options.annotations, options.directory)}
    has_val = places(options.directory, "val")[0].is_dir()
    splits: tuple[Split, ...] = ("train", "val") if has_val else ("train",)
    return {split: find_coco(options.directory, split) for split in splits}


def labelled(options: CheckData) -> SegmentationDataConfig:
    """Where the labels are. If nothing says how many classes there are, every number is one."""
    data = SegmentationDataConfig(
        root=options.directory,
        format="ade20k" if options.format == "ade20k" else "masks",
        num_classes=options.num_classes,
        names=options.names,
        ignored=options.ignored,
        zero_is_no_label=options.zero_is_no_label,
        values=options.values,
        skip_bad=True,  # to tell of all of them
    )
    known = data.num_classes or data.names or data.values or names_file(data.root).is_file()
    if data.format == "ade20k" or known:
        return data
    return replace(data, num_classes=MAX_CLASSES, ignored=None, zero_is_no_label=False)


def read_all(tallies: Mapping[str, Tally], num_workers: int, out: Path | None) -> None:
    """Fills the tallies; each unreadable image is named as soon as it is met."""
    with ExitStack() as stack:
        file = stack.enter_context(growing(out)) if out else None
        console = Console(stderr=True, soft_wrap=True)
        bar = stack.enter_context(_bar(console))
        for split, tally in tallies.items():
            for finding in _findings(tally.images):
                print(printable(described(finding)))
                if file:
                    print(json.dumps({"split": split, **finding._asdict()}), file=file)
            task = bar.add_task(split, total=len(tally.images))
            for alone in tally.unpaired:
                tell(split, alone.path, alone.reason, file)
            for index, found in tally.check(num_workers):
                tally.add(index, found)
                bar.advance(task)
                if isinstance(found, str):
                    tell(split, tally.images.name(index), found, file)


def tell(split: str, name: Path, reason: str, file: TextIO | None) -> None:
    """Of one file that cannot be used."""
    print(f"{printable(name)}: {printable(reason)}")
    if file:
        print(json.dumps({"split": split, "file": str(name), "reason": reason}), file=file, flush=True)


def _findings(images: Images) -> Sequence[Finding]:
    return images.findings if isinstance(images, Coco) else ()


def _left_out(images: Images) -> bool:
    return any(finding.left_out for finding in _findings(images))


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
    if tally.unpaired:
        yield f"{len(tally.unpaired):,} files without a partner"
    if sizes := tally.sizes():
        yield "width x height: smallest {}, median {}, largest {}".format(*sizes)
    if not isinstance(tally.images, Coco) and (smaller := tally.num_smaller(image_size)):
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
    if isinstance(tally, LabelTally):
        yield from label_summary(tally)
    if isinstance(tally.images, Coco):
        yield from objects_summary(tally.images)


def _bad(tally: Tally) -> Iterator[str]:
    if not tally.bad:
        return
    share, limit = len(tally.bad) / len(tally.images), DataConfig.max_bad_share
    stops = f"; training stops at {limit:.0%}" if share > limit else ""
    stops = "; training needs --data.skip-bad" if isinstance(tally, LabelTally) else stops
    yield f"{len(tally.bad):,} cannot ({share:.2%}{stops}):"
    alike: dict[str, list[str]] = defaultdict(list)  # but for numbers, such as that of missing bytes
    for reason in tally.bad.values():
        alike[re.sub(r"(?<!-b )\d[\d,]*", "…", reason)].append(reason)  # -b 1 is part of a command
    for pattern, reasons in sorted(alike.items(), key=lambda item: -len(item[1])):
        yield f"  {len(reasons):,} {printable(reasons[0] if len({*reasons}) == 1 else pattern)}"


def shared(train: Tally, val: Tally) -> list[str]:
    """A warning, if the splits have images in common."""
    num_shared = int(np.isin(val.digests, train.digests).sum())
    if not num_shared:
        return []
    return [
        f"{num_shared:,} images of val are in train, byte for byte, so evaluation would look too good; "
        "remove them from one of the two"
    ]
