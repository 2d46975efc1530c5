"""Where the files in a tar archive lie. Nothing is extracted, and nothing in it is believed unchecked.

Python's tarfile takes a damaged header for the end of the archive and follows negative sizes backwards, so
only its parser of a single header is used here.
"""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from itpn.errors import UserError, printable

BLOCK = tarfile.BLOCKSIZE
MAX_EXTENSION = 1 << 20
"""Bytes of a long name or a pax header."""
MAX_PADDING = 1 << 20
"""Bytes of zeros after the end mark; writers fill up records of usually 10,240 bytes."""

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_NO_DATA = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
)
_PAX_TYPES = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_LONG_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


class Member(NamedTuple):
    name: str
    is_file: bool
    offset: int
    """Of its data, in bytes."""
    size: int


class BadTarError(UserError):
    """An archive that is damaged, truncated or of a kind that cannot be read at offsets."""

    def __init__(self, path: Path, offset: int, reason: str) -> None:
        super().__init__(
            f"{path}, byte {offset:,}: {printable(reason)}; write the archive again or remove it"
        )


def members(path: Path) -> Iterator[Member]:
    """All members but extension headers, in the archive's order.

    Raises:
        BadTarError: At the first thing wrong; what was yielded before is sound.
        OSError: The file cannot be read.
    """
    with open(path, "rb", buffering=0) as file:
        yield from _Walk(path, file.fileno()).members()


class _Walk:
    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self.descriptor = path, descriptor
        self.archive_size = os.fstat(descriptor).st_size
        self.offset = 0
        """Of the header that is being read."""

    def members(self) -> Iterator[Member]:
        self._refuse_compressed()
        name, size = None, None  # of the next member, where an extension header says so
        while (header := self._header()) is not None:
            data = self.offset + BLOCK
            if header.type in _PAX_TYPES or header.type in _LONG_NAMES:
                content = self._content(header, data)
                if header.type == tarfile.GNUTYPE_LONGNAME:
                    name = content.rstrip(b"\0")
                elif header.type in _PAX_TYPES:
                    records = self._pax_records(content)
                    if header.type == tarfile.XGLTYPE and records.keys() & {b"path", b"size"}:
                        raise self._bad("a name or size for all members")
                    name, size = records.get(b"path", name), records.get(b"size", size)
                self.offset = self._end(data, header.size)
                continue
            given = self._pax_size(size) if size is not None else header.size
            length = 0 if header.type in _NO_DATA else given
            end = self._end(data, length)
            shown = header.name if name is None else name.decode("utf-8", "surrogateescape")
            if header.type == tarfile.GNUTYPE_SPARSE:
                raise self._bad("a sparse file, which is not stored as one piece")
            yield Member(shown, header.isreg(), data, length)
            self.offset, name, size = end, None, None

    def _header(self) -> tarfile.TarInfo | None:
        """None at the end mark."""
        block = self._read(self.offset, BLOCK)
        if len(block) < BLOCK:
            raise self._bad("the archive is truncated: it has no end mark")
        if not any(block):
            self._expect_zeros()
            return None
        try:
            return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError, OverflowError) as error:
            raise self._bad(f"no header of a tar member ({error})") from error

    def _end(self, data: int, size: int) -> int:
        """Where the next header is, behind `size` bytes of data and their padding."""
        if size < 0 or data + size > self.archive_size:
            raise self._bad(
                f"the archive is truncated or damaged: a member of {size:,} bytes in {self.archive_size:,}"
            )
        return data + -(-size // BLOCK) * BLOCK

    def _content(self, header: tarfile.TarInfo, data: int) -> bytes:
        if header.size > MAX_EXTENSION:
            raise self._bad(f"a name or header of {header.size:,} bytes")
        self._end(data, header.size)
        return self._read(data, header.size)

    def _pax_records(self, content: bytes) -> dict[bytes, bytes]:
        """Of `LENGTH KEY=VALUE\\n` one after the other."""
        records: dict[bytes, bytes] = {}
        start = 0
        while start < len(content) and content[start]:
            digits = content[start : start + 8].partition(b" ")[0]
            end = start + int(digits) if digits.isdigit() else 0
            if not start < end <= len(content) or content[end - 1] != ord("\n"):
                raise self._bad("a damaged pax header")
            key, _, value = content[start + len(digits) + 1 : end - 1].partition(b"=")
            if key.startswith(b"GNU.sparse."):
                raise self._bad("a sparse file, which is not stored as one piece")
            records[key], start = value, end
        return records

    def _pax_size(self, size: bytes) -> int:
        if not size.isdigit() or len(size) > 20:
            raise self._bad("a damaged pax header: its size is no number")
        return int(size)

    def _expect_zeros(self) -> None:
        rest = self.archive_size - self.offset
        if rest > MAX_PADDING or any(self._read(self.offset, rest)):
            raise self._bad(f"{rest - BLOCK:,} bytes follow the end mark, as if archives had been joined")

    def _refuse_compressed(self) -> None:
        start = self._read(0, 8)
        for magic, kind in _COMPRESSED.items():
            if start.startswith(magic):
                raise UserError(
                    f"{self.path} is compressed ({kind}); unpack it to a plain .tar, "
                    "which allows random access"
                )

    def _read(self, offset: int, size: int) -> bytes:
        return os.pread(self.descriptor, size, offset)

    def _bad(self, reason: str) -> BadTarError:
        return BadTarError(self.path, self.offset, reason)
