"""Masks of objects: cut out for training, laid over the image after prediction."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align


def mask_targets(masks: Tensor, boxes: Tensor, rois: Tensor, ids: Tensor, size: int) -> Tensor:
    """What the mask head is to predict in each RoI: ``[n, size, size]`` of 0 and 1.

    Args:
        masks: ``[m, S, S]`` of 0 and 1, each laid over its object's box in ``boxes [m, 4]``.
        rois: ``[n, 4]``, and the object of each in ``ids [n]``. Outside its box an object has no mask.
    """
    own = boxes[ids]
    corner, extent = own[:, :2].repeat(1, 2), (own[:, 2:] - own[:, :2]).repeat(1, 2)
    relative = (rois - corner) / extent * masks.shape[-1]
    places = torch.cat([ids[:, None].to(relative), relative], dim=1)
    cut: Tensor = roi_align(masks[:, None].to(relative), places, size, 1.0, sampling_ratio=0, aligned=True)
    return (cut[:, 0] >= 0.5).to(relative)


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float = 0.5) -> Tensor:
    """Lay probabilities ``[n, S, S]`` over their boxes ``[n, 4]``: bool ``[n, H, W]``, True from
    ``threshold`` on.

    A pixel takes the bilinear value at its centre. torchvision's ``paste_masks_in_image`` first moves the
    boxes to whole pixels, which small objects do not forgive.

    Args:
        size: height and width of the image, in whose pixels the boxes are.
    """
    canvas = torch.zeros(len(masks), *size, dtype=torch.bool, device=masks.device)
    for mask, box, picture in zip(masks, boxes.tolist(), canvas, strict=True):
        columns, rows = _pixels(box[0], box[2], size[1]), _pixels(box[1], box[3], size[0])
        if columns and rows:
            y, x = _places(rows, box[1], box[3]), _places(columns, box[0], box[2])
            grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).to(mask)
            laid = F.grid_sample(mask[None, None], grid[None], align_corners=False)
            picture[rows.start : rows.stop, columns.start : columns.stop] = laid[0, 0] >= threshold
    return canvas


def _pixels(low: float, high: float, size: int) -> range:
    """The pixels of one axis that a box touches."""
    return range(max(math.floor(low), 0), min(math.ceil(high), size))


def _places(pixels: range, low: float, high: float) -> Tensor:
    """Where the pixels' centres lie in the box, from -1 to 1."""
    centres = torch.arange(pixels.start, pixels.stop, dtype=torch.float64, device="cpu") + 0.5
    return 2 * (centres - low) / (high - low) - 1
