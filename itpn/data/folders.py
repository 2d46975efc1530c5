"""Searching folders: the images below one, what is passed over on the way, and which folders are splits."""

import errno
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from itpn.data.kinds import ENDINGS, kind_of_file
from itpn.data.source import SUFFIXES
from itpn.errors import UserError, printable
from itpn.outputs import MANIFEST, RUN_FILES, is_run, outputs_among

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = get_args(Split)

KINDS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}
"""What folders of splits are called, in any case; the first name goes before others."""
_IMAGENET = "ILSVRC/Data/CLS-LOC"
_SET = re.compile(r"[-_ ]?(set|data|images)$")
_SYSTEM = re.compile(
    r"__macosx|@eadir|@tmp|@recycle|@recently-snapshot|#recycle|#snapshot|\$recycle\.bin|"
    r"system volume information|lost\+found|__pycache__",
    re.IGNORECASE,
)
"""Folders that file managers, disk stations and archives make."""
_SYSTEM_FILES = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini"})
_MOST_OPENED = 20
"""Endings of which a file is opened to see what it is."""
_MOST_AROUND = 8
"""Folders that may lie around a data set, one in the other."""


@dataclass
class LeftOut:
    """What a search passes over; `str` is a clause of a description."""

    ours: list[str] = field(default_factory=list)
    """Run directories and outputs."""
    system: list[str] = field(default_factory=list)
    """Folders that the system made."""
    others: Counter[str] = field(default_factory=Counter)
    """How many files have each other ending."""
    first: dict[str, str] = field(default_factory=dict)
    """The first file of each ending."""

    def add_file(self, name: str) -> None:
        if name.split("/")[-1].lower() in _SYSTEM_FILES:
            return
        ending = os.path.splitext(name)[1].lower()
        ending = ending if any(map(str.isalpha, ending)) else ""  # a number, such as of a slice, is none
        self.others[ending] += 1
        self.first.setdefault(ending, name)

    def folders(self, depth: int) -> set[str]:
        """The folders so deep down in which runs, outputs or the system's folders are."""
        paths = [name.split("/") for name in (*self.ours, *self.system)]
        return {parts[depth] for parts in paths if len(parts) > depth}

    def __str__(self) -> str:
        counted = [f"; other files beside them: {self._counted(self.others)}"] if self.others else []
        named = [
            f"; {len(names):,} left out that {who} ({some(names)})"
            for who, names in (("itpn wrote", self.ours), ("the system made", self.system))
            if names
        ]
        return "".join(counted + named)

    def pictures(self, root: Path) -> str:
        """What to do about files that are images, but not called so; empty where there are none."""
        kinds = {
            ending: ENDINGS.get(ending) or kind_of_file(root / self.first[ending])
            for ending, _ in self.others.most_common(_MOST_OPENED)
        }
        found = {ending: kind for ending, kind in kinds.items() if kind is not None and kind.is_image}
        if not found:
            return ""
        counts = Counter({ending: self.others[ending] for ending in found})
        example = self.first[counts.most_common(1)[0][0]]
        cures: dict[str, set[str]] = {}
        for kind in found.values():
            cures.setdefault(kind.cure_of_name, set()).add(kind.name.partition(" ")[2])
        told = [f"{', '.join(sorted(names))}: {cure}" for cure, names in sorted(cures.items())]
        return (
            f"{counts.total():,} files look like images and are left out for their endings: "
            f"{self._counted(counts)}, such as {example}; {'; '.join(told)}"
        )

    @staticmethod
    def _counted(counts: Counter[str]) -> str:
        listed = [
            f"{count:,} {printable(ending) or 'without ending'}" for ending, count in counts.most_common(6)
        ]
        return ", ".join(listed[:5]) + (", …" if len(listed) > 5 else "")


def some(names: list[str]) -> str:
    """The first three of some names."""
    return ", ".join(map(printable, names[:3])) + (", …" if len(names) > 3 else "")


