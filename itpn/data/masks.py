"""Masks of objects as COCO writes them, polygons and run lengths, from files that nobody vouches for.

Run lengths count pixels down the columns, alternately outside and inside the mask, beginning outside. Points
are x, y in pixels; a pixel is inside a polygon if its centre is. The checks raise ValueError, with a reason
that can be shown, before anything of the mask's size is allocated.
"""

from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from itpn.data.limits import check_size
from itpn.data.picture import Size

Array = NDArray[Any]
Mask = NDArray[np.bool_]
Region = tuple[float, float, float, float]
"""x1, y1, x2, y2 in pixels."""
Outline = list[Array] | Array
"""Polygons, each float64 [n, 2], or run lengths, int64 [n]."""

MAX_POINTS = 1 << 16
"""Points of all polygons of an object."""

MAX_LENGTH = 1 << 20
"""Pixels along all polygons of an object: COCO's own rasteriser takes some 80 bytes for each."""

HUGE = 1e12
"""What no coordinate, side or area reaches."""

_POLYGONS, _RUNS = b"P", b"R"
_OFFSET, _MORE, _SIGN, _DIGITS = 48, 0x20, 0x10, 7


def checked(segmentation: object, size: Size) -> tuple[Outline | None, str]:
    """A segmentation of an image, None where it is missing or an empty list; and what is left out of it."""
    match _as_coco_writes(segmentation):
        case None | []:
            return None, ""
        case [*polygons]:
            return _checked_polygons(polygons)
        case {"size": stated, "counts": counts}:
            if stated != list(size):
                order = "; its height goes before its width" if stated == [*size[::-1]] else ""
                raise ValueError(
                    f"run lengths of size {_brief(stated)}, but the image has {list(size)}{order}"
                )
            return _checked_runs(counts, size), ""
        case _:
            raise ValueError("neither polygons nor run lengths with size and counts")


def _as_coco_writes(segmentation: object) -> object:
    """The same where a list around a polygon is missing, points are pairs, or run lengths are in a list."""
    match segmentation:
        case [{} as runs]:
            return runs
        case [int() | float(), *_]:
            return [segmentation]
        case [[int() | float(), _], *_] if _is_list_of_pairs(segmentation):
            return [_flat(segmentation)]
        case [*polygons]:
            return [_flat(polygon) if _is_list_of_pairs(polygon) else polygon for polygon in polygons]
    return segmentation


def _is_list_of_pairs(polygon: object) -> TypeGuard[list[list[object]]]:
    return (
        isinstance(polygon, list)
        and polygon != []
        and all(isinstance(point, list) and len(point) == 2 for point in polygon)
    )


def _flat(points: list[list[object]]) -> list[object]:
    return [value for point in points for value in point]


def packed(outline: Outline | None) -> bytes:
    """In few bytes; none at all for None."""
    if outline is None:
        return b""
    if isinstance(outline, list):
        end = np.full(2, np.nan).tobytes()
        return _POLYGONS + b"".join(points.tobytes() + end for points in outline)
    return _RUNS + compressed(outline)


def unpacked(data: bytes) -> Outline | None:
    """The inverse of `packed`."""
    if not data:
        return None
    if data[:1] == _RUNS:
        return runs_of_text(data[1:])
    points = np.frombuffer(data, offset=1).reshape(-1, 2)
    ends = np.flatnonzero(np.isnan(points[:, 0]))
    return [points[start:end] for start, end in zip([0, *(ends[:-1] + 1)], ends, strict=True)]


def _checked_polygons(polygons: Sequence[object]) -> tuple[list[Array], str]:
    """Those that are sound, at least one of which has an area, and what is left out."""
    if sum(len(polygon) for polygon in polygons if isinstance(polygon, list)) > 2 * MAX_POINTS:
        raise ValueError(f"polygons of more points than the limit of {MAX_POINTS:,}")
    checked, reasons = [], []
    for polygon in polygons:
        try:
            checked.append(_checked_polygon(polygon))
        except ValueError as error:
            reasons.append(str(error))
    if not checked:
        raise ValueError(reasons[0])
    if not sum(map(_length, checked)) <= MAX_LENGTH:
        raise ValueError(f"polygons longer than the limit of {MAX_LENGTH:,} pixels")
    if not any(map(_area, checked)):
        raise ValueError("polygons without area")
    odd = f"{len(reasons)} of {len(polygons)} polygons left out: {reasons[0]}" if reasons else ""
    return checked, odd


def _checked_polygon(polygon: object) -> Array:
    if not isinstance(polygon, list):
        raise ValueError("a polygon that is no list of numbers")
    points = (
        np.array(polygon) if all(type(value) in (int, float) for value in polygon) else np.empty(0, object)
    )
    if points.dtype.kind not in "if":
        raise ValueError("a polygon that is no list of numbers")
    if len(points) < 6 or len(points) % 2:
        raise ValueError(f"a polygon of {len(points)} numbers; x, y of three points or more are needed")
    if not (np.abs(points) < HUGE).all():
        raise ValueError("a polygon with numbers that are not finite or too large")
    return points.astype(np.float64).reshape(-1, 2)


def _length(points: Array) -> float:
    """At least that of all sides, but that of few sides is not measured."""
    most = len(points) * float(np.ptp(points, axis=0).sum())
    if most <= MAX_LENGTH / 16:
        return most
    return float(np.abs(np.diff(points, axis=0, append=points[:1])).sum())


def _area(points: Array) -> float:
    x, y = (points - points[0]).T  # so that the side back to the first adds nothing
    return abs(float(x[:-1] @ y[1:] - x[1:] @ y[:-1])) / 2


