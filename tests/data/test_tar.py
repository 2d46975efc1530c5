"""Archives of every kind are walked as tarfile does; damaged and hostile ones are refused."""

import gzip
import io
import random
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itpn.data.tar import BLOCK, MAX_EXTENSION, BadTarError, members
from itpn.errors import UserError

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def archive(names: list[str], kind: int = tarfile.GNU_FORMAT) -> bytes:
    """Files of 0, 300, 600 … bytes, then a folder and a link."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as tar:
        for i, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = 300 * i
            tar.addfile(member, io.BytesIO(bytes([i]) * member.size))
        for name, type_ in (("folder", tarfile.DIRTYPE), ("link.jpg", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = type_, "elsewhere"
            tar.addfile(member)
    return file.getvalue()


def header(
    name: bytes = b"a.jpg", size: bytes = b"%011o\0" % 0, kind: bytes = b"0", magic: bytes = b"ustar\x0000"
) -> bytes:
    block = bytearray(name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size + b"00000000000\0")
    block += b" " * 8 + kind + bytes(100) + magic
    block = block.ljust(BLOCK, b"\0")
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def octal(size: int) -> bytes:
    return b"%011o\0" % size


def wide(size: int) -> bytes:
    """Base 256, for sizes beyond 8 GB and below 0."""
    return (b"\x80" if size >= 0 else b"\xff") + size.to_bytes(11, "big", signed=True)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def pax(*records: bytes, kind: bytes = b"x") -> bytes:
    content = b"".join(
        next(line for n in range(1, 10**6) if len(line := b"%d %s\n" % (n, record)) == n)
        for record in records
    )
    return header(b"pax", octal(len(content)), kind) + padded(content)


END = bytes(2 * BLOCK)


@pytest.mark.parametrize("kind", FORMATS)
def test_members_lie_where_tarfile_finds_them(tmp_path: Path, kind: str) -> None:
    names = ["a.jpg", "b/" + "x" * 90 + ".jpg", "кот/图.jpg", "line\nbreak.jpg"]
    names += [] if kind == "ustar" else ["y" * 400 + ".jpg", "bytes\udcff.jpg"]
    path = tmp_path / "a.tar"
    path.write_bytes(archive(names, FORMATS[kind]))
    with tarfile.open(path) as tar:
        expected = [(member.name, member.isreg(), member.offset_data, member.size) for member in tar]
    assert [tuple(member) for member in members(path)] == expected
    assert [member.name for member in members(path)][: len(names)] == names


def test_a_size_in_a_pax_header_counts(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(
        pax(b"size=700") + header() + padded(bytes(700)) + header(b"b.jpg") + END
    )
    assert [(member.name, member.size) for member in members(tmp_path / "a.tar")] == [
        ("a.jpg", 700),
        ("b.jpg", 0),
    ]


@pytest.mark.parametrize(
    ("content", "offset", "words"),
    [
        (b"", 0, "no end mark"),
        (header(), 512, "no end mark"),
        (header() + b"\0" * 511, 512, "no end mark"),
        (b"nonsense" * 64 + END, 0, "no header"),
        (header() + b"x" * BLOCK + END, 512, "no header"),
        (header(size=octal(600)) + bytes(512), 0, "600 bytes"),
        (header(size=wide(1 << 70)) + END, 0, "truncated or damaged"),
        (header(size=wide(-512)) + END, 0, "truncated or damaged"),
        (header(size=wide(-1 << 70), kind=b"L") + END, 0, "truncated or damaged"),
        (
            header(size=octal(MAX_EXTENSION + 1), kind=b"L") + bytes(2 * MAX_EXTENSION),
            0,
            "a name or header of",
        ),
        (header(size=octal(5000), kind=b"x") + END, 0, "truncated or damaged"),
        (header(kind=b"S") + END, 0, "sparse"),
        (pax(b"GNU.sparse.major=1") + header() + END, 0, "sparse"),
        (pax(b"size=99999999999999999999") + header() + END, 1024, "truncated or damaged"),
        (pax(b"size=999999999999999999999999") + header() + END, 1024, "no number"),
        (pax(b"size=-512") + header() + END, 1024, "no number"),
        (pax(b"size=512", kind=b"g") + header() + END, 0, "for all members"),
        (header(size=octal(6), kind=b"x") + padded(b"99 a=b") + END, 0, "pax header"),
        (header(size=octal(6), kind=b"x") + padded(b"0 a=b\n") + END, 0, "pax header"),
        (header(size=octal(6), kind=b"x") + padded(b"-6 a=\n") + END, 0, "pax header"),
        (header() + END + header(b"joined.jpg") + END, 512, "follow the end mark"),
    ],
)
def test_a_bad_archive_is_named_with_the_place(
    tmp_path: Path, content: bytes, offset: int, words: str
) -> None:
    path = tmp_path / "bad.tar"
    path.write_bytes(content)
    with pytest.raises(BadTarError) as caught:
        list(members(path))
    message = str(caught.value)
    assert message.startswith(f"{path}, byte {offset:,}: ") and words in message
    assert "\n" not in message


def test_a_compressed_archive_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(gzip.compress(archive(["a.jpg"])))
    with pytest.raises(UserError, match=r"a\.tar is compressed \(gzip\); unpack it"):
        list(members(tmp_path / "a.tar"))


def test_wherever_it_is_cut_off_it_is_refused(tmp_path: Path) -> None:
    content = archive(["a.jpg", "b.jpg", "y" * 200 + ".jpg"], tarfile.PAX_FORMAT)
    end = content.rstrip(b"\0").rfind(b"link.jpg") + BLOCK
    path = tmp_path / "cut.tar"
    for length in range(0, end, 100):
        path.write_bytes(content[:length])
        with pytest.raises(BadTarError):
            list(members(path))


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), num_changes=st.integers(1, 8), kind=st.sampled_from(sorted(FORMATS)))
def test_changed_bytes_are_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, seed: int, num_changes: int, kind: str
) -> None:
    content = bytearray(archive(["a.jpg", "b.jpg", "ю.jpg" if kind == "pax" else "c.jpg"], FORMATS[kind]))
    draws = random.Random(seed)
    for _ in range(num_changes):
        place = draws.randrange(0, 5000)
        content[place] = draws.choice((0, 0xFF, 0x80, ord("0"), ord("9"), draws.randrange(256)))
        block = place // BLOCK * BLOCK  # with the right checksum a change is not noticed at once
        content[block + 148 : block + 156] = b" " * 8
        content[block + 148 : block + 156] = b"%06o\0 " % sum(content[block : block + BLOCK])
    path = tmp_path_factory.getbasetemp() / "changed.tar"
    path.write_bytes(content)
    try:
        found = list(members(path))
    except UserError:
        return
    assert all(BLOCK <= member.offset <= member.offset + member.size <= len(content) for member in found)
