"""Label pictures: a class for every pixel, read as it is stored in a file that keeps numbers exactly."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from itpn.data.limits import JPEG_START, check_coding
from itpn.data.picture import Size, blame, read_file
from itpn.data.storage import depth, stored_as
from itpn.errors import UserError

Labels = NDArray[Any]
"""Class ids [H, W], uint8 or int32; `Labelling.unlabelled` where there is none."""

MAX_CLASSES = (1 << 16) - 1
FORMATS = ("PNG", "TIFF", "BMP", "GIF")
"""Formats that keep every number."""
CONVERT = "store it anew as docs/data.md shows under “Label pictures of other kinds”"

_PNG_START = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
_SPREAD = {2: 85, 4: 17}  # Pillow spreads grey values of few bits over 0..255
_COLOURS = ("RGB", "RGBA", "LA")
_NUMBERS = ("1", "L", "P", "I;16", "I;16B", "I", "F")
_ODD = -1
_FEW = 8
"""Numbers that are no class, from which on smoothed edges are a likely cause."""


@dataclass(frozen=True)
class Labelling:
    """What the numbers in label pictures mean.

    Attributes:
        class_names: By class id.
        first: The number that class 0 is stored as; the others follow.
        ignored: Numbers that mark a pixel without a label.
        values: The number of each class, where they do not follow one another; replaces `first`.
    """

    class_names: tuple[str, ...]
    first: int = 0
    ignored: tuple[int, ...] = (255,)
    values: tuple[int, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if not 1 <= self.num_classes <= MAX_CLASSES:
            raise UserError(f"{self.num_classes:,} classes; there can be 1 to {MAX_CLASSES:,}")

    @property
    def numbers(self) -> Sequence[int]:
        """The number that each class is stored as."""
        return self.values or range(self.first, self.first + self.num_classes)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def unlabelled(self) -> int:
        """The id of a pixel without a label: 255, or 65,535 where that could be a class."""
        return 255 if self.num_classes <= 255 else 65_535

    def ids(self, values: NDArray[Any]) -> Labels:
        """Stored numbers [H, W] to class ids.

        Raises:
            ValueError: a number is neither a class nor ignored.
        """
        ids: NDArray[np.int32] = self._table[values]
        if (odd := ids == _ODD).any():
            raise ValueError(self._told(np.unique(values[odd]).tolist()))
        return ids.astype(np.uint8) if self.num_classes <= 255 else ids

    def _told(self, odd: Sequence[int]) -> str:
        """What is wrong with numbers that mean nothing, and what to do."""
        numbers, none = self.numbers, ", ".join(map(str, sorted(self.ignored)))
        classes = f"{numbers[0]:,} to {numbers[-1]:,}"
        if self.values:
            classes = listed(self.values)
        cure = "name all classes, or give their numbers in order with --data.values"
        if [*odd] == [numbers[-1] + 1] and numbers[0] == 0:
            cure = f"if classes count from 1, give --data.zero-is-no-label; else {cure}"
        if len(odd) > _FEW:
            cure += f"; if edges were smoothed or JPEG was used on the way, {CONVERT}"
        return (
            f"labels {listed(odd)} are no class: those are {classes}"
            + (f", and {none} is no label" if none else "")
            + f"; {cure}"
        )

    @cached_property
    def _table(self) -> NDArray[np.int32]:
        table = np.full(1 << 16, _ODD, np.int32)
        numbers = np.array(self.numbers[: len(table) - self.first])
        table[numbers] = np.arange(len(numbers))
        table[[value for value in self.ignored if value < len(table)]] = self.unlabelled
        return table


def listed(numbers: Sequence[int]) -> str:
    """The first five of some numbers."""
    return ", ".join(f"{number:,}" for number in numbers[:5]) + (", …" if len(numbers) > 5 else "")


def read_labels(path: Path, labelling: Labelling, size: Size | None = None) -> Labels:
    """The class ids of a label picture: a grey PNG, TIFF, BMP or GIF, or one with a palette.

    A palette's colours are not looked at, EXIF and transparent colours neither. Nothing is decoded before the
    header is found to be harmless.

    Args:
        size: what the height and width must be.

    Raises:
        BadImageError: it is no such file, or of another size, or has a number that is no class.
    """
    return read_stored(path, labelling, size).ids


class Stored(NamedTuple):
    """A label picture as its file has it, and as it is understood."""

    numbers: NDArray[Any]
    """What is stored for each pixel, [H, W]."""
    ids: Labels
    palette: bytes
    """Three bytes for each number, where there is a palette."""


def read_stored(path: Path, labelling: Labelling, size: Size | None = None) -> Stored:
    """A label picture with its numbers and its palette; see `read_labels`."""
    data = read_file(path)
    with blame(path), _opened(data) as image:
        palette = bytes(image.getpalette() or ()) if image.mode == "P" else b""
        numbers = _numbers(image, data, size)
        return Stored(numbers, labelling.ids(numbers), palette)


def _numbers(image: Image.Image, data: bytes, size: Size | None) -> NDArray[Any]:
    """The numbers [H, W] in a picture, and `data` in its file."""
    check_coding(image)
    if size is not None and image.size != size[::-1]:
        (height, width), (across, down) = size, image.size
        turned = image.size == size
        cure = (
            "if EXIF turns the image, turn the labels alike, or store the image without EXIF"
            if turned
            else "scale the labels to that size without smoothing"
        )
        raise ValueError(f"{across} x {down} labels for an image of {width} x {height} pixels; {cure}")
    bits = depth(image, data)
    if image.mode in _COLOURS:
        return _grey(image, bits)
    if image.mode not in _NUMBERS:
        raise ValueError(f"a {image.format} of mode {image.mode} holds no labels; {CONVERT}")
    values = np.array(image)
    if image.mode == "L":
        values = values // _SPREAD.get(bits, 1)
    return _whole(values)


def _opened(data: bytes) -> Image.Image:
    """A picture of a format that keeps every number."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        kind = "a JPEG, which changes numbers" if data.startswith(JPEG_START) else "none"
        formats = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise ValueError(f"labels are read from {formats} files, and this is {kind}; {CONVERT}") from error
    if image.format == "PNG" and not data.startswith(_PNG_START):
        raise ValueError("a PNG that does not begin with its header")
    if (stored := stored_as(image)) and stored.white_is_zero:
        raise ValueError(f"a TIFF whose 0 is white has no plain numbers; {CONVERT}")
    return image


