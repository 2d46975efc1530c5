"""What a detector does with boxes: matching them with objects, drawing those to train on, pooling features.

Boxes are ``[n, 4]`` as x1, y1, x2, y2 in pixels of the padded image, per image in a list.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_iou, roi_align

BACKGROUND = -1
"""In place of an object's number; -2 is what is neither an object nor background."""
UNKNOWN = 255
"""In the mask of an object that has none."""
POOLED_STRIDES = (4, 8, 16, 32)
POOLED_SIDES = (112.0, 224.0, 448.0)
"""Square root of a box's area from which on it is pooled from the next coarser map."""

Sizes = Sequence[tuple[int, int]]
"""Height and width of each image without its padding."""
Generators = Sequence[torch.Generator | None]
"""A generator for each image; None: torch's global one."""


class Objects(NamedTuple):
    """What is to be found in one image: ``boxes [m, 4]``, ``labels [m]``, and ``masks [m, S, S]``, each laid
    over its box, of 0 and 1, or UNKNOWN throughout; or None where no masks are trained."""

    boxes: Tensor
    labels: Tensor
    masks: Tensor | None


def match(objects: Tensor, boxes: Tensor, matcher: Any) -> Tensor:
    """Each box's object by torchvision's ``Matcher``: its number, BACKGROUND, or -2 for neither."""
    if len(objects) == 0 or len(boxes) == 0:
        return torch.full((len(boxes),), BACKGROUND, device=boxes.device)
    matches: Tensor = matcher(box_iou(objects, boxes))
    return matches


def draw(matches: Tensor, num: int, positive_fraction: float, generator: torch.Generator | None) -> Tensor:
    """The ids of at most ``num`` candidates to train on, ascending.

    Positives fill up to their fraction, the background the rest; both are those with the smallest of random
    numbers drawn on the CPU, one for each candidate.
    """
    noise = torch.rand(len(matches), generator=generator, device="cpu").to(matches.device)

    def lowest(candidates: Tensor, most: int) -> Tensor:
        ids = candidates.nonzero().flatten()
        return ids[noise[ids].argsort()[:most]]

    positives = lowest(matches >= 0, int(num * positive_fraction))
    background = lowest(matches == BACKGROUND, num - len(positives))
    return torch.cat([positives, background]).sort().values


def shares(counts: Sequence[int], device: torch.device) -> Tensor:
    """A weight for each of the images' samples, laid end to end: a weighted sum is then the mean over images
    of the mean over each image's samples. Images without any count with 0."""
    num = torch.tensor(counts, device=device)
    return (1 / (num.clamp(min=1) * len(counts))).repeat_interleave(num)


def pool(maps: Sequence[Tensor], boxes: Sequence[Tensor], size: int) -> Tensor:
    """What each box sees, ``[n, F, size, size]``, in the order of images.

    RoIAlign whose bins and pixels are aligned (torchvision's own ``MultiScaleRoIAlign`` shifts them by half a
    pixel), with about a sample per pixel, in fp32. A box that is not finite sees its image's corner.

    Args:
        maps: ``[B, F, h, w]`` of strides 4, 8, 16, 32; a box takes the one that suits its size (FPN, eq. 1).
    """
    image = [torch.full_like(b[:, :1], i) for i, b in enumerate(boxes)]
    rois = torch.cat([torch.cat(image), torch.cat(list(boxes))], dim=1).nan_to_num(0, 0, 0)
    sides = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).sqrt()
    level = (sides[:, None] >= sides.new_tensor(POOLED_SIDES)).sum(1)
    ids = [(level == i).nonzero().flatten() for i in range(len(POOLED_STRIDES))]
    pooled = [
        roi_align(level_map.float(), rois[chosen], size, 1 / stride, sampling_ratio=0, aligned=True)
        for level_map, stride, chosen in zip(maps[: len(ids)], POOLED_STRIDES, ids, strict=True)
    ]
    return torch.cat(pooled).index_select(0, torch.cat(ids).argsort())
