"""What detectors compute with boxes, by plain loops over plain numbers."""

import math

import torch
from torch import Tensor


def area(box):
    return (box[2] - box[0]) * (box[3] - box[1])


def overlap(a, b):
    """Intersection and union."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    return both, area(a) + area(b) - both


def iou(a, b):
    both, union = overlap(a, b)
    return both / union


def giou_loss(a, b):
    both, union = overlap(a, b)
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return 1 - both / union + (hull - union) / hull


def encode(target, box, deviations=(1.0, 1.0)):
    """Centre offsets in sides of the box, logarithms of the ratios of sides, in units of the deviations."""
    w, h, tw, th = box[2] - box[0], box[3] - box[1], target[2] - target[0], target[3] - target[1]
    dx = (target[0] + target[2] - box[0] - box[2]) / 2 / w
    dy = (target[1] + target[3] - box[1] - box[3]) / 2 / h
    return [
        dx / deviations[0],
        dy / deviations[0],
        math.log(tw / w) / deviations[1],
        math.log(th / h) / deviations[1],
    ]


def decode(deltas, box, deviations=(1.0, 1.0)):
    w, h = box[2] - box[0], box[3] - box[1]
    x = (box[0] + box[2]) / 2 + deltas[0] * deviations[0] * w
    y = (box[1] + box[3]) / 2 + deltas[1] * deviations[0] * h
    w, h = w * math.exp(deltas[2] * deviations[1]), h * math.exp(deltas[3] * deviations[1])
    return [x - w / 2, y - h / 2, x + w / 2, y + h / 2]


def nms(boxes, scores, groups, threshold):
    """Best first; a box goes if one that was kept, of its group, overlaps it more than the threshold."""
    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(groups[i] != groups[j] or iou(boxes[i], boxes[j]) <= threshold for j in kept):
            kept.append(i)
    return kept


def matches(objects, boxes, high, low, rescue):
    """Per box its object, -1 for background, -2 for neither; ``rescue``: the best box of an object is its."""
    table = [[iou(own, box) for own in objects] for box in boxes]
    found = []
    for row in table:
        best = max(range(len(row)), key=lambda i: row[i]) if row else -1
        found.append(-1 if best < 0 or row[best] < low else best if row[best] >= high else -2)
    if rescue:
        for i in range(len(objects)):
            top = max(row[i] for row in table)
            for row, own in enumerate(table):
                if own[i] == top:
                    found[row] = max(range(len(own)), key=lambda i: own[i])
    return found


def roi_align(level: Tensor, box, size: int, stride: int) -> Tensor:
    """``[F, h, w]`` to ``[F, size, size]``: the mean over each bin of bilinear samples, so many per bin that
    they lie a pixel apart; the value of a pixel is that of its centre."""
    _, h, w = level.shape
    x1, y1, x2, y2 = (side / stride - 0.5 for side in box)
    across, down = (x2 - x1) / size, (y2 - y1) / size
    num_x, num_y = math.ceil(across), math.ceil(down)
    out = torch.zeros(len(level), size, size, dtype=level.dtype)
    for row in range(size):
        for col in range(size):
            for i in range(num_y):
                for j in range(num_x):
                    y = y1 + row * down + (i + 0.5) * down / num_y
                    x = x1 + col * across + (j + 0.5) * across / num_x
                    if -1 <= y <= h and -1 <= x <= w:
                        out[:, row, col] += bilinear(level, x, y) / (num_x * num_y)
    return out


def bilinear(level: Tensor, x: float, y: float) -> Tensor:
    """At ``x, y`` in pixels counted from the first one's centre; past the border its pixel goes on."""
    _, h, w = level.shape
    x, y = min(max(x, 0), w - 1), min(max(y, 0), h - 1)
    left, top = min(int(x), max(w - 2, 0)), min(int(y), max(h - 2, 0))
    right, below = min(left + 1, w - 1), min(top + 1, h - 1)
    u, v = x - left, y - top
    upper = (1 - u) * level[:, top, left] + u * level[:, top, right]
    lower = (1 - u) * level[:, below, left] + u * level[:, below, right]
    return (1 - v) * upper + v * lower
