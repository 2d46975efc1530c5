"""Files that commands write: none of them takes the place of a file that itpn did not write itself.

A folder that is written to lists its outputs in `.itpn-outputs`, in sha256sum's format. A file is an output
while it has a hash that it is listed with. Outputs may be replaced, and are never read as images.
"""

import hashlib
import os
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from errno import EACCES, ENOTDIR
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TextIO

from itpn.errors import UserError

MANIFEST = ".itpn-outputs"
RUN_FILES = (
    *("config.json", "run.json", "metrics.jsonl", "speed.jsonl", "bad_images.jsonl", "report.json"),
    *("pretrained.safetensors", "best.safetensors", "last.safetensors"),
    *("checkpoints", "pictures", "replay", "tensorboard"),
)
"""What a training run writes in its directory, besides its lock."""
LONGEST = 200
"""Bytes of a name that is made from an input's: a number, an ending and 55 bytes fit behind it."""


def claim(*wanted: tuple[str, Path | None]) -> None:
    """Makes sure, before the work, that files can be written and make room for nobody's.

    Args:
        wanted: options and the files that they name; None is none.

    Raises:
        UserError: two are one file; or one is a folder, lies where nothing can be written, or is no output.
    """
    claimed: dict[str, Path] = {}
    for option, path in wanted:
        if path is None:
            continue
        with _told(option, path):
            _check(option, path)
            folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
            reason = ENOTDIR if not folder.is_dir() else EACCES if not os.access(folder, os.W_OK) else 0
            if reason and not _is_stream(path):
                raise OSError(reason, os.strerror(reason))
        place = folded(os.path.join(os.path.realpath(path.parent), path.name))
        if place in claimed:
            raise UserError(f"{claimed[place]} and {path} would be one file: give {option} another")
        claimed[place] = path


@contextmanager
def writing(path: Path, option: str = "--out") -> Iterator[Path]:
    """A place for a file, from which it is moved to `path` once the block has written it.

    Raises:
        UserError: as for `claim`.
    """
    with _told(option, path):
        if _is_stream(path):
            yield path
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".itpn-", dir=path.parent) as folder:
            beside = Path(folder, path.name)
            yield beside
            _check(option, path)  # a file may have come there while the block worked
            _list(beside, path.parent)
            beside.replace(path)


@contextmanager
def growing(path: Path, option: str = "--out") -> Iterator[TextIO]:
    """A text file that can be read while it is written, and stays if the block fails."""
    with _told(option, path):
        _check(option, path)
        if is_output(path):
            path.unlink()
        file = path.open("w" if _is_stream(path) else "x", encoding="utf-8")
    try:
        with file:
            yield file
    finally:
        if not _is_stream(path):
            _list(path, path.parent)


@contextmanager
def adding(directory: Path, option: str) -> Iterator[Path]:
    """A folder whose files come to `directory` once the block has written them all. They are no outputs: they
    may be read as images, and take the place of nothing but the same bytes.

    Raises:
        UserError: another file has the name of one of them, or they cannot be written.
    """
    with _told(option, directory):
        directory.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".itpn-", dir=directory) as folder:
            yield Path(folder)
            moves = {path: directory / path.relative_to(folder) for path in sorted(Path(folder).rglob("*"))}
            for path, target in moves.items():
                if os.path.lexists(target) and not _is_alike(path, target):
                    raise UserError(f"{target} is not replaced: move it away, or give another {option}")
            for path, target in moves.items():  # a folder before what is in it
                if path.exists() and not os.path.lexists(target):
                    path.rename(target)


def is_output(path: Path) -> bool:
    """Whether itpn wrote a file, which has not been changed since."""
    return bool(outputs_among(path.parent, [path.name]))


def outputs_among(folder: Path, names: Collection[str]) -> set[str]:
    """The names of files that itpn wrote into a folder, of those given."""
    listed: dict[bytes, set[bytes]] = defaultdict(set)
    for line in _lines(folder):
        listed[line[66:]].add(line[:64])
    paths = {name: folder / name for name in names if _listed_name(name) in listed}
    return {
        name
        for name, path in paths.items()
        if path.is_file() and not path.is_symlink() and _hash(path) in listed[_listed_name(name)]
    }


def is_run(folder: Path) -> bool:
    """Whether a folder is the directory of a training run."""
    return (folder / "run.json").is_file() and (folder / "checkpoints").is_dir()


def distinct(paths: Iterable[Path]) -> list[str]:
    """A name for an output of each input: its stem, numbered where another has that name.

    Names that differ in case or Unicode form alone are one name to many file systems, and so they are here.
    """
    highest: dict[str, int] = {}
    """The number that was given last, by folded name."""
    names = []
    for path in paths:
        name = stem = _shortened(path.stem)
        while folded(name) in highest:
            highest[folded(stem)] += 1
            name = f"{stem}-{highest[folded(stem)]}"
        highest[folded(name)] = 1
        names.append(name)
    return names


def folded(name: str) -> str:
    """A name as it compares where case and Unicode form do not matter."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


def _check(option: str, path: Path) -> None:
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder; give another {option}")
    if os.path.lexists(path) and not _is_stream(path) and not is_output(path):
        raise UserError(
            f"{path} is not replaced, because itpn did not write it as it is now: move it away, or give "
            f"another {option}"
        )


@contextmanager
def _told(option: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror or error}): make room there, or give another {option}"
        ) from error


def _is_stream(path: Path) -> bool:
    """Whether a path is a pipe or a device, such as /dev/stdout."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _list(file: Path, folder: Path) -> None:
    """Lists a file as the folder's, before it comes there: a kill in between leaves both versions listed."""
    line = _hash(file) + b"  " + _listed_name(file.name)
    lines = _lines(folder)
    if line not in lines:
        with (folder / MANIFEST).open("ab") as manifest:
            manifest.write((b"\n" if lines[-1:] not in ([], [b""]) else b"") + line + b"\n")


def _lines(folder: Path) -> Sequence[bytes]:
    try:
        return (folder / MANIFEST).read_bytes().split(b"\n")
    except OSError:
        return []


def _is_alike(path: Path, other: Path) -> bool:
    """Whether both are folders, or files of the same bytes."""
    return other.is_dir() if path.is_dir() else other.is_file() and _hash(other) == _hash(path)


def _listed_name(name: str) -> bytes:
    return os.fsencode(name).replace(b"\n", b"\\n")


def _hash(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest().encode()


def _shortened(stem: str) -> str:
    data = os.fsencode(stem)
    return stem if len(data) <= LONGEST else data[:LONGEST].decode(errors="ignore")
