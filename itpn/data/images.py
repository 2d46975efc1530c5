"""Finding the images of a data set on disk."""

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from itpn.data.picture import Picture, open_picture, read_file
from itpn.data.randomness import permutation
from itpn.data.shards import COMPRESSED, archives_in, find_sharded
from itpn.data.source import SUFFIXES, Images, Names
from itpn.errors import UserError, printable
from itpn.outputs import MANIFEST, is_run, outputs_among

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageList(Images):
    """Images that are files of their own; their classes are folders.

    Attributes:
        root: The folder that `names` are relative to.
    """

    root: Path

    def path(self, index: int) -> Path:
        return self.root / self.names[index]

    def name(self, index: int) -> Path:
        return self.path(index)

    def open(self, index: int) -> AbstractContextManager[Picture]:
        return open_picture(self.path(index))

    def read(self, index: int) -> bytes:
        return read_file(self.path(index))

    def order(self, seed: int, epoch: int) -> Tensor:
        return permutation(seed, epoch, len(self))


def find_images(root: Path, split: Split = "train", list_file: Path | None = None) -> Images:
    """The images of a split below `root`, sorted by path, or those that `list_file` names, in its order.

    ROOT/train (or val) is used where it exists, else ROOT/ILSVRC/Data/CLS-LOC/train, else, for training,
    ROOT itself. If that folder holds tar files, they are the shards that the images are in. Otherwise it is
    searched recursively; the first folder level below is the class, if every image lies in such a folder and
    there are at least two.

    Raises:
        UserError: A folder is missing, is a file or holds no image; a listed file is missing; a shard is
            damaged or lies beside images.
    """
    with _readable():
        return _listed_images(list_file, root) if list_file else _images_below(root, split)


def find_all(root: Path) -> list[Images]:
    """Every image below a folder, whatever its folders are called.

    Raises:
        UserError: as for `find_images`.
    """
    with _readable():
        ours: list[str] = []
        if names := sorted(walk(root, ours)):
            return [_image_list(root, names, [()] * len(names), f"under {root}{_left_out(ours)}")]
        splits = [split for split in SPLITS if split_folder(root, split)]
    return [find_images(root, split) for split in splits or SPLITS[:1]]  # tar shards, or nothing


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}; check its permissions") from error


def _images_below(root: Path, split: Split) -> Images:
    if not root.exists():
        raise UserError(f"the data folder {root} does not exist; name the folder of images with --data.root")
    if not root.is_dir():
        raise UserError(f"{root} is a file; --data.root takes a folder, --data.list a list of paths")
    folder = split_folder(root, split) or (root if split == "train" else None)
    if folder is None:
        raise UserError(f"{root} has no folder {split!r}; add it or name another root to evaluate on")
    tars, compressed = archives_in(folder, (".tar",)), archives_in(folder, COMPRESSED)
    ours: list[str] = []
    names = sorted(walk(folder, ours))
    if tars and not compressed and not names:
        return find_sharded(folder, tars)
    if tars and names:
        raise UserError(
            f"{folder} holds both tar shards ({tars[0].name}) and images ({names[0]}); "
            "move one kind elsewhere, or name the images with --data.list"
        )
    if compressed and not names:
        raise UserError(
            f"{compressed[0]} is compressed; unpack it to a plain .tar, where an image can be read at its "
            "place, and remove the compressed file"
        )
    if not names:
        found = "is empty" if not any(folder.iterdir()) else f"holds no image{_left_out(ours)}"
        raise UserError(f"the data folder {folder} {found}; looked below it for {' '.join(sorted(SUFFIXES))}")
    parents = [name.split("/")[:-1] for name in names]
    return _image_list(folder, names, parents, f"under {folder}{_left_out(ours)}")


def split_folder(root: Path, split: Split) -> Path | None:
    """The folder made for a split, if there is one."""
    folders = (root / split, root / "ILSVRC/Data/CLS-LOC" / split)
    return next((folder for folder in folders if folder.is_dir()), None)


def walk(root: Path, ours: list[str] | None = None) -> Iterator[str]:
    """Visible image files below root, relative to it; each real folder once, so links cannot loop.

    Args:
        ours: takes the names of run directories and outputs, which are left out. None: they are not.
    """
    seen: set[tuple[int, int]] = set()
    folders = [""]
    while folders:
        folder = folders.pop()
        status = os.stat(root / folder)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(root / folder) as entries:
            found = {entry.name: entry for entry in entries}
        if ours is not None and "run.json" in found and is_run(root / folder):
            ours.append(folder or "./")
            continue
        if ours is not None and MANIFEST in found:
            written = sorted(outputs_among(root / folder, [name for name in found if _has_suffix(name)]))
            ours += [f"{folder}{name}" for name in written]
            found = {name: entry for name, entry in found.items() if name not in written}
        visible = [found[name] for name in sorted(found) if name[0] != "."]
        folders += [f"{folder}{entry.name}/" for entry in reversed(visible) if _leads_to(entry.is_dir)]
        yield from (f"{folder}{entry.name}" for entry in visible if _is_image(entry))


def _left_out(ours: Sequence[str]) -> str:
    """A clause of a description."""
    some = ", ".join(map(printable, ours[:3])) + (", …" if len(ours) > 3 else "")
    return f"; {len(ours):,} left out that itpn wrote ({some})" if ours else ""


def _has_suffix(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def _is_image(entry: os.DirEntry[str]) -> bool:
    return _has_suffix(entry.name) and _leads_to(entry.is_file)


def _leads_to(kind: Callable[[], bool]) -> bool:
    try:
        return kind()
    except OSError as error:  # a link to itself leads nowhere, as one to a missing file does
        if error.errno == errno.ELOOP:
            return False
        raise


def _listed_images(list_file: Path, root: Path) -> ImageList:
    if not list_file.is_file():
        raise UserError(f"the list {list_file} does not exist; --data.list takes a text file of paths")
    lines = list_file.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n")
    listed = [line.strip() for line in lines if line.strip()]
    if not listed:
        raise UserError(f"the list of images {list_file} is empty; write one path a line")
    for folder in (root, list_file.parent):
        missing = [name for name in listed if not (folder / name).is_file()]
        if not missing:
            return _image_list(folder, listed, _below_the_common(folder, listed), f"listed in {list_file}")
    some = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
    raise UserError(
        f"{list_file} names {len(missing):,} of {len(listed):,} files that do not exist: {some}; "
        f"paths are relative to {root} or to the list's own folder"
    )


def _below_the_common(folder: Path, names: list[str]) -> list[tuple[str, ...]]:
    """For each file the folders it lies in, without those that all files share."""
    parents = [(folder.absolute() / name).parent for name in names]
    shared = len(Path(os.path.commonpath(parents)).parts)
    return [parent.parts[shared:] for parent in parents]


def _image_list(folder: Path, names: list[str], parents: Sequence[Sequence[str]], where: str) -> ImageList:
    classes = sorted({parts[0] if parts else "" for parts in parents})
    labelled = "" not in classes and len(classes) > 1
    ids = {name: label for label, name in enumerate(classes)}
    kind = f"in {len(classes):,} class folders" if labelled else "without class folders"
    return ImageList(
        root=folder,
        names=Names(names),
        labels=torch.tensor([ids[parts[0]] for parts in parents]) if labelled else None,
        class_names=tuple(classes) if labelled else None,
        description=f"{len(names):,} images {kind} {where}",
    )
