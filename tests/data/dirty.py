"""Files as they turn up in data sets: what can be read after all, and what cannot."""

import io
import struct
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image

ORANGE, WHITE, GREY = (200, 100, 50), (255, 255, 255), (120, 120, 120)
SIZE, LARGE = (24, 16), (2048, 2048)


class Readable(NamedTuple):
    data: bytes
    size: tuple[int, int] = SIZE
    colour: tuple[int, int, int] = ORANGE


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def flat(mode: str = "RGB", size: tuple[int, int] = SIZE) -> Image.Image:
    return Image.new("RGB", size, ORANGE).convert(mode)


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, bits: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">2I5B", width, height, bits, colour, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress(rows, 9))
    return b"\x89PNG\r\n\x1a\n" + header + extra + pixels + png_chunk(b"IEND", b"")


def tiff(width: int, height: int, *more: tuple[int, int, int, int]) -> bytes:
    """One strip of grey pixels whose data is the file itself; `more` are tag, type, count and value."""
    tags = {
        tag: (tag, 4, 1, value)
        for tag, value in ((256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 0), (277, 1))
    }
    tags |= {278: (278, 4, 1, height), 279: (279, 4, 1, width * height)} | {tag[0]: tag for tag in more}
    entries = b"".join(struct.pack("<HHII", *tags[tag]) for tag in sorted(tags))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)


def gif(screen: int, frame: int) -> bytes:
    """A frame of another size than the screen that it is on."""
    header = b"GIF89a" + struct.pack("<2H3B", screen, screen, 0x80, 0, 0) + bytes(6)
    return header + b"," + struct.pack("<4HB", 0, 0, frame, frame, 0) + b"\x02\x03\x04\x00\x05\x00;"


def bmp(width: int, height: int, bits: int = 24, compression: int = 0, rest: bytes = b"") -> bytes:
    information = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 1078 if bits == 8 else 54) + information + rest


def run_length_bmp(width: int, height: int) -> bytes:
    """Rows of up to 255 pixels, each a run of colour 0."""
    palette = bytes((*ORANGE[::-1], 0)) + bytes(4 * 255)
    return bmp(width, height, 8, 1, palette + bytes((min(width, 255), 0, 0, 0)) * height + b"\0\1")


def jpeg_scans(progressive: bool, num_more: int) -> bytes:
    """Further scans without any pixels, each of which the decoder fills up over the whole image."""
    data = encoded(flat(size=LARGE), "JPEG", progressive=progressive)
    start = data.rindex(b"\xff\xda") if progressive else data.index(b"\xff\xda")
    if progressive:
        length = 2 + int.from_bytes(data[start + 2 : start + 4])
        return data[:-2] + data[start : start + length] * num_more + data[-2:]
    one_component = struct.pack(">HB", 8, 1) + data[start + 5 : start + 7] + b"\0\x3f\0"
    return data[:start] + (b"\xff\xda" + one_component) * num_more + data[-2:]


