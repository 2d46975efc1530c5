"""What is odd about how the images of a data set lie, in words that end in a cure."""

import os
from collections.abc import Collection, Sequence
from pathlib import Path

from itpn.data.folders import folders_in, holds_image, some, splits_in
from itpn.errors import printable


def beside(folder: Path) -> tuple[str, str]:
    """What to say of the folders beside the one to train on: in the description, and as a note."""
    splits = splits_in(folder.parent)
    other = [path for path in folders_in(folder.parent) if path not in splits.values() and holds_image(path)]
    names = some([path.name for path in other])
    unused = splits.get("test") if "val" not in splits else None
    clause = f"; {printable(unused.name)} is not used: name it val to validate on it" if unused else ""
    if not other:
        return clause, ""
    if len(splits) > 1:
        return f"{clause}; {names} beside it not taken", ""
    return clause, (
        f"only {folder} is trained on, and not {len(other):,} folders of images beside it: {names}; if "
        f"{folder.name} is a class as they are, give that folder another name; if they are to be trained on, "
        f"move them into {folder}"
    )


def whole(root: Path) -> str:
    """A note where a root without a folder to train on has one to validate on."""
    if "val" not in (splits := splits_in(root)):
        return ""
    return (
        f"{root} has no folder to train on, so all of it is taken, {splits['val'].name} too; move what is to "
        f"be trained on into {root / 'train'}"
    )


def same_inside(folder: Path, parents: Sequence[Sequence[str]]) -> str:
    """A note where each class has the same folders: then these may be the classes, and the others splits."""
    inside: dict[str, set[str]] = {}
    for parts in parents:
        inside.setdefault(parts[0], set()).add(parts[1] if len(parts) > 1 else "")
    first, *others = inside.values()
    if "" in first or len(first) < 2 or any(names != first for names in others):
        return ""
    outer, inner = sorted(inside)[0], sorted(first)
    return (
        f"each of the {len(inside):,} class folders under {folder} has the same folders in it, "
        f"{some(inner)}; if these are the classes and the others splits, name those train and "
        f"val; or put the classes above the others, as {inner[0]}/{outer}"
    )


def without_image(folder: Path, known: Collection[str]) -> str:
    """A note of folders beside the class folders, those that are known, which hold no image."""
    empty = [path.name for path in folders_in(folder) if path.name not in known]
    if not empty:
        return ""
    return f"no classes, for want of images: {some(empty)} under {folder}; add images, or remove such folders"


def why_unlabelled(folder: Path, names: list[str], parents: Sequence[Sequence[str]]) -> str:
    """Why images have no classes, and what to do."""
    stray = [name for name, parts in zip(names, parents, strict=True) if not parts]
    if len(stray) < len(names):
        others = sorted({parts[0] for parts in parents if parts})
        return (
            f"beside the class folders {some(others)} lie {len(stray):,} of {len(names):,} images, such as "
            f"{stray[0]}: move each into the folder of its class, or elsewhere"
        )
    inside = os.path.dirname(names[0])
    if not inside:
        return f"all lie in {folder} itself: make a folder there for each class, and move each image into one"
    return (
        f"all lie in one folder, {folder / inside}, which would be the only class: add a folder for each "
        "other class beside it, or, if it is none, make one in it for each class"
    )
