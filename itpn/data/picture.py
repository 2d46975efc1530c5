"""Reading one image, whatever is in the file."""

import io
import math
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from itpn.data.resample import Span, resized, whole_pixels
from itpn.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
JPEGS = ("JPEG", "MPO")
MAX_PIXELS = 1 << 27
"""The largest image that is decoded: 134 million pixels, 0.4 GB as RGB."""

MAX_JPEG_BYTES = 1 << 28
"""Longer ones are left to Pillow, which does not read them into memory."""

_ORIENTATION = 0x0112
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
        self._path, self._file = path, file
        with _blame(path):
            self._image: Image.Image = Image.open(file, formats=FORMATS)
            width, height = self._image.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width:,} x {height:,} pixels are more than the limit of {MAX_PIXELS:,}")
            if self._image.format not in JPEGS:
                self._image.load()  # Pillow turns a TIFF upright only here
            self._orientation = _orientation(self._image)
        self._raw_size = self._image.size
        self.size = self._raw_size[::-1] if self._orientation in _SIDEWAYS else self._raw_size

    def decode(self) -> Image.Image:
        """The whole image as upright 8-bit RGB."""
        with _blame(self._path):
            return self._upright(_rgb(self._image))

    def cut(self, box: Box, size: int) -> Tensor:
        """A box of the upright image, bicubic and antialiased, as uint8 [3, size, size].

        A JPEG is decoded at a half, quarter or eighth if that leaves the box no smaller than the output.
        """
        with _blame(self._path):
            left, top, width, height = self._raw_box(box)
            across, down = self._raw_size
            smallest = math.ceil(across * size / width), math.ceil(down * size / height)
            drafted = self._image.draft(None, smallest)
            factor = 1 if drafted is None else across / drafted[1][2]
            columns = whole_pixels(left / factor, (left + width) / factor, across / factor, size)
            rows = whole_pixels(top / factor, (top + height) / factor, down / factor, size)
            return self._upright_tensor(resized(self._part(columns, rows, factor), columns, rows, size))

    def _part(self, columns: Span, rows: Span, factor: float) -> NDArray[np.uint8]:
        """RGB [h, w, 3] of the raw image at 1 / factor."""
        pixels = self._plain_jpeg(factor)
        if pixels is None:
            return np.array(_rgb(self._image.crop((columns.start, rows.start, columns.stop, rows.stop))))
        return pixels[rows.start : rows.stop, columns.start : columns.stop]

    def _plain_jpeg(self, factor: float) -> NDArray[np.uint8] | None:
        """All of a JPEG at 1 / factor by simplejpeg, faster than Pillow; None if anything about it is odd.

        Pillow then has the last word on the file.
        """
        if self._image.format not in JPEGS or self._image.mode not in ("RGB", "L"):
            return None
        width, height = self._image.size
        scale = {"min_width": width, "min_height": height, "min_factor": factor}
        self._file.seek(0)
        data = self._file.read(MAX_JPEG_BYTES)
        try:
            # Its own reading of the header decides how much memory it takes.
            if simplejpeg.decode_jpeg_header(data, **scale)[:2] != (height, width):
                return None
            return simplejpeg.decode_jpeg(data, **scale)
        except ValueError:
            return None

    def _upright(self, image: Image.Image) -> Image.Image:
        turn = _TURNS.get(self._orientation)
        return image if turn is None else image.transpose(turn)

    def _upright_tensor(self, image: Tensor) -> Tensor:
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
    with _blame(path):
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        if status.st_size == 0:
            raise ValueError("the file is empty")
        file = open(path, "rb")  # noqa: SIM115 (closed below; what the caller does is not the file's fault)
    with file:
        yield Picture(path, file)


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
def _blame(path: Path) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd but readable files
            yield
    except UnidentifiedImageError as error:
        raise BadImageError(path, f"not an image in one of the formats {', '.join(FORMATS)}") from error
    except Exception as error:  # a hostile file can raise nearly anything in a decoder
        raise BadImageError(path, " ".join(str(error).split()) or type(error).__name__) from error


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # broken EXIF in a sound image
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; convert the file to 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("pixels outside 0 to 65535; convert the file to 8 or 16 bits")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        white = Image.new("RGBA", colours.size, "white")
        return Image.alpha_composite(white, colours).convert("RGB")
    return image.convert("RGB")
