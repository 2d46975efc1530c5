"""TIFFs of 16 bits, floats and many bands, each read right or named."""

import struct
from pathlib import Path

import numpy as np
import pytest

from itpn.data.check_labels import warnings_of
from itpn.data.images import find_images
from itpn.data.picture import BadImageError, load_image
from tests.data.dirty import encoded, noise

RAMP = np.linspace(0, 1, 64)[None, :, None].repeat(8, 0)
INVERTED, GREY, COLOUR = 0, 1, 2


def tiff(pixels: np.ndarray, photometric: int, form: int = 1, extra: tuple[int, ...] = ()) -> bytes:
    """An uncompressed TIFF of pixels [H, W, bands]."""
    height, width, bands = pixels.shape
    bits = (8 * pixels.dtype.itemsize,) * bands
    short = {256: (width,), 257: (height,), 258: bits, 259: (1,), 262: (photometric,), 277: (bands,)}
    short |= {278: (height,), 284: (1,), 339: (form,) * bands} | ({338: extra} if extra else {})
    tags = {**short, 273: (), 279: (pixels.nbytes,)}
    place = 8 + 2 + 12 * len(tags) + 4
    entries, beyond = b"", b""
    long = place + sum(2 * len(values) for values in short.values() if len(values) > 2)
    for tag, values in sorted(tags.items()):
        if tag in (273, 279):
            entries += struct.pack("<HHII", tag, 4, 1, long if tag == 273 else values[0])
            continue
        packed = struct.pack(f"<{len(values)}H", *values)
        if len(packed) > 4:
            entries += struct.pack("<HHII", tag, 3, len(values), place + len(beyond))
            beyond += packed
        else:
            entries += struct.pack("<HHI", tag, 3, len(values)) + packed.ljust(4, b"\0")
    head = b"II*\0" + struct.pack("<IH", 8, len(tags))
    return head + entries + bytes(4) + beyond + pixels.tobytes()


def ramp(bands: int, top: float, dtype: type) -> np.ndarray:
    return (RAMP * np.full(bands, top)).astype(dtype)


