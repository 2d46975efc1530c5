from pathlib import Path

import pytest

from itpn.data.kinds import ENDINGS, kind_of
from itpn.data.picture import BadImageError, load_image

FTYP = b"\0\0\0\x18ftyp"


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (FTYP + b"heic", "an HEIC, which cannot be read; convert such a file, as with ImageMagick"),
        (FTYP + b"avif", "an AVIF, which cannot be read; convert"),
        (FTYP + b"isom", "a film, not an image; store frames"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000, which cannot be read; convert"),
        (b"\xff\x4f\xff\x51", "a JPEG 2000"),
        (b"\xff\x0a", "a JPEG XL"),
        (bytes(128) + b"DICM", "a DICOM, which cannot be read; convert such a file, as with DCMTK: dcmj2pnm"),
        (b"\x93NUMPY\x01\0", "a NumPy array, which cannot be read; store"),
        (b"8BPS\0\1", "a Photoshop file"),
        (b"v/1\x01", "an OpenEXR"),
        (b"SIMPLE  =   T", "a FITS"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5, not an image"),
        (b"PK\x03\x04", "a ZIP archive, not an image; unpack it"),
        (b"%PDF-1.7", "a PDF, not an image; draw its pages"),
        (b'<?xml version="1.0"?>\n<svg>', "an SVG drawing, not an image"),
        (b"<!DOCTYPE html>", "a web page, not an image; the download failed"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS, not an image; fetch the file itself"),
        (b"\0\5\x16\7\0\2", "the metadata of a file of macOS, not an image; remove it"),
        (b"GIF89a", "a GIF, which cannot be read; it is damaged or cut short"),
        (b"II*\0\xff\xff\xff\0", "a TIFF, which cannot be read; it is damaged or cut short"),
        (b"just bytes", "not an image in one of the formats JPEG, PNG"),
    ],
)
def test_files_that_are_no_readable_image_are_named_as_what_they_are(
    tmp_path: Path, head: bytes, words: str
) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(head + bytes(40))
    with pytest.raises(BadImageError) as caught:
        load_image(path)
    assert words in caught.value.reason


def test_endings_and_first_bytes_tell_the_same_kinds() -> None:
    heads = {".heic": FTYP + b"heic", ".avif": FTYP + b"avif", ".npy": b"\x93NUMPY", ".jfif": b"\xff\xd8\xff"}
    assert all(ENDINGS[ending] is kind_of(head) for ending, head in heads.items())