def _checked_runs(counts: object, size: Size) -> Array:
    check_size(size[1], size[0])
    num_pixels = size[0] * size[1]
    if isinstance(counts, str):
        if counts.startswith("b'"):  # bytes as Python shows them; ' is no digit of run lengths
            counts = counts[2:-1].replace("\\\\", "\\")
        runs = runs_of_text(counts.encode("ascii", "replace"))
    else:
        runs = np.array(counts) if counts and _is_list_of(counts, int) else np.empty(0, object)
        if runs.dtype.kind != "i":
            raise ValueError("run lengths that are neither text nor a list of whole numbers")
    # Sums of what is out of range could overflow.
    if runs.min() < 0 or runs.max() > num_pixels or runs.sum() != num_pixels:
        raise ValueError(f"run lengths that do not add up to the image's {num_pixels:,} pixels")
    if not runs[1::2].any():
        raise ValueError("a mask without pixels")
    return runs


def _is_list_of(values: object, *types: type) -> bool:
    return isinstance(values, list) and set(map(type, values)) <= {*types}


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def runs_of_text(text: bytes) -> Array:
    """COCO's compressed run lengths: from the fourth on differences to the one before last, in digits of five
    bits, the lowest first; the sixth bit says that more follow, the highest bit of the last is the sign."""
    symbols = np.frombuffer(text, np.uint8).astype(np.int64) - _OFFSET
    if not len(symbols) or symbols.min() < 0 or symbols.max() > 63 or symbols[-1] & _MORE:
        raise ValueError("run lengths that are no compressed text")
    last = np.flatnonzero(symbols & _MORE == 0)
    starts = np.concatenate([[0], last[:-1] + 1])
    num_digits = last - starts + 1
    if num_digits.max() > _DIGITS:
        raise ValueError("run lengths longer than any image")
    place = np.arange(len(symbols)) - np.repeat(starts, num_digits)
    runs: Array = np.add.reduceat((symbols & 31) << 5 * place, starts)
    runs -= np.where(symbols[last] & _SIGN, 1, 0) << 5 * num_digits
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return runs


def compressed(runs: Array) -> bytes:
    """The inverse of `runs_of_text`."""
    numbers = runs.astype(np.int64)
    numbers[3:] -= runs[1:-2]
    powers = 5 * np.arange(_DIGITS)
    beyond = np.where(numbers < 0, ~numbers, numbers)[:, None] >> np.maximum(powers - 1, 0)
    used = (beyond > 0) | (powers == 0)  # a digit, and those before it
    digits = (numbers[:, None] >> powers) & 31
    more = np.pad(used[:, 1:], ((0, 0), (0, 1)))
    text: bytes = (digits + _MORE * more + _OFFSET)[used].astype(np.uint8).tobytes()
    return text


def run_lengths(mask: Mask) -> Array:
    """Of a mask [H, W]."""
    flat = mask.ravel(order="F")
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1, [flat.size]])
    runs = np.diff(starts)
    return np.concatenate([[0], runs]) if flat[0] else runs


def region_of(outline: Outline, size: Size) -> Region:
    """The smallest box around a mask of an image."""
    if isinstance(outline, list):
        points = np.concatenate(outline)
        return *points.min(0).tolist(), *points.max(0).tolist()
    ends = outline.cumsum()
    first, last = (ends - outline)[1::2], ends[1::2] - 1
    first, last = first[last >= first], last[last >= first]
    across = first // size[0] != last // size[0]  # such a run holds the foot of a column and the head of one
    top = 0 if across.any() else int((first % size[0]).min())
    bottom = size[0] if across.any() else int((last % size[0]).max()) + 1
    return int(first[0]) // size[0], top, int(last[-1]) // size[0] + 1, bottom


def drawn(outline: Outline, size: Size) -> Mask:
    """The mask [H, W] of an image."""
    if isinstance(outline, list):
        united: Mask = np.logical_or.reduce([fill(points, size) for points in outline])
        return united
    inside = np.arange(len(outline)) % 2 == 1
    return np.repeat(inside, outline).reshape(size, order="F")


def cropped(outline: Outline, size: Size, region: Region, resolution: int) -> Mask:
    """A region of an image's mask, scaled to [resolution, resolution]."""
    left, top, right, bottom = region
    square = resolution, resolution
    if isinstance(outline, list):
        scale = resolution / np.array([right - left, bottom - top])
        return drawn([(points - (left, top)) * scale for points in outline], square)
    image = Image.fromarray(drawn(outline, size).astype(np.uint8) * 255)
    return np.asarray(image.resize(square, Image.Resampling.BILINEAR, box=region)) > 127


def fill(points: Array, size: Size) -> Mask:
    """The pixels of [H, W] whose centres lie inside a polygon [n, 2], an odd number of times around."""
    H, W = size
    ends = np.roll(points, -1, axis=0)
    low, high = np.minimum(points[:, 1], ends[:, 1]), np.maximum(points[:, 1], ends[:, 1])
    first, last = (np.clip(np.ceil(y - 0.5), 0, H).astype(np.int64) for y in (low, high))
    counts = last - first  # rows whose centres a side crosses
    side = np.repeat(np.arange(len(points)), counts)
    row = np.arange(len(side)) + np.repeat(first - counts.cumsum() + counts, counts)
    (x, y), (run, rise) = points[side].T, (ends - points)[side].T
    crossing = x + (row + 0.5 - y) / rise * run
    column = np.clip(np.ceil(crossing - 0.5), 0, W).astype(np.int64)
    crossings = np.bincount(row * (W + 1) + column, minlength=H * (W + 1)).reshape(H, W + 1)
    inside: Mask = crossings.cumsum(1)[:, :W] % 2 == 1
    return inside
