"""Images with objects: what COCO's `instances_*.json` says, in arrays that worker processes share."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from itpn.data.images import ImageList
from itpn.data.masks import Outline, unpacked
from itpn.data.picture import BadImageError, Picture, Size
from itpn.data.source import Blobs, Names
from itpn.errors import UserError

Array = NDArray[Any]
OTHER_SIZE = "but its annotations are for"
"""In the reason why an image of another size than its annotations cannot be used."""


class Category(NamedTuple):
    id: int
    name: str


class Finding(NamedTuple):
    """Something odd about an annotation."""

    place: int
    """Among the annotations of the file, from 0."""
    annotation: str
    """Its id; empty if it has none."""
    image: str
    """Its image's file; empty if it has none."""
    reason: str
    """Begins with the field."""
    left_out: bool

    @property
    def where(self) -> str:
        name = f"annotation {self.annotation}" if self.annotation else f"entry {self.place} of 'annotations'"
        return f"{name} ({self.image})" if self.image else name


@dataclass(frozen=True, kw_only=True, eq=False)
class Objects:
    """The objects of all images, image after image.

    Attributes:
        first: Where each image's objects begin, and where the last one's end, int64 [images + 1].
        ids: Of the annotations, int64 [n].
        labels: Classes in the order of their ids, from 0, int64 [n].
        boxes: x, y, width, height in pixels, as they are in the file, float64 [n, 4].
        areas: Of the masks in pixels, float64 [n].
        crowd: True where one annotation stands for many objects, bool [n].
        masks: See `itpn.data.masks.packed`; empty where there is none.
    """

    first: Array
    ids: Array
    labels: Array
    boxes: Array
    areas: Array
    crowd: Array
    masks: Blobs

    def __len__(self) -> int:
        return len(self.ids)

    def of(self, image: int) -> range:
        """The objects of an image."""
        return range(self.first[image], self.first[image + 1])

    def counts(self) -> Array:
        """Objects per image that are no crowds, [images]."""
        return np.diff(np.concatenate([[0], (~self.crowd).cumsum()])[self.first])

    def outline(self, number: int) -> Outline | None:
        return unpacked(self.masks.blob(number))

    def of_images(self, images: Array) -> "Objects":
        chosen = np.concatenate([np.empty(0, np.int64), *(np.array(self.of(i), np.int64) for i in images)])
        return Objects(
            first=np.concatenate([[0], np.diff(self.first)[images].cumsum()]),
            ids=self.ids[chosen],
            labels=self.labels[chosen],
            boxes=self.boxes[chosen],
            areas=self.areas[chosen],
            crowd=self.crowd[chosen],
            masks=Blobs([self.masks.blob(number) for number in chosen]),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Coco(ImageList):
    """Images that are files of their own, and the objects in them.

    Attributes:
        file: The annotations.
        image_ids: int64 [n].
        sizes: Height and width as the annotations say, int64 [n, 2].
        categories: By label.
        objects: All that are used.
        num_annotations: In the file, with those left out.
        findings: What is odd about annotations, in the order of the file.
    """

    file: Path
    image_ids: Array
    sizes: Array
    categories: tuple[Category, ...]
    objects: Objects
    num_annotations: int
    findings: tuple[Finding, ...]

    @property
    def has_masks(self) -> bool:
        """Whether any object has one."""
        return len(self.objects.masks.characters) > 0

    def size(self, index: int) -> Size:
        height, width = self.sizes[index].tolist()
        return height, width

    @contextmanager
    def open(self, index: int) -> Iterator[Picture]:
        with super().open(index) as picture:
            self.check_size(index, picture.size[::-1])
            yield picture

    def check_size(self, index: int, size: Size) -> None:
        stated = self.size(index)
        if size != stated:
            turned = "; was it turned after it was annotated?" if size == stated[::-1] else ""
            raise BadImageError(
                self.name(index),
                f"{size[1]:,} x {size[0]:,} pixels, {OTHER_SIZE} {stated[1]:,} x {stated[0]:,}" + turned,
            )

    def of_images(self, images: Array, what: str) -> "Coco":
        """Some of the images in the given order, with their objects; `what` describes them."""
        return replace(
            self,
            names=Names([self.names[index] for index in images]),
            description=f"{len(images):,} {what}",
            image_ids=self.image_ids[images],
            sizes=self.sizes[images],
            objects=self.objects.of_images(images),
        )

    def of_one_class(self) -> "Coco":
        """The same with every object of one class, "object"."""
        objects = replace(self.objects, labels=np.zeros_like(self.objects.labels))
        return replace(self, categories=(Category(1, "object"),), objects=objects)

    def with_objects(self) -> "Coco":
        """Without the images that have no object to learn from, or crowds only."""
        chosen = np.flatnonzero(self.objects.counts())
        return (
            self
            if len(chosen) == len(self)
            else self.of_images(chosen, f"images with objects, of {self.description}")
        )

    @property
    def fingerprint(self) -> str:
        digest = sha256(super().fingerprint.encode())
        digest.update(repr(self.categories).encode())
        objects = self.objects
        for array in (self.sizes, objects.first, objects.labels, objects.boxes, objects.crowd):
            digest.update(np.ascontiguousarray(array).tobytes())
        digest.update(objects.masks.characters.tobytes())
        return digest.hexdigest()


def check_categories(train: Coco, val: Coco) -> None:
    """Raises UserError unless the two splits have the same classes."""
    ours, theirs = set(train.categories), set(val.categories)
    if ours != theirs:
        raise UserError(
            f"{train.file} and {val.file} need the same categories; "
            f"only in the first: {_some(ours - theirs)}; only in the second: {_some(theirs - ours)}"
        )


def _some(categories: set[Category]) -> str:
    shown: Sequence[Category] = sorted(categories)[:5]
    listed = ", ".join(f"{name} ({number})" for number, name in shown)
    return (listed or "none") + (", …" if len(categories) > 5 else "")
