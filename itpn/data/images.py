"""Finding the images of a data set on disk."""

import os
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from itpn.data import oddities
from itpn.data.coco_names import located
from itpn.data.folders import (
    SPLITS,
    LeftOut,
    Split,
    folders_in,
    readable,
    some,
    split_folder,
    walk,
)
from itpn.data.picture import Picture, open_picture, read_file
from itpn.data.randomness import permutation
from itpn.data.shards import COMPRESSED, archives_in, find_sharded
from itpn.data.source import SUFFIXES, Images, Names
from itpn.errors import UserError, printable

_LAST_WORD = re.compile(r"[\s,;]+[^\s,;]*$")


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageList(Images):
    """Images that are files of their own; their classes are folders.

    Attributes:
        root: The folder that `names` are relative to.
        around: How many folders lie around those of the classes, one in the other.
    """

    root: Path
    around: int = 0

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

    @property
    def fingerprint(self) -> str:
        """As for all images; but earlier versions found no classes where folders lie around theirs."""
        bare = replace(self, labels=None, class_names=None, around=0) if self.around else self
        return super(ImageList, bare).fingerprint


def find_images(root: Path, split: Split = "train", list_file: Path | None = None) -> Images:
    """The images of a split below `root`, sorted by path, or those that `list_file` names, in its order.

    The folder of the split is used where `split_folder` finds one, else, for training, ROOT itself. If that
    folder holds tar files, they are the shards that the images are in. Otherwise it is searched recursively;
    the first folder level below what all images share is the class, if every image lies in such a folder.

    Raises:
        UserError: A folder is missing, is a file or holds no image; several may be meant; a listed file is
            missing; a shard is damaged or lies beside images.
    """
    with readable():
        return _listed_images(list_file, root) if list_file else _images_below(root, split)


def find_all(root: Path) -> list[Images]:
    """Every image below a folder, whatever its folders are called.

    Raises:
        UserError: as for `find_images`.
    """
    with readable():
        left_out = LeftOut()
        if names := sorted(walk(root, left_out)):
            return [_image_list(root, names, [()] * len(names), f"under {printable(root)}{left_out}")]
        splits = [split for split in SPLITS if split_folder(root, split)]
    return [find_images(root, split) for split in splits or SPLITS[:1]]  # tar shards, or nothing


def _images_below(root: Path, split: Split) -> Images:
    if not root.exists():
        raise UserError(f"the data folder {root} does not exist; name the folder of images with --data.root")
    if not root.is_dir():
        raise UserError(f"{root} is a file; --data.root takes a folder, --data.list a list of paths")
    made = split_folder(root, split)
    folder = made or (root if split == "train" else None)
    if folder is None:
        there = some([f"{path.name}/" for path in folders_in(root)]) or "no folders"
        raise UserError(
            f"{root} has no folder {split!r}, but {there}; name the validation folder {split}, beside one "
            "called train, or give another root"
        )
    tars, compressed = archives_in(folder, (".tar",)), archives_in(folder, COMPRESSED)
    left_out = LeftOut()
    names = sorted(walk(folder, left_out))
    if tars and not compressed and not names:
        return find_sharded(folder, tars)
    if tars and names:
        raise UserError(
            f"{folder} holds both tar shards ({tars[0].name}) and images ({names[0]}); "
            "move one kind elsewhere, or name the images with --data.list"
        )
    if compressed and not names:
        raise UserError(
            f"{compressed[0]} is compressed; unpack it to a plain .tar, which allows random "
            "access, and remove the compressed file"
        )
    if not names:
        found = "is empty" if not any(folder.iterdir()) else f"holds no image{left_out}"
        do = "remove it" if split == "val" else "name another folder"
        cure = left_out.pictures(folder) or f"add images, or {do}"
        raise UserError(
            f"the data folder {folder} {found}; looked below it for {' '.join(sorted(SUFFIXES))}; {cure}"
        )
    beside = note = ""
    if split == "train":
        beside, note = oddities.beside(made) if made else ("", oddities.whole(root))
    parents = [name.split("/")[:-1] for name in names]
    around = len(os.path.commonprefix(parents))  # noqa: RUF071 - of lists: folders are compared
    below = [parts[around:] for parts in parents]
    inside = folder.joinpath(*parents[0][:around])
    images = _image_list(folder, names, below, f"under {printable(inside)}{beside}{left_out}")
    notes = [note, left_out.pictures(folder)]
    if images.labels is not None:
        known = {*(images.class_names or ()), *left_out.folders(around)}
        notes += [oddities.same_inside(inside, below), oddities.without_image(inside, known)]
    elif note:
        images = replace(images, unlabelled=note)
    return replace(images, around=around, notes=tuple(filter(None, notes)))


def _listed_images(list_file: Path, root: Path) -> ImageList:
    if not list_file.is_file():
        raise UserError(f"the list {list_file} does not exist; --data.list takes a text file of paths")
    lines = list_file.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n")
    listed = [line.strip() for line in lines if line.strip()]
    if not listed:
        raise UserError(f"the list of images {list_file} is empty; write one path a line")
    folders = root, list_file.parent
    as_listed = ((folder, listed) for folder in folders)
    as_found = ((folder, [name for name, _ in located(folder, listed)]) for folder in folders)
    for folder, names in chain(as_listed, as_found):
        missing = [name for name in names if not (folder / name).is_file()]
        if not missing:
            return _image_list(folder, names, _below_the_common(folder, names), f"listed in {list_file}")
    bare = [_LAST_WORD.sub("", name) for name in missing]
    paths = [name for name in bare if any((folder / name).is_file() for folder in folders)]
    raise UserError(
        f"{list_file} names {len(missing):,} of {len(listed):,} files that do not exist: {some(missing)}; "
        f"paths are relative to {root} or to the list's own folder"
        + (f"; write nothing but the path on a line, as {printable(paths[0])}" if paths else "")
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
        unlabelled="" if labelled else oddities.why_unlabelled(folder, names, parents),
    )
