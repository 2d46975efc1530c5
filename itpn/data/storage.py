"""How a file stores its pixels, which decides whether and how they can be read."""

from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

from PIL import Image
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import MAX_SAMPLESPERPIXEL, ImageFileDirectory_v2, TiffImageFile

STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
TO_8_BITS = "convert it, as with GDAL: gdal_translate -ot Byte -scale IN OUT.tif"
"""The cure for numbers of an unknown range."""

_SIGNED, _FLOATS, _UNDEFINED = 2, 3, 4
_NUMBERS = {_SIGNED: "signed ", _FLOATS: "floating-point ", 5: "complex ", 6: "complex "}
_WIDTH, _BITS, _PHOTOMETRIC, _SAMPLES, _FORM = 256, 258, 262, 277, 339
_WHITE_IS_ZERO = 0
_BIT_DEPTH = 24  # where the header of a PNG has it


class Storage(NamedTuple):
    """How a TIFF stores its pixels."""

    bands: int
    bits: int
    form: int
    """Of numbers, as the tag SampleFormat has it."""
    white_is_zero: bool

    @classmethod
    def of(cls, tags: Mapping[int, Any]) -> "Storage":
        bits, forms = tags.get(_BITS, (1,)), tags.get(_FORM, (1,))
        photometric = tags.get(_PHOTOMETRIC)
        return cls(
            int(tags.get(_SAMPLES, 1)),
            max(map(int, bits)),
            max(map(int, forms)),
            photometric == _WHITE_IS_ZERO,
        )

    @classmethod
    def read(cls, file: BinaryIO) -> "Storage | None":
        """What the header says; None where it is not that of a TIFF, or cut short."""
        file.seek(0)
        header = file.read(8)
        if not header.startswith(STARTS):
            return None
        try:
            tags = ImageFileDirectory_v2(header + (file.read(8) if b"+" in header[:4] else b""))
            file.seek(int(tags.next or 0))
            tags.load(file)
            return cls.of(tags) if _WIDTH in tags else None
        except Exception:  # a damaged header can raise nearly anything
            return None

    @property
    def signed(self) -> bool:
        return self.form == _SIGNED

    @property
    def is_refused(self) -> bool:
        """Whether Pillow would take the numbers for others, or complain on its own."""
        odd = self.form not in (1, _SIGNED, _UNDEFINED)
        return odd or (self.signed and self.bits == 8) or self.bands > MAX_SAMPLESPERPIXEL

    @property
    def refusal(self) -> str:
        """Why it is not read, and what to do."""
        unknown = ", whose range is not known" if self.form == _FLOATS else ", which cannot be read"
        some = range(1, 4 if self.bands > 2 else 2) if self.bands > 1 else ()
        bands = "".join(f" -b {band}" for band in some)
        return f"{self}{unknown}; {TO_8_BITS.replace('-scale', f'-scale{bands}')}"

    def __str__(self) -> str:
        each = f"{self.bits}-bit {_NUMBERS.get(self.form, '')}numbers"
        return f"a TIFF of {self.bands:,} bands of {each}" if self.bands > 1 else f"a TIFF of {each}"


def stored_as(image: Image.Image) -> Storage | None:
    """The same for an image that is opened; None of other formats."""
    return Storage.of(image.tag_v2) if isinstance(image, TiffImageFile) else None


def is_inverted(image: Image.Image) -> bool:
    """Whether 0 is white, where Pillow does not see to it: of 16 bits."""
    stored = stored_as(image)
    return stored is not None and stored.white_is_zero and image.mode.startswith("I")


def depth(image: Image.Image, data: bytes) -> int:
    """How many bits a number has in a file; `image` is opened, but not decoded."""
    if stored := stored_as(image):
        return stored.bits
    if isinstance(image, PpmImageFile):
        arguments = image.tile[0][3]  # of 8 bits the name of a mode alone
        return 16 if image.mode == "I" or (isinstance(arguments, tuple) and arguments[-1] > 255) else 8
    return data[_BIT_DEPTH] if image.format == "PNG" else 8
