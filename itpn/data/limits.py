"""What a file may ask of a decoder: memory and time, told from its header.

The checks raise ValueError, with a reason that can be shown.
"""

import re

from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

MAX_PIXELS = 1 << 27
"""The largest image that is decoded: 134 million pixels, 0.4 GB as RGB."""

MAX_SLOW_PIXELS = 1 << 24
"""The same where Pillow decodes in Python, at up to two seconds per million pixels."""

MAX_BYTES = 1 << 29
"""The longest file that is read."""

MAX_SCANNED = 16 * MAX_PIXELS
"""Pixels of a JPEG times its scans: a few seconds. Encoders write some ten scans; bombs thousands, each a few
bytes long and a pass over all pixels."""

MAX_EXIF = 100
"""EXIF segments of a JPEG. Pillow joins them in a time that grows with their number squared."""

SLOW_DECODERS = ("bmp_rle", "ppm")
PLAIN_TEXT = "ppm_plain"

JPEG_START = b"\xff\xd8\xff"
# Outside the coded pixels; the markers that have no length are not looked for, but for the end of the image.
_JPEG_SEGMENT = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")
_END_OF_IMAGE, _START_OF_SCAN, _EXIF = b"\xff\xd9", b"\xff\xda", b"Exif\0\0"
_WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT = 256, 257, 322, 323


def check_size(width: int, height: int, limit: int | None = None) -> None:
    limit = MAX_PIXELS if limit is None else limit
    if width * height > limit:
        raise ValueError(f"{width:,} x {height:,} pixels are more than the limit of {limit:,}")


def check_coding(image: Image.Image) -> None:
    """Of an image that is opened, but not yet decoded."""
    check_size(*image.size)
    if isinstance(image, TiffImageFile):
        _check_tiles(image)
    decoders = {tile[0] for tile in image.tile} if isinstance(image, ImageFile) else set()
    if PLAIN_TEXT in decoders:  # comments take it a time that grows with their number squared
        raise ValueError("pixels written as text; convert the file to binary PPM or another format")
    if not decoders.isdisjoint(SLOW_DECODERS):
        check_size(*image.size, MAX_SLOW_PIXELS)


def _check_tiles(tiff: TiffImageFile) -> None:
    """A small image may be stored in huge tiles: they take memory before they are read, and time."""
    tags = tiff.tag_v2
    check_size(
        _padded(int(tags[_WIDTH]), int(tags.get(_TILE_WIDTH, 0))),
        _padded(int(tags[_HEIGHT]), int(tags.get(_TILE_HEIGHT, 0))),
    )


def _padded(side: int, tile: int) -> int:
    return -(-side // tile) * tile if tile > 0 else side


def check_segments(jpeg: bytes) -> None:
    """Before Pillow opens the file."""
    num_exif = jpeg.count(_EXIF)
    if num_exif > MAX_EXIF:
        raise ValueError(f"a JPEG of {num_exif:,} EXIF segments")


def check_scans(jpeg: bytes, width: int, height: int) -> None:
    most = MAX_SCANNED // max(1, width * height)
    if jpeg.count(_START_OF_SCAN) <= most:  # a quick look; some may be inside other segments
        return
    num_scans, place = 0, 2
    while (segment := _JPEG_SEGMENT.search(jpeg, place)) and segment[0] != _END_OF_IMAGE:
        num_scans += segment[0] == _START_OF_SCAN
        place = segment.end() + int.from_bytes(jpeg[segment.end() : segment.end() + 2])
    if num_scans > most:
        raise ValueError(f"a JPEG of {num_scans:,} scans of {width:,} x {height:,} pixels")