def _grey(image: Image.Image, bits: int) -> NDArray[np.uint8]:
    """The numbers of a grey picture that is stored as colours, all opaque."""
    pixels = np.array(image)
    colours = pixels[..., : 3 if pixels.shape[-1] > 2 else 1]
    kind = f"a {image.format} of mode {image.mode} holds"
    if bits > 8:
        raise ValueError(f"{kind} colours of {bits} bits, not labels; {CONVERT}")
    if (colours != colours[..., :1]).any():
        packed = np.unique(colours @ np.array([1 << 16, 1 << 8, 1]))
        some = ", ".join(f"#{colour:06x}" for colour in packed[:5]) + (", …" if len(packed) > 5 else "")
        raise ValueError(f"{kind} colours, not labels: {len(packed):,} of them, {some}; {CONVERT}")
    if image.mode in ("RGBA", "LA") and (pixels[..., -1] < 255).any():
        raise ValueError(f"{kind} colours, not labels: some pixels are transparent; {CONVERT}")
    return colours[..., 0]


def _whole(values: NDArray[Any]) -> NDArray[Any]:
    """Numbers as they can be classes; a 16-bit or floating-point file may hold others."""
    whole = values.astype(np.uint8 if values.dtype.itemsize == 1 else np.uint16, copy=False)
    if whole is not values and not np.array_equal(whole, values):
        raise ValueError(f"numbers that are not whole or not in 0 to 65,535; {CONVERT}")
    return whole


def label_picture(
    labels: Labels, labelling: Labelling, colours: NDArray[np.uint8] | None = None
) -> Image.Image:
    """Class ids [H, W] as a picture that `read_labels` reads back: of 8 bits if that is enough, else of 16.

    Args:
        colours: [classes, 3] for the palette of a picture of 8 bits; what is ignored is black.

    Raises:
        ValueError: pixels have no label, and there is no number for that.
    """
    ids = labels.astype(np.int64)
    missing = ids >= labelling.num_classes
    if missing.any() and not labelling.ignored:
        raise ValueError("pixels have no label, and no number stands for that")
    numbers = np.array(labelling.numbers)
    values = np.where(missing, max(labelling.ignored, default=0), numbers[np.where(missing, 0, ids)])
    if values.max(initial=0) > 255:
        return Image.fromarray(values.astype(np.uint16))
    image = Image.fromarray(values.astype(np.uint8))
    if colours is not None:
        palette = np.zeros((256, 3), np.uint8)
        known = numbers < 256
        palette[numbers[known]] = colours[known]
        palette[[value for value in labelling.ignored if value < 256]] = 0
        image.putpalette(palette.tobytes())
    return image
