"""The entries of a COCO file, checked field by field; ValueError says what is wrong with one."""

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeGuard

from itpn.data.masks import HUGE, Outline, Region, checked, packed, region_of
from itpn.data.picture import Size

Entry = Mapping[str, Any]

BEYOND = 1.0
"""Pixels that a box may reach outside its image by rounding."""

ALIKE = 0.5
"""Least intersection over union of an object's box and the box around its mask."""


Id = int | str
"""What an image or a category is told from others by."""

_WHOLE = re.compile("-?[0-9]{1,40}")


class Frame(NamedTuple):
    """An image, without its pixels."""

    place: int
    """Among the images of the file, from 0."""
    name: str
    size: Size


class Annotation(NamedTuple):
    id: int
    """-1 where it has none that is a number of 64 bits."""
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


def ident(entry: Entry, field: str) -> Id:
    """An id, which only has to equal others: a whole number, also one written as text, or another text."""
    value = entry.get(field)
    if type(value) is float and value.is_integer():
        return int(value)
    if isinstance(value, str) and _WHOLE.fullmatch(value):
        return int(value)
    if type(value) is int or (isinstance(value, str) and value):
        return value
    raise ValueError(f"{field}: " + (f"{brief(value)} is no id" if field in entry else "it is missing"))


def id_in(entry: Entry) -> Id | None:
    """An annotation's own id, which it can do without."""
    with suppress(ValueError):
        return ident(entry, "id")
    return None


def is_number(value: object) -> TypeGuard[int]:
    """Whether it is a whole number of 64 bits."""
    return type(value) is int and -(1 << 63) <= value < 1 << 63


def numbered(ids: Sequence[Id]) -> list[int]:
    """The ids themselves, if all are whole numbers of 64 bits; else their places, counted from 1."""
    numbers = [number for number in ids if is_number(number)]
    return numbers if len(numbers) == len(ids) else [*range(1, len(ids) + 1)]


def whole(entry: Entry, field: str, low: int, high: int) -> int:
    value = entry.get(field)
    if isinstance(value, str) and _WHOLE.fullmatch(value):
        value = int(value)
    if type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not int:
        raise ValueError(f"{field}: {brief(value)} is not a whole number")
    if not low <= value <= high:
        raise ValueError(f"{field}: {brief(value)} is not in {low:,} to {high:,}")
    return value


def text(entry: Entry, field: str) -> str:
    """A text, or a number as one."""
    value = entry.get(field)
    if type(value) is int:
        return str(value)
    try:
        is_text = isinstance(value, str) and bool(os.fsencode(value))
    except UnicodeEncodeError:  # half of a character
        is_text = False
    if not is_text:
        raise ValueError(f"{field}: {brief(value)} is not a text")
    return str(value)


def annotation(entry: Entry, frames: Mapping[Id, Frame], labels: Mapping[Id, int]) -> tuple[Annotation, str]:
    """One that can be used, and what is odd about it all the same, if anything.

    Args:
        frames, labels: By the ids of images and of categories.
    """
    image, category = ident(entry, "image_id"), ident(entry, "category_id")
    if image not in frames:
        raise ValueError(f"image_id: no such image, {brief(image)}")
    if category not in labels:
        raise ValueError(f"category_id: no such category, {brief(category)}")
    crowd = entry.get("iscrowd") or 0
    if crowd not in (0, 1, "0", "1"):
        raise ValueError(f"iscrowd: {brief(crowd)} is neither 0 nor 1")
    frame = frames[image]
    outline, odd = outline_in(entry, frame.size)
    is_without_box = outline is not None and not entry.get("bbox")
    box = _box_around(outline, frame.size) if outline is not None and is_without_box else box_in(entry)
    odd = _oddity(box, outline, frame.size) or odd
    area = area_in(entry)
    number = id_in(entry)
    found = Annotation(
        id=number if is_number(number) else -1,
        image=frame.place,
        label=labels[category],
        box=box,
        area=box[2] * box[3] if area is None else area,
        crowd=bool(int(crowd)),
        mask=packed(outline),
    )
    return found, odd


def outline_in(entry: Entry, size: Size) -> tuple[Outline | None, str]:
    """The mask, and what is left out of it."""
    try:
        outline, odd = checked(entry.get("segmentation"), size)
    except ValueError as error:
        raise ValueError(f"segmentation: {error}") from error
    return outline, odd and f"segmentation: {odd}"


def area_in(entry: Entry) -> float | None:
    area = None if entry.get("area") is None else _number(entry["area"], "area")
    if area is not None and area < 0:
        raise ValueError("area: it is below 0")
    return area


def box_in(entry: Entry) -> Region:
    """x, y, width and height as they are written."""
    value = entry.get("bbox")
    if not value and not entry.get("segmentation"):
        raise ValueError(
            f"bbox: {brief(value)}, and there is no segmentation to tell it; add x, y, width, height"
        )
    if not isinstance(value, list) or len(value) != 4:
        turned = "; of a turned box, write the upright one around it" if isinstance(value, list) else ""
        raise ValueError(f"bbox: {brief(value)} is not x, y, width, height{turned}")
    x, y, width, height = (_number(part, "bbox") for part in value)
    return x, y, width, height


def _box_around(outline: Outline, size: Size) -> Region:
    x, y, right, bottom = region_of(outline, size)
    return x, y, right - x, bottom - y


def _oddity(box: Region, outline: Outline | None, size: Size) -> str:
    x, y, width, height = box
    if width <= 0 or height <= 0:
        raise ValueError("bbox: width or height is not above 0")
    if x >= size[1] or y >= size[0] or x + width <= 0 or y + height <= 0:
        raise ValueError(f"bbox: it lies outside the image of {size[1]:,} x {size[0]:,} pixels")
    if max(-x, x + width) > 4 * size[1] or max(-y, y + height) > 4 * size[0]:
        raise ValueError("bbox: it reaches outside the image by several times its size")
    common = 1.0 if outline is None else _overlap((x, y, x + width, y + height), region_of(outline, size))
    if common == 0:
        raise ValueError("bbox: it does not meet the segmentation")
    if common < ALIKE:
        return f"bbox: it is not the segmentation's, intersection over union below {ALIKE}"
    if x + width <= 1 and y + height <= 1 < min(size):
        return "bbox: it lies within a single pixel, as shares of an image do, which are no pixels"
    beyond = -min(x, y, size[1] - x - width, size[0] - y - height)
    return "bbox: it reaches outside the image" if beyond > BEYOND else ""


def _overlap(one: Region, other: Region) -> float:
    """Intersection over union."""
    across, down = (max(0.0, min(one[i + 2], other[i + 2]) - max(one[i], other[i])) for i in (0, 1))
    areas = ((right - left) * (bottom - top) for left, top, right, bottom in (one, other))
    return across * down / (sum(areas) - across * down)


def _number(value: object, field: str) -> float:
    if isinstance(value, str) and len(value) <= 40:
        with suppress(ValueError):
            value = float(value)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{field}: {brief(value)} is not a number")
    if not abs(value) < HUGE:
        raise ValueError(f"{field}: {brief(value)} is not finite or too large")
    return float(value)


def brief(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:40]}…"
