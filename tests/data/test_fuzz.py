"""Damaged files, drawn at random: read or refused, and the same in every way of reading them."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from itpn.data import limits, picture
from itpn.data.picture import BadImageError, Picture, open_bytes
from tests.data.dirty import READABLE, UNREADABLE, encoded, noise

SOUND = [encoded(noise(), kind) for kind in picture.FORMATS]
SEEDS = [*SOUND, *(file.data for file in READABLE.values()), *(data for data, _ in UNREADABLE.values())]
SEEDS = [seed for seed in SEEDS if 0 < len(seed) < 10_000]

EXTREMES = [b"\0\0", b"\xff\xff", b"\x7f\xff", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff"]
MARKERS = [b"\xff\xda", b"\xff\xd9", b"\xff\xc2", b"IDAT", b"tRNS", b"VP8X", b"!\xf9\x04", b"\x42\x01"]
EDITS = st.lists(
    st.tuples(
        st.integers(0, 10_000), st.sampled_from(EXTREMES + MARKERS) | st.binary(min_size=1, max_size=8)
    ),
    max_size=6,
)


def damaged(data: bytes, edits: list[tuple[int, bytes]], length: int, repair: bool) -> bytes:
    changed = bytearray(data)
    for place, change in edits:
        start = place % len(changed)
        changed[start : start + len(change)] = change
    changed = changed[:length] if length % 3 == 0 else changed
    return with_checksums(bytes(changed)) if repair else bytes(changed)


def with_checksums(data: bytes) -> bytes:
    """A PNG whose chunks are believed, so that what they say is read."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    changed, start = bytearray(data), 8
    while start + 12 <= len(data):
        end = start + 8 + int.from_bytes(data[start : start + 4])
        changed[end : end + 4] = (
            struct.pack(">I", zlib.crc32(data[start + 4 : end])) if end < len(data) else b""
        )
        start = end + 4
    return bytes(changed)


def reason(data: bytes, read: Callable[[Picture], object]) -> str | None:
    """Why it cannot be read, if so."""
    try:
        with open_bytes(data, Path("damaged")) as opened:
            read(opened)
    except BadImageError as error:
        assert error.reason and "\n" not in error.reason
        return error.reason
    return None


def decode(opened: Picture) -> None:
    width, height = opened.size
    assert width * height <= limits.MAX_PIXELS
    image = opened.decode()
    assert image.mode == "RGB" and image.size == (width, height)


def cut_all(opened: Picture) -> None:
    assert opened.cut((0, 0, *opened.size), (4, 4)).shape == (3, 4, 4)


def cut_corner(opened: Picture) -> None:
    width, height = opened.size
    assert opened.cut((0, 0, -(-width // 3), -(-height // 3)), (4, 4)).shape == (3, 4, 4)


@settings(max_examples=400, deadline=None)
@given(data=st.builds(damaged, st.sampled_from(SEEDS), EDITS, st.integers(1, 10_000), st.booleans()))
def test_a_damaged_file_is_read_or_refused_by_training_and_by_check_data_alike(data: bytes) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "MAX_PIXELS", 1 << 20)  # for time, not for safety
        reasons = [reason(data, read) for read in (decode, cut_all, cut_corner)]
    assert len({reason is None for reason in reasons}) == 1, reasons


@settings(max_examples=200, deadline=None)
@given(start=st.sampled_from([seed[:16] for seed in SEEDS]), rest=st.binary(max_size=200))
@example(start=b"\xff\xd8", rest=b"\xff" * 100)
@example(start=b"", rest=b"\0")
def test_a_beginning_followed_by_anything(start: bytes, rest: bytes) -> None:
    assert (reason(start + rest, decode) is None) == (reason(start + rest, cut_all) is None)
