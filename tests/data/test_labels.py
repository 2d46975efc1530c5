"""Label pictures as they turn up: read as they are stored, or refused with a reason."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from itpn.data import limits
from itpn.data.labels import Labelling, label_picture, read_labels
from itpn.data.picture import BadImageError
from itpn.errors import UserError
from tests.data.dirty import animated, bomb, encoded, flat, noise, png, png_chunk

FEW = Labelling(tuple("abcdef"))
MANY = Labelling(tuple(map(str, range(1000))), ignored=(65_535,))
VALUES = np.array([[0, 1, 2], [3, 0, 1]], np.uint8)


def packed(values: np.ndarray, bits: int) -> bytes:
    """Rows of a grey or palette PNG of few bits."""
    rows = b""
    for row in values:
        ones = "".join(f"{value:0{bits}b}" for value in row)
        rows += b"\0" + int(ones.ljust(-(-len(ones) // 8) * 8, "0"), 2).to_bytes(-(-len(ones) // 8))
    return rows


def stored(data: bytes, folder: Path) -> Path:
    path = folder / "labels.png"
    path.write_bytes(data)
    return path


PALETTE = png_chunk(b"PLTE", bytes(range(48)))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("colour", [0, 3], ids=["grey", "palette"])
def test_numbers_are_read_as_they_are_stored(tmp_path: Path, bits: int, colour: int) -> None:
    values = VALUES % min(2**bits, 200)
    data = png(3, 2, bits, colour, packed(values, bits), PALETTE if colour else b"")
    found = read_labels(stored(data, tmp_path), FEW, (2, 3))
    assert found.dtype == np.uint8 and np.array_equal(found, values)


def test_sixteen_bits(tmp_path: Path) -> None:
    rows = b"".join(b"\0" + struct.pack(">3H", *row) for row in ([0, 999, 65_535], [256, 255, 1]))
    found = read_labels(stored(png(3, 2, 16, 0, rows), tmp_path), MANY)
    assert found.dtype == np.int32 and found.tolist() == [[0, 999, MANY.unlabelled], [256, 255, 1]]
    with pytest.raises(
        BadImageError, match="labels 256, 999, 65,535 are no class: those are 0 to 5, and 255"
    ):
        read_labels(stored(png(3, 2, 16, 0, rows), tmp_path), FEW)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        *(("L", kind) for kind in ("PNG", "TIFF", "BMP", "GIF")),
        *(("P", kind) for kind in ("TIFF", "BMP", "GIF")),
        *(("RGB", kind) for kind in ("PNG", "TIFF", "BMP")),
        ("RGBA", "PNG"),
        ("LA", "PNG"),
        ("I;16", "TIFF"),
        ("I", "TIFF"),
        ("F", "TIFF"),
    ],
)
def test_every_way_to_store_numbers_exactly_is_read(tmp_path: Path, mode: str, kind: str) -> None:
    picture = Image.fromarray(VALUES.astype({"F": "f4", "I": "i4", "I;16": "u2"}.get(mode, "u1")))
    if mode == "P":
        picture.putpalette(bytes(range(200, 248)))
    picture = picture if picture.mode == mode else picture.convert(mode)
    assert np.array_equal(read_labels(stored(encoded(picture, kind), tmp_path), FEW, (2, 3)), VALUES)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
def test_two_values_of_one_bit_are_0_and_1(tmp_path: Path, kind: str) -> None:
    picture = Image.fromarray(VALUES > 0)
    assert picture.mode == "1"
    assert np.array_equal(read_labels(stored(encoded(picture, kind), tmp_path), FEW), VALUES > 0)


def test_transparency_animation_and_ancillary_chunks_change_nothing(tmp_path: Path) -> None:
    rows, keyed = packed(VALUES, 8), png_chunk(b"tRNS", b"\0\1")
    for data in (
        png(3, 2, 8, 0, rows, keyed),
        png(3, 2, 8, 3, rows, PALETTE + png_chunk(b"tRNS", b"\0")),
        png(3, 2, 8, 0, rows, png_chunk(b"gAMA", b"\0\0\0\1") + png_chunk(b"eXIf", b"II*\0" + bytes(40))),
    ):
        assert np.array_equal(read_labels(stored(data, tmp_path), FEW), VALUES)


@pytest.mark.parametrize(
    ("first", "ignored", "values", "ids"),
    [
        (0, (255,), [0, 5, 255], [0, 5, 255]),
        (1, (0, 255), [0, 1, 6, 255], [255, 0, 5, 255]),
        (0, (), [0, 5], [0, 5]),
        (3, (0, 1, 2), [0, 3, 8, 2], [255, 0, 5, 255]),
    ],
)
def test_numbering(first: int, ignored: tuple[int, ...], values: list[int], ids: list[int]) -> None:
    labelling = Labelling(FEW.class_names, first, ignored)
    assert labelling.ids(np.array([values])).tolist() == [ids]
    for wrong in {first + 6, 300} - {*ignored}:
        with pytest.raises(
            ValueError, match=f"labels {wrong} are no class: those are {first} to {first + 5}"
        ):
            labelling.ids(np.array([[wrong]]))


def test_numbers_that_do_not_follow_one_another() -> None:
    labelling = Labelling(("a", "b", "c"), ignored=(3,), values=(0, 255, 300))
    assert labelling.ids(np.array([300, 0, 255, 3])).tolist() == [2, 0, 1, labelling.unlabelled]
    with pytest.raises(ValueError, match="labels 1 are no class: those are 0, 255, 300, and 3 is no label"):
        labelling.ids(np.array([1]))


@pytest.mark.parametrize(
    ("values", "cure"),
    [
        ([6], "if classes count from 1, give --data.zero-is-no-label"),
        ([7], "name all classes, or give their numbers in order with --data.values"),
        (range(100, 109), "edges were smoothed or JPEG was used"),
    ],
)
def test_a_likely_cause_of_odd_numbers_is_told(values: list[int], cure: str) -> None:
    with pytest.raises(ValueError, match=cure):
        FEW.ids(np.array([values]))


def test_as_many_classes_as_there_can_be() -> None:
    most = Labelling(tuple(map(str, range(65_535))), ignored=(65_535,))
    assert most.ids(np.array([[0, 65_534, 65_535]])).tolist() == [[0, 65_534, most.unlabelled]]
    for number in (0, 65_536):
        with pytest.raises(UserError, match="there can be 1 to 65,535"):
            Labelling(("a",) * number)


def truncated() -> bytes:
    return encoded(Image.fromarray(np.random.default_rng(0).integers(0, 6, (99, 99), dtype=np.uint8)), "PNG")[
        :900
    ]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<!doctype html>", "this is none"),
        (encoded(flat("L"), "JPEG"), "this is a JPEG, which changes numbers"),
        (encoded(flat("L"), "WEBP"), "labels are read from PNG, TIFF, BMP or GIF files, and this is none"),
        (encoded(flat(), "PNG"), "mode RGB holds colours, not labels: 1 of them, #"),
        (encoded(flat().resize((4, 4)), "BMP"), "a BMP of mode RGB holds colours"),
        (encoded(flat("RGBA"), "PNG"), "mode RGBA holds colours"),
        (encoded(Image.new("LA", (2, 2)), "PNG"), "some pixels are transparent"),
        (png(1, 1, 16, 2, b"\0" + bytes(6)), "colours of 16 bits"),
        (encoded(Image.new("F", (2, 2), 0.5), "TIFF"), "not whole"),
        (encoded(Image.new("I", (2, 2), -1), "TIFF"), "not in 0 to 65,535"),
        (encoded(Image.new("L", (2, 2)), "TIFF", tiffinfo={262: 0}), "whose 0 is white"),
        (animated("PNG"), "mode RGB holds colours"),
        (png(40_000, 40_000, 8, 0, b""), "more pixels than the limit"),
        (png(20_000, 20_000, 1, 3, b"", PALETTE), "limit"),
        (png(3, 2, 8, 0, b""), "truncated"),
        (truncated(), "truncated"),
        (encoded(noise().convert("L"), "PNG").replace(b"IDAT", b"IDAT\0\0", 1), "broken"),
        (bomb(b"zTXt", b"a\0\0"), "too large"),
        (bomb(b"iCCP", b"a\0\0"), "too large"),
        (png(3, 2, 8, 0, packed(VALUES + 4, 8)), "labels 6, 7 are no class"),
        (png(5, 2, 8, 0, bytes(12)), "5 x 2 labels for an image of 3 x 2 pixels"),
    ],
)  # fmt: skip
def test_what_is_no_label_picture_is_refused(tmp_path: Path, data: bytes, reason: str) -> None:
    with pytest.raises(BadImageError) as error:
        read_labels(stored(data, tmp_path), FEW, (2, 3) if "labels for" in reason else None)
    assert reason in error.value.reason and error.value.path == tmp_path / "labels.png"


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.png"):
        with pytest.raises(BadImageError):
            read_labels(path, FEW)


def test_a_size_that_is_wrong_is_found_before_anything_is_decoded(tmp_path: Path) -> None:
    with pytest.raises(BadImageError, match="9000 x 9000 labels"):
        read_labels(stored(png(9000, 9000, 8, 0, b""), tmp_path), FEW, (2, 3))


SOUND = [encoded(Image.fromarray(VALUES), "PNG"), png(3, 2, 4, 3, packed(VALUES, 4), PALETTE)]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(SOUND), st.integers(0, 200), st.binary(min_size=1, max_size=8))
def test_a_damaged_file_is_read_or_refused(data: bytes, place: int, change: bytes) -> None:
    changed = data[: place % len(data)] + change + data[place % len(data) + len(change) :]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "MAX_PIXELS", 1 << 20)
        patch.setattr("itpn.data.labels.read_file", lambda _: changed)
        try:
            found = read_labels(Path("damaged"), FEW)
        except BadImageError as error:
            assert error.reason and "\n" not in error.reason
        else:
            assert found.ndim == 2 and ((found < 6) | (found == 255)).all()


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([1, 6, 200, 254, 255, 256, 1000]), st.sampled_from([0, 1]), st.booleans())
def test_a_picture_of_labels_is_read_back(
    data: st.DataObject, num_classes: int, first: int, colour: bool
) -> None:
    ignored = (0, 65_535) if first else (65_535,)
    labelling = Labelling(("x",) * num_classes, first, ignored)
    ids = data.draw(arrays.arrays(np.int64, (3, 4), elements=st.integers(0, num_classes - 1)))
    ids[data.draw(arrays.arrays(bool, (3, 4)))] = labelling.unlabelled
    colours = np.full((num_classes, 3), 9, np.uint8) if colour else None
    buffer = io.BytesIO()
    label_picture(ids, labelling, colours).save(buffer, "PNG")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("itpn.data.labels.read_file", lambda _: buffer.getvalue())
        assert np.array_equal(read_labels(Path("x"), labelling), ids)


def test_a_palette_shows_the_classes_colours() -> None:
    colours = np.arange(18, dtype=np.uint8).reshape(6, 3)
    picture = label_picture(
        np.array([[0, 5, 255]], np.uint8), Labelling(FEW.class_names, 1, (0, 255)), colours
    )
    assert picture.mode == "P"
    assert np.asarray(picture).tolist() == [[1, 6, 255]]
    assert np.asarray(picture.convert("RGB")).tolist() == [[[0, 1, 2], [15, 16, 17], [0, 0, 0]]]
    with pytest.raises(ValueError, match="no number stands for that"):
        label_picture(np.array([[255]]), Labelling(FEW.class_names, 0, ()))
