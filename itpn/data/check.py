"""A data set looked through before training: which images cannot be read, and what the others are like."""

import io
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from itpn.data.crashproof import Death, each
from itpn.data.picture import FORMATS, BadImageError, open_bytes, orientation
from itpn.data.source import Images


class LabelLook(NamedTuple):
    """What the labels of an image's pixels are like."""

    classes: NDArray[np.int64]
    """Ids of the classes that occur."""
    pixels: NDArray[np.int64]
    """How many pixels each of them has."""
    num_unlabelled: int
    """How many have no label."""
    ignored: tuple[int, ...] = ()
    """The numbers that are stored for these."""
    colours: dict[int, bytes] = {}  # noqa: RUF012 - a named tuple's default, never changed
    """Red, green and blue of each number, where the picture has a palette."""
    turned: bool | None = None
    """Of an image that EXIF turns: whether the size tells that the labels are turned, too."""


class Look(NamedTuple):
    """What a readable image is like."""

    width: int
    height: int
    format: str
    traits: tuple[str, ...]
    digest: int
    """64 bits that identical files share, and no others."""
    labels: LabelLook | None = None


class Size(NamedTuple):
    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width:,} x {self.height:,}"


NUM_SAMPLED = 64
"""How many images are looked at before training."""


class Tally:
    """What is known of the images of one split so far."""

    def __init__(self, images: Images) -> None:
        self.images = images
        self.unpaired: tuple[BadImageError, ...] = ()
        """Files that were left out for want of another that belongs to them."""
        self.bad: dict[int, str] = {}
        """Why an image cannot be read, by index."""
        self.formats: Counter[str] = Counter()
        self.traits: Counter[str] = Counter()
        self.look: Callable[[int], Look | str] = partial(look, images)
        """From an image's index to what it is like, or why it cannot be used. Picklable."""
        self._sizes, self._digests = array("I"), array("Q")

    def add(self, index: int, found: Look | str) -> None:
        if isinstance(found, str):
            self.bad[index] = found
            return
        self.formats[found.format] += 1
        self.traits.update(found.traits)
        self._sizes.extend((found.width, found.height))
        self._digests.append(found.digest)

    def check(self, num_workers: int) -> Iterator[tuple[int, Look | str]]:
        """Looks at every image; the results are for `add`."""
        return look_at_all(self.look, len(self.images), num_workers)

    def warnings(self) -> Iterator[str]:
        """What would go wrong without a word, a line each: the cause, numbers, an example and a cure."""
        yield from self.images.notes

    @property
    def num_read(self) -> int:
        return len(self._digests)

    @property
    def digests(self) -> NDArray[np.uint64]:
        return np.array(self._digests, np.uint64)

    def sizes(self) -> list[Size]:
        """The smallest, the median and the largest by area; empty where no image could be read."""
        sizes = self._all_sizes()
        by_area = np.argsort(sizes.prod(1), kind="stable")
        return [Size(*sizes[by_area[rank]].tolist()) for rank in (0, len(sizes) // 2, -1) if len(sizes)]

    def num_smaller(self, size: int) -> int:
        """Images that training at `size` pixels has to enlarge."""
        return int((self._all_sizes().min(1, initial=1 << 32) < size).sum())

    def class_counts(self) -> list[tuple[int, str]]:
        """Images per class with the bad ones, fewest first; empty where there are no classes."""
        labels, names = self.images.labels, self.images.class_names
        if labels is None or names is None:
            return []
        return sorted(zip(torch.bincount(labels, minlength=len(names)).tolist(), names, strict=True))

    def _all_sizes(self) -> NDArray[np.int64]:
        return np.array(self._sizes, np.int64).reshape(-1, 2)


def sampled(tally: Tally) -> Tally:
    """Fills a tally from a few images, spread evenly over the data set."""
    num_images = len(tally.images)
    for index in torch.linspace(0, num_images - 1, min(NUM_SAMPLED, num_images)).long().tolist():
        tally.add(index, tally.look(index))
    return tally


def look_at_all(
    look: Callable[[int], Look | str], num_images: int, num_workers: int
) -> Iterator[tuple[int, Look | str]]:
    """Decodes every image in full, in the order in which that is done.

    Args:
        look: from an image's index to what it is like, or why it cannot be read. Picklable.

    Yields:
        Its index, and what `look` says.
    """
    for index, found in each(look, num_images, num_workers):
        yield index, str(found) if isinstance(found, Death) else found


def look(images: Images, index: int) -> Look | str:
    try:
        data = images.read(index)
        with open_bytes(data, images.name(index)) as picture:
            width, height = picture.decode().size
            images.check_size(index, (height, width))
    except BadImageError as error:
        return error.reason
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        kind = image.format or ""
        traits = [*_traits(image)]
    named = Image.registered_extensions().get(os.path.splitext(images.names[index])[1].lower())
    if named not in (None, kind.replace("MPO", "JPEG")):  # a JPEG with more pictures behind it
        traits.append("named as another format")
    digest = int.from_bytes(blake2b(data, digest_size=8).digest())
    return Look(width, height, kind, tuple(traits), digest)


def _traits(image: Image.Image) -> Iterator[str]:
    """What may surprise about an image, as far as its header tells."""
    if image.mode in ("1", "L", "LA") or image.mode.startswith("I"):
        yield "grey"
    if image.mode.startswith("I"):
        yield "of 16 bits or more"
    if image.mode == "P":
        yield "with a palette"
    if image.mode == "CMYK":
        yield "CMYK"
    if image.has_transparency_data:
        yield "with transparency"
    turn = orientation(image)
    if turn in range(2, 9):
        yield "turned by EXIF"
    try:
        if getattr(image, "is_animated", False):
            yield "of several frames or pages"
        odd = turn is None
    except Exception:  # the reader does without further frames and broken EXIF, and so do we
        odd = True
    if odd:
        yield "with broken EXIF or further frames"
