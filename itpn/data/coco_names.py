"""Finding the files that a COCO file names, with other folders, slashes, case or Unicode forms."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path

from itpn.data.folders import LeftOut, readable, some, walk
from itpn.data.source import SUFFIXES
from itpn.outputs import folded


def located(folder: Path, names: Sequence[str]) -> list[tuple[str, str]]:
    """The file of each name, relative to the folder, and its real path, which is empty if it is missing.

    A name that is right stays as it is. Others may differ by case, Unicode form, kind of slash, the folders
    before them and the ending, as long as one file alone is meant, and that file is not another name's.
    """
    there = _real_paths(folder, names)
    missing = [name for name in dict.fromkeys(names) if not there[name]]
    if not missing:
        return [(name, there[name]) for name in names]
    with readable():
        files = [*walk(folder, LeftOut())] if folder.is_dir() else []
    found = {name: file for name, file in _found(missing, files).items() if file}
    reals = _real_paths(folder, [*found.values()])
    wanted = Counter([*filter(None, there.values()), *(reals[file] for file in found.values())])
    around = _key(os.path.realpath(folder))
    for name, file in found.items():
        certain = f"{around}/{_key(file)}".endswith(f"/{_key(name)}")
        if not certain and wanted[reals[file]] > 1:
            found[name] = ""
    return [(found[name], reals[found[name]]) if found.get(name) else (name, there[name]) for name in names]


def held(folder: Path) -> str:
    """A few images of a folder, in words."""
    with readable():
        names = [*islice(walk(folder, LeftOut()), 4)] if folder.is_dir() else []
    return f"that folder has {some(names)}" if names else "that folder has no image"


def _real_paths(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The file of each name, links followed; empty where there is none. Each folder is listed once."""
    split = {name: os.path.split(name) for name in names}
    listed = {parent: _listed(folder / parent) for parent in {parent for parent, _ in split.values()}}
    return {name: listed[parent].get(base, "") for name, (parent, base) in split.items()}


def _listed(folder: Path) -> dict[str, str]:
    try:
        real = os.path.realpath(folder)
        with os.scandir(folder) as entries:
            return {
                entry.name: os.path.realpath(entry.path) if entry.is_symlink() else f"{real}/{entry.name}"
                for entry in entries
                if entry.is_file()
            }
    except (OSError, ValueError):  # it is no folder, or its name can be none
        return {}


def _found(names: Iterable[str], files: Sequence[str]) -> dict[str, str]:
    """The only file that each name may mean; empty where there is none, or several are."""
    found = dict.fromkeys(names, "")
    for key in (_key, _bare):
        by_end = _by_end(files, key)
        for name in [name for name, file in found.items() if not file]:
            found[name] = next((by_end[end] for end in _ends(key(name)) if end in by_end), "")
    return found


def _by_end(files: Iterable[str], key: Callable[[str], str]) -> dict[str, str]:
    """Files by the last parts of their keys; empty where several share these, but for whole keys."""
    ends: dict[str, str] = {}
    wholes: dict[str, str] = {}
    for file in files:
        whole, *others = _ends(key(file))
        wholes[whole] = "" if whole in wholes else file
        for end in (whole, *others):
            ends[end] = "" if end in ends else file
    return ends | wholes


def _ends(key: str) -> list[str]:
    parts = key.split("/")
    return ["/".join(parts[start:]) for start in range(len(parts))]


def _key(name: str) -> str:
    """A name without what systems write differently."""
    return os.path.normpath(folded(name).replace("\\", "/"))


def _bare(name: str) -> str:
    """The same without the ending of an image."""
    base, ending = os.path.splitext(_key(name))
    return base if ending in SUFFIXES else base + ending
