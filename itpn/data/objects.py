"""The objects of an image as a view shows them: boxes and masks follow the cut, the scale and the mirror."""

from typing import NamedTuple

import numpy as np

from itpn.data.coco import Coco
from itpn.data.masks import cropped
from itpn.data.picture import Box, Size
from itpn.data.views import Array

LEAST_SIDE = 1.0
"""In pixels of the view; an object of which less is left has vanished."""

UNKNOWN = 255
"""In every pixel of the mask of an object that has none."""


class Seen(NamedTuple):
    boxes: Array
    """x1, y1, x2, y2 in pixels of the view, float32 [n, 4]."""
    labels: Array
    """int64 [n]"""
    masks: Array
    """Each laid over its box: 1 inside, 0 outside, everywhere 255 where it is unknown; uint8 [n, S, S]."""


def objects_seen(coco: Coco, index: int, box: Box, size: Size, *, mirrored: bool, resolution: int) -> Seen:
    """What is left of an image's objects, but for crowds, in a box of it that is scaled to `size`.

    Boxes are cut off at the view's borders. Objects of whose box or mask nothing is left vanish.
    """
    objects = coco.objects
    numbers = np.array([number for number in objects.of(index) if not objects.crowd[number]], np.int64)
    left, top, width, height = box
    corner, extent = np.array([left, top] * 2), np.array([width, height] * 2)
    scale = np.array(size[::-1] * 2) / extent
    boxes = objects.boxes[numbers]
    regions = np.clip(
        np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1), corner, corner + extent
    )
    boxes = np.clip((regions - corner) * scale, 0, size[::-1] * 2)  # not a rounding beyond
    left_over = (boxes[:, 2:] - boxes[:, :2] >= LEAST_SIDE).all(1)
    numbers, regions, boxes = numbers[left_over], regions[left_over], boxes[left_over]
    masks = np.full((len(numbers), resolution, resolution), UNKNOWN, np.uint8)
    for mask, number, region in zip(masks, numbers, regions.tolist(), strict=True):
        outline = objects.outline(number)
        if outline is not None:
            mask[:] = cropped(outline, coco.size(index), tuple(region), resolution)
    if mirrored:
        boxes[:, [0, 2]] = size[1] - boxes[:, [2, 0]]
        masks = masks[..., ::-1]
    visible = masks.any((1, 2))
    return Seen(boxes[visible].astype(np.float32), objects.labels[numbers][visible], masks[visible])
