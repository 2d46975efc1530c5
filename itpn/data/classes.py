"""The classes of a data set: how many images each has, what to call them, whether two splits agree."""

import re
from collections import Counter
from collections.abc import Collection
from contextlib import suppress

import torch

from itpn.data.folders import kinds_within
from itpn.data.source import Images
from itpn.errors import UserError, printable
from itpn.outputs import folded

UNBALANCED = 5
"""Largest class over smallest from which a hint is due."""

_SYNSET = re.compile(r"n\d{8}")
_NUM_LISTED = 20


def describe_balance(images: Images) -> str:
    """How many classes there are and how large, and a second line if their sizes differ much.

    Raises:
        UserError: the images have no classes.
    """
    names = [*map(printable, readable(class_names_of(images)))]
    assert images.labels is not None
    counts = torch.bincount(images.labels, minlength=len(names))
    order = counts.argsort(stable=True).tolist()
    shown = order[0], order[(len(order) - 1) // 2], order[-1]
    few, middle, many = ((names[i], int(counts[i])) for i in shown)
    line = (
        f"{len(names):,} classes: smallest {few[0]} ({few[1]:,} images), median {middle[0]} ({middle[1]:,}), "
        f"largest {many[0]} ({many[1]:,})"
    )
    if many[1] <= UNBALANCED * few[1]:
        return line
    found = (
        f"{many[0]} has {many[1] / few[1]:.1f} times the images of {few[0]}"
        if few[1]
        else f"{few[0]} has none"
    )
    return f"{line}\n{found}: look at the accuracy of each class, not at top-1 alone"


def readable(class_names: tuple[str, ...]) -> tuple[str, ...]:
    """Names in words for ImageNet's synsets, such as tench for n01440764; others as they are.

    Where two classes would be called the same, the synset follows: crane (n03126707).
    """
    if not any(map(_SYNSET.fullmatch, class_names)):
        return class_names
    from timm.data.imagenet_info import ImageNetInfo  # seconds to import, for those who have such folders

    info = ImageNetInfo()

    def word_for(name: str) -> str:
        with suppress(KeyError):
            return str(info.label_name_to_description(name)).split(",")[0]
        return name

    words = list(map(word_for, class_names))
    count = Counter(words)
    return tuple(
        word if word == name or count[word] == 1 else f"{word} ({name})"
        for name, word in zip(class_names, words, strict=True)
    )


def names_for(class_names: tuple[str, ...] | None, num_classes: int) -> tuple[str, ...]:
    """What to call a model's classes, in words. A thousand without names are ImageNet's, in its order."""
    if class_names is not None:
        return readable(class_names)
    if num_classes != 1000:
        return tuple(f"class {label}" for label in range(num_classes))
    from timm.data.imagenet_info import ImageNetInfo  # seconds to import, as above

    info = ImageNetInfo()
    return readable(tuple(info.index_to_label_name(label) for label in range(num_classes)))


def class_names_of(images: Images) -> tuple[str, ...]:
    """What the classes are called.

    Raises:
        UserError: the images have no classes, or their classes are splits.
    """
    names = images.class_names
    if names is None:
        cure = images.unlabelled or "put each image in a folder of its class"
        raise UserError(f"classes are needed, but found {images.description}; {cure}")
    like_splits = [name for name in names if kinds_within(name)]
    kinds = {kind for name in like_splits for kind in kinds_within(name)}
    if "val" in names or (len(kinds) > 1 and 2 * len(like_splits) > len(names)):
        raise UserError(
            f"{images.description}, which look like splits and not like classes: {_listed(like_splits)}; "
            "name the folder of training classes train, that of validation classes val, and move the others "
            "elsewhere; rename a class that is called so"
        )
    return names


def check_same_classes(train: Images, val: Images) -> tuple[str, ...]:
    """The names of the classes, by class id, once the two splits agree on them.

    Raises:
        UserError: one has no classes, or other ones, which are listed, or the same in another order; or all
            images to evaluate on are of one class.
    """
    ours, theirs = class_names_of(train), class_names_of(val)
    if ours == theirs:
        assert val.labels is not None
        if (val.labels == val.labels[0]).all():
            raise UserError(
                f"{val.description}: all are of one class, {theirs[int(val.labels[0])]!r}, so accuracy "
                "says nothing; add images of other classes"
            )
        return ours
    if set(ours) == set(theirs):
        raise UserError(
            "train and val have the same classes in another order, so their class ids differ; give the "
            "shards of both the same ids and classes.txt"
        )
    lacking, other = set(ours) - set(theirs), {folded(name): name for name in set(theirs) - set(ours)}
    alike = [f"{name} and {other[folded(name)]}" for name in lacking if folded(name) in other]
    told = f"; these differ only in case or Unicode form: {_listed(alike)}" if alike else ""
    raise UserError(
        "train and val need the same classes: rename the folders alike, add images of missing classes, or "
        "remove those classes; "
        f"only in train: {_listed(lacking)}; only in val: {_listed(other.values())}{told}"
    )


def _listed(names: Collection[str]) -> str:
    shown = sorted(names)[:_NUM_LISTED]
    more = [f"and {len(names) - len(shown):,} more"] if len(names) > len(shown) else []
    return ", ".join([*map(printable, shown), *more]) or "none"
