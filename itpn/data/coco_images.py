"""The images that a COCO file lists: each file is one, however often and however it is named."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from itpn.data.coco_entries import Entry, Frame, Id, fields_of, ident, text, whole
from itpn.data.coco_names import held, located
from itpn.data.picture import BadImageError, Size, open_picture
from itpn.errors import UserError

MAX_SIDE = 1 << 31
"""Of an image, in pixels."""


class Listed(NamedTuple):
    """An entry of `images`."""

    place: int
    id: Id
    name: str
    fields: Entry


@dataclass
class Frames:
    """The images of a file, in its order.

    Attributes:
        by_id: By their ids, and by their names; one of several ids occurs several times.
        each: Every image once.
        ids: The first id of each.
        notes: What is odd about them.
    """

    by_id: dict[Id, Frame] = field(default_factory=dict)
    each: list[Frame] = field(default_factory=list)
    ids: list[Id] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def frames_in(file: Path, entries: Sequence[object], folder: Path) -> Frames:
    """The images of a file in a folder.

    Raises:
        UserError: An entry is wrong, or none of the images is in the folder.
    """
    listed = _listed(file, entries)
    found = located(folder, [entry.name for entry in listed])
    if not any(real for _, real in found):
        raise UserError(
            f"none of the {len(listed):,} images of {file} is in {folder}, such as {listed[0].name}; "
            f"{held(folder)}; name the folder that the images are in, or one around it"
        )
    frames, by_file, twice, missing = Frames(), dict[str, Frame](), [], []
    for entry, (name, real) in zip(listed, found, strict=True):
        key = real or os.path.normpath(name)
        first = by_file.get(key)
        size = _size(file, entry, folder / name, first)
        if first is None:
            first = by_file[key] = Frame(len(frames.each), name, size)
            frames.each.append(first)
            frames.ids.append(entry.id)
            missing += [] if real else [name]
        else:
            twice.append(name)
        frames.by_id[entry.id] = first
    for entry in listed:  # which some annotations name by its file
        frames.by_id.setdefault(entry.name, frames.by_id[entry.id])
    frames.notes = [*_notes(folder, len(frames.each), twice, missing)]
    return frames


def _listed(file: Path, entries: Sequence[object]) -> list[Listed]:
    """The entries, without exact copies."""
    names: dict[Id, str] = {}
    listed = []
    for place, entry in enumerate(entries):
        with naming(file, place, "images"):
            fields = fields_of(entry)
            number, name = ident(fields, "id"), text(fields, "file_name")
            if number in names and names[number] != name:
                raise ValueError(f"id {number} is that of another image, {names[number]}")
        if number not in names:
            listed.append(Listed(place, number, name, fields))
        names[number] = name
    if not listed:
        raise UserError(f"{file} has no images; name another file")
    return listed


def _size(file: Path, entry: Listed, path: Path, first: Frame | None) -> Size:
    """Height and width as the entry says; those of the file where it says nothing, or -1.

    Args:
        first: the same image, where it is listed before.
    """
    with naming(file, entry.place, "images"):
        if all(entry.fields.get(side) in (None, 0, -1) for side in ("height", "width")):
            return first.size if first else _size_of(path)
        size = whole(entry.fields, "height", 1, MAX_SIDE), whole(entry.fields, "width", 1, MAX_SIDE)
        if first and first.size != size:
            raise ValueError(f"{entry.name} is listed before, with another height or width")
    return size


def _size_of(path: Path) -> Size:
    try:
        with open_picture(path) as picture:
            width, height = picture.size
    except BadImageError as error:
        raise ValueError(f"no height and width, and {error}") from error
    return height, width


def _notes(folder: Path, num: int, twice: Sequence[str], missing: Sequence[str]) -> Iterator[str]:
    if twice:
        yield (
            f"{len(twice):,} entries of 'images' name a file that an earlier one names, such as {twice[0]}: "
            "they are taken for one image with the objects of all; list each file once"
        )
    if missing:
        yield (
            f"{len(missing):,} of {num:,} images are not in {folder}, such as {missing[0]}; add them, or "
            "remove their entries"
        )


@contextmanager
def naming(file: Path, place: int, name: str) -> Iterator[None]:
    """Turns what is wrong with an entry of a list into a UserError."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{file}: entry {place} of {name!r}: {error}; correct it") from error
