"""The entries of a COCO file, checked field by field; ValueError says what is wrong with one."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from itpn.data.masks import HUGE, Outline, Region, checked, packed, region_of
from itpn.data.picture import Size

Entry = Mapping[str, Any]

BEYOND = 1.0
"""Pixels that a box may reach outside its image by rounding."""

ALIKE = 0.5
"""Least intersection over union of an object's box and the box around its mask."""


class Frame(NamedTuple):
    """An image, without its pixels."""

    place: int
    """Among the images of the file, from 0."""
    name: str
    size: Size


class Annotation(NamedTuple):
    id: int
    image: int
    """The index of its image."""
    label: int
    box: Region
    """x, y, width, height."""
    area: float
    crowd: bool
    mask: bytes
    """See `itpn.data.masks.packed`."""


def fields_of(entry: object) -> Entry:
    if not isinstance(entry, dict):
        raise ValueError(f"it is {brief(entry)}, not an object with fields")
    return entry


def whole(entry: Entry, field: str, low: int = -(1 << 63), high: int = (1 << 63) - 1) -> int:
    value = entry.get(field)
    if type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not int:
        raise ValueError(f"{field}: {brief(value)} is not a whole number")
    if not low <= value <= high:
        raise ValueError(f"{field}: {brief(value)} is not in {low:,} to {high:,}")
    return value


def text(entry: Entry, field: str) -> str:
    value = entry.get(field)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{field}: {brief(value)} is not a text")
    return value


def annotation(
    entry: Entry, frames: Mapping[int, Frame], labels: Mapping[int, int]
) -> tuple[Annotation, str]:
    """One that can be used, and what is odd about it all the same, if anything.

    Args:
        labels: By category id.
    """
    number, image, category = (whole(entry, field) for field in ("id", "image_id", "category_id"))
    if image not in frames:
        raise ValueError("image_id: no such image")
    if category not in labels:
        raise ValueError("category_id: no such category")
    crowd = entry.get("iscrowd", 0)
    if crowd not in (0, 1):
        raise ValueError(f"iscrowd: {brief(crowd)} is neither 0 nor 1")
    frame = frames[image]
    box = _box(entry.get("bbox"), frame.size)
    try:
        outline = checked(entry.get("segmentation"), frame.size)
    except ValueError as error:
        raise ValueError(f"segmentation: {error}") from error
    odd = _oddity(box, outline, frame.size)
    area = _number(entry["area"], "area") if "area" in entry else box[2] * box[3]
    if area < 0:
        raise ValueError("area: it is below 0")
    label, mask = labels[category], packed(outline)
    return Annotation(number, frame.place, label, box, area, bool(crowd), mask), odd


def _oddity(box: Region, outline: Outline | None, size: Size) -> str:
    x, y, width, height = box
    common = 1.0 if outline is None else _overlap((x, y, x + width, y + height), region_of(outline, size))
    if common == 0:
        raise ValueError("bbox: it does not meet the segmentation")
    if common < ALIKE:
        return f"bbox: it is not the segmentation's, intersection over union below {ALIKE}"
    beyond = -min(x, y, size[1] - x - width, size[0] - y - height)
    return "bbox: it reaches outside the image" if beyond > BEYOND else ""


def _overlap(one: Region, other: Region) -> float:
    """Intersection over union."""
    across, down = (max(0.0, min(one[i + 2], other[i + 2]) - max(one[i], other[i])) for i in (0, 1))
    areas = ((right - left) * (bottom - top) for left, top, right, bottom in (one, other))
    return across * down / (sum(areas) - across * down)


def _box(value: object, size: Size) -> Region:
    if not isinstance(value, list) or len(value) != 4:
        raise ValueError(f"bbox: {brief(value)} is not x, y, width, height")
    x, y, width, height = (_number(part, "bbox") for part in value)
    if width <= 0 or height <= 0:
        raise ValueError("bbox: width or height is not above 0")
    if x >= size[1] or y >= size[0] or x + width <= 0 or y + height <= 0:
        raise ValueError("bbox: it lies outside the image")
    if max(-x, x + width) > 4 * size[1] or max(-y, y + height) > 4 * size[0]:
        raise ValueError("bbox: it reaches outside the image by several times its size")
    return x, y, width, height


def _number(value: object, field: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{field}: {brief(value)} is not a number")
    if not abs(value) < HUGE:
        raise ValueError(f"{field}: {brief(value)} is not finite or too large")
    return float(value)


def brief(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:40]}…"
