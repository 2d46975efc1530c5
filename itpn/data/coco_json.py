"""Reading a file of annotations as JSON; what is something else is named as what it looks like."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from itpn.data.coco_entries import brief
from itpn.errors import UserError

MAX_JSON_BYTES = 1 << 33
"""The longest file that is read; it takes about six times as much memory meanwhile."""

OTHERS = {
    "shapes": "a file of LabelMe, which is of one image",
    "_via_img_metadata": "a project of the VGG Image Annotator",
    "regions": "a file of VoTT",
    "features": "GeoJSON",
}
"""What files of other programs have, and who writes them."""

OTHER_ANNOTATIONS = {
    "segments_info": "a panoptic file; name the instances file of the same images",
    "caption": "a file of captions; name the instances file of the same images",
    "score": "a file of detections; name the file of annotations",
}
"""What annotations without boxes have, and what their file is."""

_COMPRESSED = (b"\x1f\x8b", b"PK\x03\x04", b"BZh", b"\xfd7zXZ")


def read_json(file: Path) -> Mapping[str, Any]:
    """The object that a file holds; raises UserError."""
    try:
        num_bytes = file.stat().st_size
        data = file.read_bytes() if num_bytes <= MAX_JSON_BYTES else b""
    except OSError as error:
        raise UserError(
            f"cannot read {file}: {error.strerror}; check the path and its permissions"
        ) from error
    if num_bytes > MAX_JSON_BYTES:
        raise UserError(
            f"{file}: {num_bytes:,} bytes are more than the limit of {MAX_JSON_BYTES:,}; split it"
        )
    if data.startswith(_COMPRESSED):
        raise UserError(f"{file} is compressed; unpack it, and name the JSON file")
    content = _parsed(file, data)
    if isinstance(content, list):
        raise UserError(f"{file} is a list, as files of detections are; name the file of annotations")
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no object with images, annotations and categories")
    return content


def _parsed(file: Path, data: bytes) -> object:
    try:
        return json.loads(data)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} is not JSON: byte {error.start:,} is not UTF-8; save it as UTF-8, as with "
            "iconv -f LATIN1 -t UTF-8, if it is in Latin-1"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON: {error}; write or download it again") from error


def list_in(file: Path, content: Mapping[str, Any], name: str) -> Sequence[object]:
    """One of the file's lists; raises UserError."""
    entries = content.get(name)
    if isinstance(entries, list):
        return entries
    if name in content:
        raise UserError(f"{file}: {name!r} is {brief(entries)}, not a list; write a list of its entries")
    found = ", ".join(brief(key) for key in list(content)[:5]) or "nothing"
    other = next(
        (f"it looks like {what}; convert it to COCO" for key, what in OTHERS.items() if key in content), ""
    )
    if name == "categories" and isinstance(content.get("annotations"), list):
        other = 'add the classes, as "categories": [{"id": 1, "name": "object"}], with the annotations\' ids'
    raise UserError(f"{file} has no list {name!r}, but {found}; {other or 'name a COCO instances file'}")


def what_to_do(entry: object, reason: str) -> str:
    """About a file of whose annotations none can be used.

    Args:
        entry, reason: One of them, and what is wrong with it.
    """
    if reason.startswith("segmentation"):
        return "correct them, or leave 'segmentation' out to train on boxes alone"
    found = (what for key, what in OTHER_ANNOTATIONS.items() if isinstance(entry, dict) and key in entry)
    return f"it looks like {what}" if (what := next(found, "")) else "correct them, or name an instances file"
