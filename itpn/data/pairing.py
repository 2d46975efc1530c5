"""Pairs images with label pictures: where a data set keeps both, and which belong together by their names."""

import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from itpn.data.folders import KINDS, SPLITS, Split, folders_in, holds_image, inside, one_of
from itpn.data.source import SUFFIXES
from itpn.outputs import folded

IMAGES = ("images", "image", "imgs", "img", "jpegimages")
LABELS = ("labels", "label", "masks", "mask", "annotations", "annotation", "segmentationclass", "gt")
"""What folders of images and of label pictures are called, in any case; the first name goes before others."""


def root_of(folder: Path) -> Path:
    """The folder that has the folders of images or of splits, where single ones may lie around it."""
    return inside(folder, lambda place: any(_child(place, names) for names in (IMAGES, *KINDS.values())))


def folders_of(root: Path, split: Split) -> tuple[Path, Path]:
    """The folders of a split's images and label pictures; where they should be, if there are none.

    They are ROOT/images/SPLIT and ROOT/labels/SPLIT, or ROOT/SPLIT/images and ROOT/SPLIT/labels. Without any
    folder of a split, ROOT/images and ROOT/labels are to train on.

    Raises:
        UserError: Several folders go by a usual name.
    """
    root = root_of(root)
    usual = root / "images" / split, root / "labels" / split
    images, labels = _child(root, IMAGES), _child(root, LABELS)
    if images and labels:
        if not any(_child(images, KINDS[name]) for name in SPLITS):
            return (images, labels) if split == "train" else usual
        return _child(images, KINDS[split]) or images / split, _child(labels, KINDS[split]) or labels / split
    if images or not (folder := _child(root, KINDS[split])):
        return usual
    return _child(folder, IMAGES) or folder / "images", _child(folder, LABELS) or folder / "labels"


def _child(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The folder of one of these names, in any case; the first name goes before all others.

    Of several only those that hold an image are meant: VOC has Annotations beside SegmentationClass.
    """
    found = [path for path in folders_in(folder) if path.name.lower() in names]
    if len(found) > 1:
        found = list(filter(holds_image, found)) or found
    return one_of(found, names[0])


def partners(images: Collection[str], labels: Collection[str]) -> dict[str, str]:
    """The label picture of each image, both named by their paths without the ending.

    Names are equal, or equal but for case, Unicode form and an image's ending that a label's name kept. If
    none are, words are left out that all images or all label pictures begin or end with, such as `_mask`.
    """
    found = {name: name for name in images if name in labels}
    rest, left = (_folded(name for name in side if name not in found) for side in (images, labels))
    found |= _matched(rest, left)
    if not found:
        rest, left = _cores(rest), _cores(left)
        matched = _matched(rest, left)
        found = matched if len(matched) in (len(rest), len(left)) else {}
    return found


def _folded(names: Iterable[str]) -> dict[str, str]:
    """Names as they compare where case, Unicode form and an inner ending do not matter."""
    return {name: _bare(folded(name)) for name in names}


def _bare(key: str) -> str:
    base, ending = os.path.splitext(key)
    return base if ending in SUFFIXES else key


def _cores(keys: Mapping[str, str]) -> dict[str, str]:
    """Keys without the words that all of them begin and end with, numbers excepted."""
    if len(keys) < 2:
        return {**keys}
    start = _words([*keys.values()])
    end = _words([key[::-1] for key in keys.values()])
    return {name: key[start : len(key) - end] for name, key in keys.items()}


def _words(keys: list[str]) -> int:
    """How many characters the words have that all keys begin with."""
    shared = os.path.commonprefix(keys)  # noqa: RUF071 - these are no folders: characters are compared
    words = re.match(r".*[-_. /]", shared)
    return len(words[0]) if words and any(map(str.isalpha, words[0])) else 0


def _matched(images: Mapping[str, str], labels: Mapping[str, str]) -> dict[str, str]:
    """Names of the same key, which no other has."""
    ours, theirs = _unique(images), _unique(labels)
    return {ours[key]: theirs[key] for key in ours.keys() & theirs.keys()}


def _unique(keys: Mapping[str, str]) -> dict[str, str]:
    """The name of each key that is of one name alone."""
    counts = Counter(keys.values())
    return {key: name for name, key in keys.items() if counts[key] == 1}