def jpeg_claiming(width: int, height: int) -> bytes:
    data = bytearray(encoded(flat(), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">2H", height, width)
    return bytes(data)


def ycck() -> bytes:
    """A CMYK JPEG whose Adobe segment says that its colours are Y, Cb, Cr: of this grey all the same."""
    data = bytearray(encoded(Image.new("CMYK", SIZE, (120, 127, 127, 0)), "JPEG"))
    data[data.index(b"Adobe") + 11] = 2
    return bytes(data)


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return encoded(flat(), "JPEG", exif=tags)


def exif_segments(number: int) -> bytes:
    data = encoded(flat(), "JPEG")
    return data[:2] + (b"\xff\xe1" + struct.pack(">H", 8) + b"Exif\0\0") * number + data[2:]


def animated(kind: str) -> bytes:
    others = [Image.new("RGB", SIZE, colour) for colour in ("black", "white")]
    return encoded(flat(), kind, save_all=True, append_images=others)


def bomb(kind: bytes, head: bytes) -> bytes:
    """A PNG whose text or profile is a thousand times as long as the file says."""
    return png(4, 4, 8, 0, bytes(20), png_chunk(kind, head + zlib.compress(bytes(4 << 20), 9)))


KEYED = flat().quantize(2)
PALETTE_ENTRY = KEYED.getpixel((0, 0))
SIXTEEN_BITS = Image.fromarray(np.full(SIZE[::-1], 120 * 257, dtype=np.uint16))
BIG_ENDIAN = Image.frombytes("I;16B", SIZE, struct.pack(">H", 120 * 257) * 24 * 16)
ONE_TOO_BRIGHT = Image.new("I", SIZE)
ONE_TOO_BRIGHT.putpixel((23, 15), 65_536)

READABLE = {
    "plain.jpg": Readable(encoded(flat(), "JPEG")),
    "a-png.jpg": Readable(encoded(flat(), "PNG")),
    "a-jpeg.png": Readable(encoded(flat(), "JPEG")),
    "grey.jpg": Readable(encoded(Image.new("L", SIZE, 120), "JPEG"), colour=GREY),
    "progressive.jpg": Readable(encoded(flat(), "JPEG", progressive=True)),
    "many-scans.jpg": Readable(jpeg_scans(progressive=True, num_more=20), LARGE),
    "cmyk.jpg": Readable(encoded(flat("CMYK"), "JPEG")),
    "ycck.jpg": Readable(ycck(), colour=GREY),
    "trailing.jpg": Readable(encoded(flat(size=LARGE), "JPEG") + b" then a film " + b"\xff\xda" * 600, LARGE),
    "metadata.jpg": Readable(encoded(flat(size=LARGE), "JPEG", comment=b"\xff\xda" * 600), LARGE),
    "several.jpg": Readable(encoded(flat(), "MPO", save_all=True, append_images=[noise()])),
    "broken-exif.jpg": Readable(encoded(flat(), "JPEG", exif=b"Exif\0\0II*\0" + b"\xff" * 40)),
    **{f"turned-{turn}.jpg": Readable(exif(turn), SIZE[:: 1 if turn < 5 else -1]) for turn in range(1, 9)},
    "turned-99.jpg": Readable(exif(99)),
    "one-pixel.png": Readable(encoded(flat(size=(1, 1)), "PNG"), (1, 1)),
    "one-pixel.jpg": Readable(encoded(flat(size=(1, 1)), "JPEG"), (1, 1)),
    "line.png": Readable(encoded(flat(size=(3000, 1)), "PNG"), (3000, 1)),
    "palette.png": Readable(encoded(KEYED, "PNG")),
    "keyed.png": Readable(encoded(KEYED, "PNG", transparency=PALETTE_ENTRY), colour=WHITE),
    "keyed.gif": Readable(encoded(KEYED, "GIF", transparency=PALETTE_ENTRY), colour=WHITE),
    "opaque.png": Readable(encoded(flat("RGBA"), "PNG")),
    "clear.png": Readable(encoded(Image.new("LA", SIZE, (9, 0)), "PNG"), colour=WHITE),
    "clear.webp": Readable(encoded(Image.new("RGBA", SIZE, (9, 9, 9, 0)), "WEBP"), colour=WHITE),
    "bilevel.png": Readable(encoded(Image.new("1", SIZE, 1), "PNG"), colour=WHITE),
    "16-bit-grey.png": Readable(encoded(SIXTEEN_BITS, "PNG"), colour=GREY),
    "16-bit-grey.tif": Readable(encoded(BIG_ENDIAN, "TIFF"), colour=GREY),
    "16-bit.png": Readable(
        png(24, 16, 16, 2, (b"\0" + struct.pack(">3H", *(v * 257 for v in ORANGE)) * 24) * 16)
    ),
    "32-bit.tif": Readable(encoded(SIXTEEN_BITS.convert("I"), "TIFF"), colour=GREY),
    "cmyk.tif": Readable(encoded(flat("CMYK"), "TIFF")),
    "ycbcr.tif": Readable(encoded(flat("YCbCr"), "TIFF")),
    "absurd-tags.tif": Readable(
        tiff(1, 1, (700, 1, 0xFFFFFFFF, 8), (34675, 7, 0xFFFFFFF0, 8)), (1, 1), (73, 73, 73)
    ),
    "animated.gif": Readable(animated("GIF")),
    "animated.webp": Readable(animated("WEBP")),
    "animated.png": Readable(animated("PNG")),
    "pages.tif": Readable(animated("TIFF")),
    "run-lengths.bmp": Readable(run_length_bmp(24, 16)),
    "odd-maximum.ppm": Readable(b"P6 24 16 51\n" + bytes(value // 5 for value in ORANGE) * 24 * 16),
    "some-exif.jpg": Readable(exif_segments(100)),
    "one-tile.tif": Readable(tiff(1, 1, (322, 4, 1, 8192), (323, 4, 1, 8192)), (1, 1), (73, 73, 73)),
    "frame-beyond-screen.gif": Readable(gif(1, 2), (2, 2), (0, 0, 0)),
}
"""By name: the file, and the size and about the colour that it is read with."""

UNREADABLE = {
    "empty.jpg": (b"", "empty"),
    "zeros.jpg": (bytes(1000), "not an image"),
    "page.jpg": (b"<!doctype html><title>404</title>", "not an image"),
    "drawing.jpg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not an image"),
    "document.jpg": (b"%PDF-1.7\n1 0 obj\n", "not an image"),
    "postscript.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    "header-only.jpg": (encoded(noise(), "JPEG")[:30], "Truncated"),
    "truncated.jpg": (encoded(noise(), "JPEG")[:1500], "truncated"),
    "truncated-progressive.jpg": (encoded(noise(), "JPEG", progressive=True)[:1500], "truncated"),
    "truncated.png": (encoded(noise(), "PNG")[:1500], "truncated"),
    "truncated.gif": (encoded(noise(), "GIF")[:1500], "truncated"),
    "truncated.bmp": (encoded(noise(), "BMP")[:1500], "truncated"),
    "truncated.webp": (encoded(noise(), "WEBP")[:1500], "decoder"),
    "truncated.tif": (encoded(noise(), "TIFF", compression="tiff_lzw")[:1500], "a TIFF, which cannot"),
    "truncated.ppm": (encoded(noise(), "PPM")[:1500], "truncated"),
    "broken.png": (encoded(noise(), "PNG").replace(b"IDAT", b"IDAT\0\0", 1), "broken"),
    "huge.png": (png(40_000, 40_000, 8, 2, b""), "limit"),
    "huge.jpg": (jpeg_claiming(40_000, 40_000), "limit"),
    "large.jpg": (jpeg_claiming(12_000, 12_000), "12,000 x 12,000 pixels"),
    "huge.bmp": (bmp(40_000, 40_000), "limit"),
    "huge.tif": (tiff(40_000, 40_000), "limit"),
    "huge-frame.gif": (gif(1, 65_535), "limit"),
    "huge-tile.tif": (tiff(64, 64, (322, 4, 1, 32_768), (323, 4, 1, 32_768)), "32,768 x 32,768 pixels"),
    "narrow-in-tiles.tif": (
        tiff(1, 65_536, (322, 4, 1, 8192), (323, 4, 1, 8192)),
        "8,192 x 65,536 pixels",
    ),
    "plain.ppm": (b"P3 1 1 255 " + b"#\n" * 99 + b"1 2 3\n", "as text"),
    "large-run-lengths.bmp": (run_length_bmp(5000, 5000), "limit of 16,777,216"),
    "large-odd-maximum.ppm": (b"P6 5000 5000 51\n", "limit of 16,777,216"),
    "exif.jpg": (exif_segments(101), "101 EXIF segments"),
    "scans.jpg": (jpeg_scans(progressive=True, num_more=5000), "5,010 scans"),
    "empty-scans.jpg": (jpeg_scans(progressive=False, num_more=3000), "3,000 scans"),
    "long-text.png": (bomb(b"zTXt", b"a\0\0"), "too large"),
    "long-profile.png": (bomb(b"iCCP", b"a\0\0"), "too large"),
    "float.tif": (encoded(flat("F"), "TIFF"), "floating-point"),
    "out-of-range.tif": (
        encoded(ONE_TOO_BRIGHT, "TIFF"),
        "signed numbers, some outside 0 to",
    ),
}
"""By name: the file, and words of the reason why it is not read."""