def walk(root: Path, left_out: LeftOut | None = None) -> Iterator[str]:
    """Visible image files below root, relative to it; each real folder once, so links cannot loop.

    Args:
        left_out: takes what is passed over. None: run directories and outputs are not.
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
        if left_out is not None and "run.json" in found and is_run(root / folder):
            if folder:
                left_out.ours.append(folder)
                continue
            written = [name for name in (*RUN_FILES, "lock") if name in found]  # a run among its data
            left_out.ours += written
            found = {name: entry for name, entry in found.items() if name not in written}
        if left_out is not None and MANIFEST in found:
            written = sorted(outputs_among(root / folder, [name for name in found if _has_suffix(name)]))
            left_out.ours += [f"{folder}{name}" for name in written]
            found = {name: entry for name, entry in found.items() if name not in written}
        visible = [found[name] for name in sorted(found) if name[0] != "."]
        inside = [f"{folder}{entry.name}/" for entry in visible if _leads_to(entry.is_dir)]
        system = [name for name in inside if _SYSTEM.fullmatch(name.split("/")[-2])]
        folders += [name for name in reversed(inside) if name not in system]
        if left_out is not None:
            left_out.system += system
        for entry in visible:
            if _has_suffix(entry.name):
                if _leads_to(entry.is_file):
                    yield f"{folder}{entry.name}"
            elif left_out is not None and _leads_to(entry.is_file):
                left_out.add_file(f"{folder}{entry.name}")


def folders_in(folder: Path) -> list[Path]:
    """The visible folders directly in one, sorted by name, without those that the system made."""
    with readable():
        if not folder.is_dir():
            return []
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if _leads_to(entry.is_dir))
    return [folder / name for name in names if name[0] != "." and not _SYSTEM.fullmatch(name)]


def split_folder(root: Path, split: Split) -> Path | None:
    """The folder made for a split, if there is one: in `root`, in a folder alone there, or ImageNet's.

    Raises:
        UserError: Several folders go by its name.
    """
    found = splits_in(inside(root, splits_in)).get(split)
    imagenet = root / _IMAGENET / split
    return found or (imagenet if imagenet.is_dir() else None)


def splits_in(folder: Path) -> dict[str, Path]:
    """The folders of splits in a folder, by their kind.

    Names other than train, val and test count where there is a folder to train on and another one.

    Raises:
        UserError: Several folders go by the name of train or val.
    """
    found: dict[str, list[Path]] = {}
    for path in folders_in(folder):
        if kind := kind_of_split(path.name):
            found.setdefault(kind, []).append(path)
    if "train" not in found or len(found) == 1:
        found = {kind: paths for kind, paths in found.items() if folder / kind in paths}
    chosen = {kind: one_of(paths, kind) if kind in SPLITS else paths[0] for kind, paths in found.items()}
    return {kind: path for kind, path in chosen.items() if path}


def one_of(paths: list[Path], name: str) -> Path | None:
    """The only one of some folders that may be meant by a name: those called so, in any case, go first.

    Raises:
        UserError: There are several.
    """
    best = [path for path in paths if path.name.lower() == name] or paths
    if len(best) > 1:
        raise UserError(
            f"{best[0].parent} has {' and '.join(path.name for path in best)}; rename the one to use "
            f"to {name}, and move the other elsewhere"
        )
    return best[0] if best else None


def kind_of_split(name: str) -> str | None:
    """Which kind of split a folder's name says."""
    word = _SET.sub("", name.lower())
    return next((kind for kind, words in KINDS.items() if word in words), None)


def kinds_within(name: str) -> set[str]:
    """The kinds of splits that words of a folder's name say, such as train of seg_train."""
    words = re.split(r"[^a-z]+", name.lower())
    return {kind for kind, usual in KINDS.items() if not {*usual}.isdisjoint(words)}


def holds_image(folder: Path) -> bool:
    return next(walk(folder, LeftOut()), None) is not None


def inside(root: Path, is_meant: Callable[[Path], object]) -> Path:
    """The folder that is meant, where single folders may lie around it; else `root`."""
    folder = root
    for _ in range(_MOST_AROUND):
        if is_meant(folder):
            return folder
        found = folders_in(folder)
        if len(found) != 1:
            break
        (folder,) = found
    return root


@contextmanager
def readable() -> Iterator[None]:
    """Turns what the system refuses into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}; check its permissions") from error


def _has_suffix(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def _leads_to(kind: Callable[[], bool]) -> bool:
    try:
        return kind()
    except OSError as error:  # a link to itself leads nowhere, as one to a missing file does
        if error.errno == errno.ELOOP:
            return False
        raise
