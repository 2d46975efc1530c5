"""The units of a file's boxes: COCO's are x, y, width and height in pixels, and others look alike."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from itpn.data.coco_entries import ALIKE, BEYOND, Frame, Id, area_in, box_in, fields_of, ident, outline_in
from itpn.data.masks import Array, region_of
from itpn.errors import UserError

NUM_BOXES = 2000
"""How many annotations are looked at, spread evenly over the file."""

MOST, ALL = 0.5, 0.97
"""Shares of boxes. A file is wrong if fewer than most fit; it is in other units if all fit in these."""

MARGIN, FAR = 0.02, 0.5
"""Shares of an image's side: what a box may well reach beyond it, and what no more than few do."""


class Units(NamedTuple):
    name: str
    cure: str
    corners: Callable[[Array], Array]
    """From boxes [n, 4] to x1, y1, x2, y2."""
    of_image: bool = False
    """Whether 1 is the image's width or height."""


def _sides(boxes: Array) -> Array:
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def _corners(boxes: Array) -> Array:
    return boxes


def _centres(boxes: Array) -> Array:
    return np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], axis=1)


_SHARES = (
    "multiply x and width by the image's width, y and height by its height, and polygons alike if they are "
    "in shares"
)
_HALVES = "take half of width from x, half of height from y"
OURS = Units("x, y, width, height", "", _sides)
OTHERS = (
    Units("x1, y1, x2, y2", "write x1, y1, x2 - x1, y2 - y1", _corners),
    Units("the centre's x, y, then width, height", _HALVES, _centres),
    Units(
        "x, y, width, height in shares of the image",
        f"{_SHARES}; if x, y are the centre's, as YOLO has them, {_HALVES}",
        _sides,
        of_image=True,
    ),
    Units("x1, y1, x2, y2 in shares of the image", f"{_SHARES}; write x2 - x1, y2 - y1", _corners, True),
    Units(
        "the centre's x, y, then width, height, in shares of the image",
        f"{_SHARES}; {_HALVES}",
        _centres,
        of_image=True,
    ),
)


class Seen(NamedTuple):
    """What some annotations say."""

    places: list[int]
    """Among the annotations of the file."""
    names: list[str]
    """Of their images."""
    boxes: Array
    sizes: Array
    """Width and height of their images, twice, [n, 4]."""
    regions: Array
    """Around their masks, x1, y1, x2, y2; NaN where there is none or it is in other units as well."""
    areas: Array
    """NaN where there is none."""


def check_units(file: Path, entries: Sequence[object], frames: Mapping[Id, Frame]) -> list[str]:
    """What to say of boxes where some fit their images and masks, but all do in other units.

    Raises:
        UserError: Most boxes fit neither image nor mask, or are in other units.
    """
    seen = _seen(entries, frames)
    if not len(seen.boxes):
        return []
    fits = _fits(seen, OURS)
    others = [(float(_fits(seen, units).mean()), units) for units in OTHERS]
    share, units = max(others, key=lambda other: other[0])
    if _has_areas(seen, OTHERS[0]) and not _has_areas(seen, OURS):
        fits[:], share, units = False, 1.0, OTHERS[0]
    if share < ALL:
        fits, units = _fits(seen, OURS, FAR), OURS
    if fits.mean() >= (ALL if share >= ALL else MOST):
        return []
    said = _said(seen, fits, units)
    if fits.mean() < MOST:
        raise UserError(f"{file}: {said}")
    return [said]


def _said(seen: Seen, fits: Array, units: Units) -> str:
    """How many boxes do not fit, which is the first, and what to do."""
    first = np.flatnonzero(~fits)[0]
    box = ", ".join(f"{value:.6g}" for value in seen.boxes[first])
    width, height = seen.sizes[first, :2].tolist()
    return (
        f"{(~fits).sum():,} of {len(fits):,} boxes looked at do not fit as {OURS.name} in pixels, such as "
        f"[{box}] of entry {seen.places[first]} of 'annotations' ({seen.names[first]}, {width:.0f} x "
        f"{height:.0f}); "
        + ("correct them" if units is OURS else f"they look like {units.name}: {units.cure}")
    )


def _fits(seen: Seen, units: Units, reach: float = MARGIN) -> Array:
    """Which boxes lie in their images, and where the masks are, if they are in some units.

    Args:
        reach: Share of an image's side that they may lie outside.
    """
    shares = (np.abs(seen.boxes) <= 1).all(1) & (seen.sizes > 2).all(1)
    corners = units.corners(seen.boxes) * (seen.sizes if units.of_image else 1)
    margin = np.maximum(BEYOND, reach * seen.sizes)
    inside = (corners >= -margin).all(1) & (corners <= seen.sizes + margin).all(1)
    inside &= (corners[:, 2:] > corners[:, :2]).all(1) & (shares == units.of_image)
    common = np.minimum(corners, seen.regions)[:, 2:] - np.maximum(corners, seen.regions)[:, :2]
    both = np.maximum(common, 0).prod(1)
    union = _areas(corners) + _areas(seen.regions) - both
    apart = both < ALIKE * union  # not where there is no mask
    fits: Array = inside & ~apart
    return fits


def _has_areas(seen: Seen, units: Units) -> bool:
    """Whether the areas of objects without masks are those of their boxes in some units."""
    known = np.isfinite(seen.areas) & np.isnan(seen.regions[:, 0])
    same = np.isclose(_areas(units.corners(seen.boxes)), seen.areas, rtol=0.01, atol=1)[known]
    return bool(len(same)) and bool(same.mean() >= ALL)


def _areas(corners: Array) -> Array:
    areas: Array = (corners[:, 2:] - corners[:, :2]).prod(1)
    return areas


def _seen(entries: Sequence[object], frames: Mapping[Id, Frame]) -> Seen:
    found = [*_looked_at(entries, frames)]
    places, names = [place for place, *_ in found], [name for _, name, _ in found]
    rows = np.array([row for *_, row in found], np.float64).reshape(-1, 13)
    return Seen(places, names, rows[:, :4], rows[:, 4:8], rows[:, 8:12], rows[:, 12])


def _looked_at(
    entries: Sequence[object], frames: Mapping[Id, Frame]
) -> Iterable[tuple[int, str, tuple[float, ...]]]:
    """Places, images' names and numbers of annotations that have a box."""
    num = min(NUM_BOXES, len(entries))
    for place in np.linspace(0, len(entries) - 1, num).astype(np.int64).tolist():
        try:
            entry = fields_of(entries[place])
            frame = frames[ident(entry, "image_id")]
            box, area = box_in(entry), area_in(entry)
            outline, _ = outline_in(entry, frame.size)
        except (ValueError, KeyError):  # which is told when all are read
            continue
        region = (np.nan,) * 4 if outline is None else region_of(outline, frame.size)
        if max(region) <= 1:
            region = (np.nan,) * 4
        height, width = frame.size
        yield (
            place,
            frame.name,
            (*box, width, height, width, height, *region, np.nan if area is None else area),
        )
