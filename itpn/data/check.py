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
from itpn.data.storage import depth, stored_as


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
    """Whether the size of an image that EXIF turns tells that its labels are turned, too."""


class Look(NamedTuple):
    """What a readable image is like."""

    width: int
    height: int
    format: str
    traits: tuple[str, ...]
    digest: int
    """64 bits that identical files share, and no others."""
    values: tuple[int, int]
    """The smallest and the largest of 0..255; of more than 8 bits without a hundredth at either end."""
    labels: LabelLook | None = None


class Size(NamedTuple):
    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width:,} x {self.height:,}"


FEW_VALUES = 64
"""An image whose values span less than this, of 255, uses a small part of the range."""
NARROW, NARROW_DEEP = "of few values", "of more than 8 bits and few values"
MORE_BANDS = "with further bands, which are left out"
CLEAR = "transparent everywhere"
ODD_ALPHA = "with an alpha channel that is neither 0 nor 255 in most places"
_CURES = {
    NARROW: "night or fog may look so, and so do masks and wrongly scaled data; scale their values to 0..255",
    NARROW_DEEP: "12-bit data look so; scale all files alike, from the lowest to the highest value in use, "
    "as with GDAL: gdal_translate -ot Byte -scale 0 4095 0 255 IN OUT.tif",
    MORE_BANDS: "the first are taken for red, green and blue, or the first one for grey; choose yours, as "
    "with GDAL: gdal_translate -b 1 -b 2 -b 3 IN OUT.tif, or -b 1 alone",
    ODD_ALPHA: "infrared stored as alpha looks so, and the image fades into white by it; drop it, as with "
    "GDAL: gdal_translate -b 1 -b 2 -b 3 IN OUT.tif",
    CLEAR: "alpha that was never set looks so, and the image is white by it; drop it, as with ImageMagick: "
    "magick IN -alpha off OUT.png",
}
"""Meanings of traits that spoil images without a word, and what to do."""
_SHARE = 0.5
"""A trait of images that may well be meant so is warned of from this share on."""

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
        self.first: dict[str, int] = {}
        """The first image of each trait."""
        self.values: dict[str, tuple[int, int]] = {}
        """The smallest and the largest value of the images of each trait."""
        self.look: Callable[[int], Look | str] = partial(look, images)
        """From an image's index to what it is like, or why it cannot be used. Picklable."""
        self._sizes, self._digests = array("I"), array("Q")

    def add(self, index: int, found: Look | str) -> None:
        if isinstance(found, str):
            self.bad[index] = found
            return
        self.formats[found.format] += 1
        for trait in found.traits:
            self.traits[trait] += 1
            self.first.setdefault(trait, index)
            low, high = self.values.get(trait, found.values)
            self.values[trait] = min(low, found.values[0]), max(high, found.values[1])
        self._sizes.extend((found.width, found.height))
        self._digests.append(found.digest)

    def check(self, num_workers: int) -> Iterator[tuple[int, Look | str]]:
        """Looks at every image; the results are for `add`."""
        return look_at_all(self.look, len(self.images), num_workers)

    def warnings(self) -> Iterator[str]:
        """Silent faults, a line each: the cause, numbers, an example and a cure."""
        yield from self.images.notes
        for trait, cure in _CURES.items():
            count = self.traits[trait]
            if count and (trait != NARROW or count > _SHARE * self.num_read):
                low, high = self.values[trait]
                values = f" ({low} to {high} of 255)" if trait in (NARROW, NARROW_DEEP) else ""
                name = self.images.names[self.first[trait]]
                yield f"{count:,} of {self.num_read:,} images are {trait}{values}, such as {name}: {cure}"
        yield from self._lost_classes()

    def _lost_classes(self) -> Iterator[str]:
        """A line for each class of which no image can be read."""
        labels = self.images.labels
        if labels is None or not self.bad:
            return
        names = self.images.class_names or ()
        counts, bad = (torch.bincount(some, minlength=len(names)) for some in (labels, labels[[*self.bad]]))
        for label in ((counts == bad) & (bad > 0)).nonzero().flatten().tolist():
            all_of = f"no image of class {names[label]} can be read, of {counts[label]:,}"
            yield f"{all_of}; replace them, or remove the class"

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
            pixels = picture.decode()
            width, height = pixels.size
            images.check_size(index, (height, width))
    except BadImageError as error:
        return error.reason
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        kind, deep = image.format or "", depth(image, data) > 8
        traits = [*_traits(image, deep)]
    values = _values(pixels, 0.01 if deep else 0)
    if values[1] - values[0] < FEW_VALUES and (values[1] > values[0] or not values[1]):
        traits.append(NARROW_DEEP if deep else NARROW)
    named = Image.registered_extensions().get(os.path.splitext(images.names[index])[1].lower())
    if named not in (None, kind.replace("MPO", "JPEG")):  # a JPEG with more pictures behind it
        traits.append("named as another format")
    digest = int.from_bytes(blake2b(data, digest_size=8).digest())
    return Look(width, height, kind, tuple(traits), digest, values)


def _values(image: Image.Image, share: float) -> tuple[int, int]:
    """The smallest and the largest value of an 8-bit image, without a share of its pixels at either end."""
    counts = np.array(image.histogram()).reshape(-1, 256).sum(0).cumsum()
    low, high = np.searchsorted(counts, [share * counts[-1] + 1, (1 - share) * counts[-1]])
    return int(low), int(high)


def _traits_of_alpha(alpha: Image.Image) -> Iterator[str]:
    counts = alpha.histogram()
    if counts[0] == sum(counts):
        yield CLEAR
    if 2 * (counts[0] + counts[255]) < sum(counts):
        yield ODD_ALPHA


def _traits(image: Image.Image, deep: bool) -> Iterator[str]:
    """What may surprise about an image, as far as its header tells."""
    if image.mode in ("1", "L", "LA") or image.mode.startswith("I"):
        yield "grey"
    if deep:
        yield "of more than 8 bits"
    if stored := stored_as(image):
        if stored.signed:
            yield "of signed numbers"
        if stored.white_is_zero:
            yield "with 0 as white"
        if stored.bands > len(image.getbands()):
            yield MORE_BANDS
    if image.mode == "P":
        yield "with a palette"
    if image.mode == "CMYK":
        yield "CMYK"
    if image.has_transparency_data:
        yield "with transparency"
    if image.mode in ("RGBA", "LA"):
        yield from _traits_of_alpha(image.getchannel("A"))
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
