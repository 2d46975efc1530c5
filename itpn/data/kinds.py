"""What a file is that cannot be read as an image, told from its first bytes, and what to do about it."""

from pathlib import Path
from typing import BinaryIO, NamedTuple

from itpn.data.storage import STARTS as TIFF_STARTS

_MAGICK = "convert such a file, as with ImageMagick: magick IN OUT.png"
_DAMAGED = "it is damaged or cut short; get it anew"
HEAD = 512
"""Bytes of a file that tell what it is."""


class Kind(NamedTuple):
    """A kind of file."""

    name: str
    """With its article."""
    cure: str = _MAGICK
    """Cure for a file that cannot be read."""
    is_image: bool = True
    ending: str = ""
    """What its name should end in; empty where no image is read from it."""

    @property
    def cure_of_name(self) -> str:
        """What to do about a file that is not found for its ending."""
        return f"name such a file to end in {self.ending}" if self.ending else self.cure


def _ours(name: str, ending: str) -> Kind:
    return Kind(name, _DAMAGED, True, ending)


def _none(name: str, cure: str) -> Kind:
    return Kind(name, cure, False)


_JPEG, _TIFF = _ours("a JPEG", ".jpg"), _ours("a TIFF", ".tif")
_HEIC, _AVIF, _JP2, _JXL = Kind("an HEIC"), Kind("an AVIF"), Kind("a JPEG 2000"), Kind("a JPEG XL")
_PSD, _EXR = Kind("a Photoshop file"), Kind("an OpenEXR")
_DICOM = Kind(
    "a DICOM", "convert such a file, as with DCMTK: dcmj2pnm --write-png --min-max-window IN OUT.png"
)
_NUMPY = Kind("a NumPy array", "store uint8 arrays with PIL.Image.fromarray(numpy.load(IN)).save(OUT)")
_FITS = Kind("a FITS", "store its planes as 8-bit PNG")
_RAW = Kind("a camera's raw file", "develop such a file, as with dcraw: dcraw -T IN")

ENDINGS = {
    **dict.fromkeys((".jfif", ".jpe", ".jif", ".pjpeg", ".pjp"), _JPEG),
    **dict.fromkeys((".heic", ".heif", ".hif"), _HEIC),
    **dict.fromkeys((".jp2", ".j2k", ".jpx", ".jpf", ".j2c"), _JP2),
    **dict.fromkeys((".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".rw2", ".raf"), _RAW),
    **dict.fromkeys((".dcm", ".dicom"), _DICOM),
    **dict.fromkeys((".fits", ".fit"), _FITS),
    ".avif": _AVIF,
    ".jxl": _JXL,
    ".psd": _PSD,
    ".exr": _EXR,
    ".npy": _NUMPY,
}
"""Kinds of images that are not searched for, by the ending that says it."""

_STARTS = (
    (b"\xff\xd8\xff", _JPEG),
    (b"\x89PNG\r\n\x1a\n", _ours("a PNG", ".png")),
    (b"GIF8", _ours("a GIF", ".gif")),
    (b"BM", _ours("a BMP", ".bmp")),
    *((start, _TIFF) for start in TIFF_STARTS),
    (b"\0\0\0\x0cjP  ", _JP2),
    (b"\xff\x4f\xff\x51", _JP2),
    (b"\0\0\0\x0cJXL ", _JXL),
    (b"\xff\x0a", _JXL),
    (b"8BPS", _PSD),
    (b"v/1\x01", _EXR),
    (b"\x93NUMPY", _NUMPY),
    (b"SIMPLE  =", _FITS),
    (b"\x89HDF\r\n\x1a\n", _none("an HDF5", "store the images in it as PNG")),
    (b"PK\x03\x04", _none("a ZIP archive", "unpack it")),
    (b"\x1f\x8b", _none("a gzip file", "unpack it")),
    (b"%PDF", _none("a PDF", "draw its pages, such as with pdftoppm -png IN OUT")),
    (b"%!PS", _none("a PostScript file", "draw it, such as with gs -sDEVICE=png16m -o OUT.png IN")),
    (b"version https://git-lfs", _none("a pointer of Git LFS", "fetch the file itself with git lfs pull")),
    (b"\0\5\x16\7", _none("the metadata of a file of macOS", "remove it")),
)
_TEXTS = (
    (b"<svg", _none("an SVG drawing", "draw it, such as with rsvg-convert IN -o OUT.png")),
    (b"<html", _none("a web page", "the download failed; get the image itself")),
    (b"<!doctype html", _none("a web page", "the download failed; get the image itself")),
)
_BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), _AVIF),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"hevc", b"mif1", b"msf1"), _HEIC),
}


def kind_of(head: bytes) -> Kind | None:
    """What a file is that begins so; None where that is not known."""
    if head[4:8] == b"ftyp":
        return _BRANDS.get(head[8:12]) or _none("a film", "store frames of it as images, such as with ffmpeg")
    if head[128:132] == b"DICM":
        return _DICOM
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return _ours("a WebP", ".webp")
    if kind := next((kind for start, kind in _STARTS if head.startswith(start)), None):
        return kind
    text = head.lower()
    return next((kind for word, kind in _TEXTS if word in text), None)


def kind_of_file(path: Path) -> Kind | None:
    try:
        with open(path, "rb") as file:
            return kind_of(file.read(HEAD))
    except OSError:
        return None


def unreadable(file: BinaryIO, formats: str) -> str:
    """Why a file is not read that no decoder takes."""
    file.seek(0)
    kind = kind_of(file.read(HEAD))
    if kind is None:
        return f"not an image in one of the formats {formats}"
    if kind.is_image:
        return f"{kind.name}, which cannot be read; {kind.cure}"
    return f"{kind.name}, not an image; {kind.cure}"
