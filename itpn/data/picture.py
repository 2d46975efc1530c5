"""Reading one image, whatever is in the file."""

import errno
import io
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from itpn.data.kinds import unreadable
from itpn.data.limits import JPEG_START, MAX_BYTES, MAX_PIXELS, check_coding, check_scans, check_segments
from itpn.data.storage import TO_8_BITS, Storage, is_inverted, stored_as
from itpn.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")

_TO_8_BITS = [(value + 128) // 257 for value in range(1 << 16)]
_ORIENTATION = 0x0112
# Their lack is nobody's file's fault.
_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
# What makes an image of this EXIF orientation upright. ImageOps.exif_transpose also copies upright images and
# rewrites the tags, which fails on broken ones.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# The same as two flips of the raw image, then one across its diagonal.
_MIRRORED = (2, 3, 7, 8)
_UPSIDE_DOWN = (3, 4, 6, 7)
_SIDEWAYS = (5, 6, 7, 8)

Box = tuple[int, int, int, int]
"""Left, top, width, height in pixels."""
Size = tuple[int, int]
"""Height, width in pixels."""


class BadImageError(UserError):
    """A file that cannot be read as an image."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}; replace or remove the file"


class Picture:
    """An open image file of harmless format and size, good for one `decode` or `cut`.

    Attributes:
        size: (width, height) as a viewer shows it, EXIF rotation applied.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        with blame(path):
            self._jpeg = _read_jpeg(file)
            self._image = _open(file)
            check_coding(self._image)
            if self._jpeg is not None:
                check_scans(self._jpeg, *self._image.size)
            else:
                self._image.load()  # Pillow turns a TIFF upright only here
                _check_range(self._image)
            self._inverted = is_inverted(self._image)
            self._orientation = orientation(self._image)
        self._raw_size = self._image.size
        self.size = self._raw_size[::-1] if self._orientation in _SIDEWAYS else self._raw_size

    def decode(self) -> Image.Image:
        """The whole image as upright 8-bit RGB."""
        with blame(self._path):
            return self._upright(_rgb(self._image, self._inverted))

    def cut(self, box: Box, size: Size) -> Tensor:
        """A box of the upright image, bicubic and antialiased, as uint8 [3, H, W].

        A JPEG is decoded at a quarter or an eighth if that leaves the box no smaller than the output.
        """
        with blame(self._path):
            left, top, width, height = self._raw_box(box)
            raw_size = size[::-1] if self._orientation in _SIDEWAYS else size
            factor = self._scale_down(min(height // raw_size[0], width // raw_size[1]))
            right, bottom = left + width, top + height
            x, y = left // factor, top // factor
            part = self._part((x, y, -(-right // factor), -(-bottom // factor)), factor)
        inner = left / factor - x, top / factor - y, right / factor - x, bottom / factor - y
        return self._turned(_resized(part, inner, raw_size)).contiguous()

    def _scale_down(self, most: int) -> int:
        """Has a JPEG decoded at 1 / factor of its size; returns the factor, which is 1 for anything else.

        A half is not worth it: most of the time goes into reading the bits, which all factors need.
        """
        factor = max((power for power in (4, 8) if power <= most), default=1)
        smaller = self._raw_size[0] // factor, self._raw_size[1] // factor
        return 1 if self._image.draft(None, smaller) is None else factor

    def _part(self, corners: tuple[int, int, int, int], factor: int) -> NDArray[np.uint8]:
        """A part of the raw image at 1 / factor, as RGB [h, w, 3]."""
        pixels = self._plain_jpeg(factor)
        if pixels is None:
            return np.array(_rgb(self._image.crop(corners), self._inverted))
        left, top, right, bottom = corners
        return pixels[top:bottom, left:right]

    def _plain_jpeg(self, factor: int) -> NDArray[np.uint8] | None:
        """All of a JPEG at 1 / factor as RGB [H, W, 3], by simplejpeg, which is faster than Pillow.

        None if anything about it is odd: Pillow has the last word on what can be read, and how.
        """
        if self._jpeg is None or self._image.mode not in ("RGB", "L"):
            return None
        width, height = self._image.size
        scale = {"min_width": width, "min_height": height, "min_factor": factor}
        try:
            # It reads the header again, and must not find another size than the one that was checked.
            if simplejpeg.decode_jpeg_header(self._jpeg, **scale)[:2] != (height, width):
                return None
            pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(self._jpeg, **scale)
            return pixels
        except ValueError:
            return None

    def _upright(self, image: Image.Image) -> Image.Image:
        turn = None if self._orientation is None else _TURNS.get(self._orientation)
        return image if turn is None else image.transpose(turn)

    def _turned(self, image: Tensor) -> Tensor:
        flips = [
            axis for axis, turned in ((-1, _MIRRORED), (-2, _UPSIDE_DOWN)) if self._orientation in turned
        ]
        image = image.flip(flips) if flips else image
        return image.mT if self._orientation in _SIDEWAYS else image

    def _raw_box(self, box: Box) -> Box:
        """The box before the image was turned upright."""
        left, top, width, height = box
        if self._orientation in _SIDEWAYS:
            left, top, width, height = top, left, height, width
        if self._orientation in _MIRRORED:
            left = self._raw_size[0] - left - width
        if self._orientation in _UPSIDE_DOWN:
            top = self._raw_size[1] - top - height
        return left, top, width, height


@contextmanager
def open_picture(path: Path) -> Iterator[Picture]:
    """Opens an image file; this and the methods of the picture raise BadImageError."""
    with blame(path):
        file = _opened(path)
    with file:  # what the caller does is not the file's fault
        yield Picture(path, file)


def read_file(path: Path) -> bytes:
    """What an image file holds; BadImageError if it cannot be read or is not of a sane size."""
    with blame(path), _opened(path) as file:
        return file.read()


def _opened(path: Path) -> BinaryIO:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    if status.st_size == 0:
        raise ValueError("the file is empty")
    if status.st_size > MAX_BYTES:
        raise ValueError(f"{status.st_size:,} bytes are more than the limit of {MAX_BYTES:,}")
    return open(path, "rb")


@contextmanager
def open_bytes(data: bytes, name: Path) -> Iterator[Picture]:
    """The same for what a file holds; `name` is what errors call it."""
    if not data:
        raise BadImageError(name, "the file is empty")
    with io.BytesIO(data) as file:
        yield Picture(name, file)


def load_image(path: Path) -> Image.Image:
    """The image as upright 8-bit RGB.

    Alpha is composited on white, as most viewers do. 16 bits keep their full range: grey is divided by 257,
    of colour Pillow takes the high byte. Of an animation the first frame is taken.

    Raises:
        BadImageError: The file is not readable as an image, or too large.
    """
    with open_picture(path) as picture:
        return picture.decode()


@contextmanager
def blame(path: Path) -> Iterator[None]:
    """Turns what goes wrong inside into a BadImageError, but for a lack of memory or of file handles."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd but readable files
            yield
    except Exception as error:  # a hostile file can raise nearly anything in a decoder
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _RESOURCES):
            raise
        raise BadImageError(path, _reason(error)) from error


def _reason(error: Exception) -> str:
    """In one line, without the path, which the BadImageError names."""
    if isinstance(error, Image.DecompressionBombError):  # Pillow's limit is higher and comes first
        return f"more pixels than the limit of {MAX_PIXELS:,}"
    said = error.strerror if isinstance(error, OSError) else None
    return " ".join((said or str(error)).split()) or type(error).__name__


def _open(file: BinaryIO) -> Image.Image:
    """An image of a format and a kind that Pillow reads right."""
    stored = Storage.read(file)
    if stored and stored.is_refused:
        raise ValueError(stored.refusal)
    try:
        return Image.open(file, formats=FORMATS)
    except UnidentifiedImageError as error:
        reason = stored.refusal if stored else unreadable(file, ", ".join(FORMATS))
        raise ValueError(reason) from error


def _check_range(image: Image.Image) -> None:
    """Of all pixels, so that a file is not readable in one crop and unreadable in the next."""
    if image.mode == "I":
        lowest, highest = cast(tuple[int, int], image.getextrema())
        if lowest < 0 or highest > 65535:
            raise ValueError(f"{stored_as(image) or 'pixels'}, some outside 0 to 65535; {TO_8_BITS}")


def _read_jpeg(file: BinaryIO) -> bytes | None:
    """All of the file if it begins as a JPEG, and if opening it takes a reasonable time."""
    if file.read(len(JPEG_START)) != JPEG_START:
        return None
    file.seek(0)
    data = file.read()
    check_segments(data)
    return data


def orientation(image: Image.Image) -> int | None:
    """As EXIF has it: 2 to 8 for an image that is not upright, None where the EXIF is broken."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # nearly anything, and the image is sound all the same
        return None


def _resized(part: NDArray[np.uint8], box: tuple[float, float, float, float], size: Size) -> Tensor:
    """A box of RGB pixels [h, w, 3] as [3, H, W]."""
    height, width, _ = part.shape
    if box != (0, 0, width, height):
        image = Image.fromarray(part).resize(size[::-1], Image.Resampling.BICUBIC, box=box)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    # In a third of Pillow's time, but from whole pixels only.
    images = torch.from_numpy(part).permute(2, 0, 1).unsqueeze(0)
    return F.interpolate(images, size=size, mode="bicubic", antialias=True)[0]


def _rgb(image: Image.Image, inverted: bool) -> Image.Image:
    image.load()
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I"):
        table = _TO_8_BITS[::-1] if inverted else _TO_8_BITS
        return image.convert("I").point(table, "L").convert("RGB")
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        white = Image.new("RGB", colours.size, "white")
        white.paste(colours, mask=colours)  # as alpha_composite does it, in half the memory
        return white
    return image.convert("RGB")