@pytest.mark.parametrize(
    ("pixels", "photometric", "form", "words"),
    [
        (ramp(13, 4000, np.uint16), GREY, 1, "a TIFF of 13 bands of 16-bit numbers, which cannot be read"),
        (ramp(4, 200, np.uint8), GREY, 1, "a TIFF of 4 bands of 8-bit numbers, which cannot be read"),
        (ramp(1, 1, np.float32), GREY, 3, "a TIFF of 32-bit floating-point numbers, whose range is not"),
        (ramp(3, 1, np.float32), COLOUR, 3, "a TIFF of 3 bands of 32-bit floating-point numbers"),
        (ramp(1, 1, np.float64), GREY, 3, "a TIFF of 64-bit floating-point numbers"),
        (ramp(1, 1, np.float16), GREY, 3, "a TIFF of 16-bit floating-point numbers"),
        (ramp(1, 1, np.complex64), GREY, 6, "a TIFF of 64-bit complex numbers, which cannot be read"),
        (ramp(1, -500, np.int16), GREY, 2, "a TIFF of 16-bit signed numbers, some outside 0 to 65535"),
        (ramp(3, -500, np.int16), COLOUR, 2, "a TIFF of 3 bands of 16-bit signed numbers"),
        (ramp(1, -50, np.int8), GREY, 2, "a TIFF of 8-bit signed numbers, which cannot be read"),
        (ramp(1, 4e9, np.uint32), GREY, 1, "a TIFF of 32-bit numbers, some outside 0 to 65535"),
        (ramp(1, 9, np.uint32), INVERTED, 1, "a TIFF of 32-bit numbers, which cannot be read"),
    ],
)
def test_a_tiff_that_cannot_be_read_is_told_by_its_bands_and_numbers(
    tmp_path: Path,
    pixels: np.ndarray,
    photometric: int,
    form: int,
    words: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    extra = (0,) * (pixels.shape[-1] - 1) if photometric == GREY and pixels.shape[-1] > 1 else ()
    (tmp_path / "x.tif").write_bytes(tiff(pixels, photometric, form, extra))
    with pytest.raises(BadImageError) as caught:
        load_image(tmp_path / "x.tif")
    bands = " -b 1 -b 2 -b 3" if pixels.shape[-1] > 2 else ""
    assert words in caught.value.reason
    assert f"gdal_translate -ot Byte -scale{bands} IN OUT.tif" in caught.value.reason
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_tiff_whose_0_is_white_is_inverted(tmp_path: Path, dtype: type) -> None:
    top = np.iinfo(dtype).max
    for name, photometric in (("plain.tif", GREY), ("inverted.tif", INVERTED)):
        (tmp_path / name).write_bytes(tiff(ramp(1, top, dtype), photometric))
    plain, inverted = (np.asarray(load_image(tmp_path / f"{name}.tif")) for name in ("plain", "inverted"))
    assert np.array_equal(inverted, 255 - plain) and plain[0, -1, 0] == 255


def test_16_bits_are_read_alike_in_grey_and_in_colour(tmp_path: Path) -> None:
    (tmp_path / "grey.tif").write_bytes(tiff(ramp(1, 65535, np.uint16), GREY))
    (tmp_path / "colour.tif").write_bytes(tiff(ramp(3, 65535, np.uint16), COLOUR))
    (tmp_path / "signed.tif").write_bytes(tiff(ramp(1, 32767, np.int16), GREY, 2))
    grey, colour, signed = (
        np.asarray(load_image(tmp_path / f"{name}.tif")).astype(int) for name in ("grey", "colour", "signed")
    )
    assert np.abs(grey - colour).max() <= 1 and np.abs(signed - grey / 2).max() <= 1


def warned(folder: Path, *files: bytes) -> list[str]:
    for i, data in enumerate(files):
        (folder / f"{i}.tif").write_bytes(data)
    return warnings_of(find_images(folder))


@pytest.mark.parametrize(
    ("pixels", "photometric"),
    [(ramp(1, 4095, np.uint16), GREY), (ramp(3, 3000, np.uint16), COLOUR), (ramp(1, 0, np.uint16), GREY)],
)
def test_16_bit_images_that_come_out_black_are_warned_of(
    tmp_path: Path, pixels: np.ndarray, photometric: int
) -> None:
    pixels[0, 0] = 65535  # a pixel without data
    (line,) = warned(tmp_path, encoded(noise(), "TIFF"), encoded(noise(), "TIFF"), tiff(pixels, photometric))
    assert line.startswith("1 of 3 images are of more than 8 bits and few values (0 to ")
    assert "of 255), such as 2.tif: 12-bit data look so" in line and "-scale 0 4095 0 255" in line
    pixels[0, 0] = 0
    scaled = tiff((pixels / max(1, pixels.max()) * 255).astype(np.uint8), photometric)
    assert not pixels.any() or not warned(tmp_path, scaled, scaled, scaled)


def test_dark_images_of_8_bits_are_told_where_most_are_so(tmp_path: Path) -> None:
    dark, bright = tiff(ramp(3, 40, np.uint8), COLOUR), tiff(ramp(3, 200, np.uint8), COLOUR)
    assert warned(tmp_path, dark, bright) == []
    (line,) = warned(tmp_path, dark, bright, dark)
    assert line.startswith("2 of 3 images are of few values (0 to 40 of 255), such as 0.tif: night or fog")


def test_bands_that_are_left_out_and_infrared_as_alpha_are_warned_of(tmp_path: Path) -> None:
    colours = ramp(4, 200, np.uint8)
    (line,) = warned(tmp_path, tiff(colours, COLOUR, extra=(0,)))
    assert "1 of 1 images are with further bands, which are left out, such as 0.tif: the first are" in line
    (line,) = warned(tmp_path, tiff(colours, COLOUR, extra=(2,)))
    assert "alpha channel that is neither 0 nor 255 in most places" in line and "infrared" in line
    colours[..., 3] = 255 * (colours[..., 3] > 99)
    assert warned(tmp_path, tiff(colours, COLOUR, extra=(2,))) == []
    assert warned(tmp_path, tiff(colours[..., :3], COLOUR)) == []


def test_images_that_alpha_makes_white_are_warned_of(tmp_path: Path) -> None:
    colours = ramp(4, 200, np.uint8)
    colours[..., 3] = 0
    (line,) = warned(tmp_path, tiff(colours, COLOUR, extra=(2,)))
    assert "1 of 1 images are transparent everywhere, such as 0.tif" in line and "-alpha off" in line
    colours[0, 0, 3] = 255
    assert warned(tmp_path, tiff(colours, COLOUR, extra=(2,))) == []
