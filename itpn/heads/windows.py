"""Labels for images of any size: in overlapping windows or as a whole, mirrored, at several scales."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from itpn.errors import UserError
from itpn.nn.hivit import LARGEST

Logits = Callable[[Tensor], Tensor]
"""Images [B, c, H, W], uint8 or floats in 0..1 -> logits [B, classes, H, W]."""

MAX_SCORES = 1 << 26
"""Resized scores held at a time (256 MB) when the best class is looked for."""


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    mode: Literal["slide", "whole"] = "slide"
    """Inference: sliding windows, with logits averaged where they overlap, or the whole image in one pass."""
    crop: tuple[int, int] = (512, 512)
    """Height and width of a window."""
    stride: tuple[int, int] = (341, 341)
    """Pixels between windows, down and across. The last window ends at the border."""
    flip: bool = False
    """Average the prediction with that of the mirrored image."""
    scales: tuple[float, ...] = (1.0,)
    """Scales of multi-scale inference. Published: 0.5, 0.75, 1, 1.25, 1.5, 1.75."""
    windows_at_once: int = 8
    """Windows per forward pass."""

    def __post_init__(self) -> None:
        if not 1 <= min(self.crop) <= max(self.crop) <= LARGEST:
            raise UserError(f"inference.crop: {self.crop} lies outside 1..{LARGEST:,} pixels")
        if min(self.stride) < 1 or any(s > c for s, c in zip(self.stride, self.crop, strict=True)):
            raise UserError(f"inference.stride: {self.stride} must be at least 1, and at most the crop")
        if not self.scales or not 0 < min(self.scales) <= max(self.scales) <= 16:
            raise UserError(f"inference.scales: {self.scales} must be factors in (0, 16]")
        if self.windows_at_once < 1:
            raise UserError(f"inference.windows_at_once: {self.windows_at_once} must be at least 1")


def scores(logits: Logits, images: Tensor, config: InferenceConfig) -> Tensor:
    """Scores ``[B, classes, H, W]`` of images ``uint8 [B, c, H, W]``.

    Of one view the logits; of several (scales, mirrored) the mean of their probabilities, as published.
    """

    def one_view(view: Tensor) -> Tensor:
        return logits(view) if config.mode == "whole" else slide(logits, view, config)

    if not config.flip and config.scales == (1.0,):
        return one_view(images)
    height, width = images.shape[-2:]
    total = torch.zeros((), device=images.device)
    for factor in config.scales:
        size = max(1, round(factor * height)), max(1, round(factor * width))
        view = images if factor == 1 else _scaled(images.float() / 255, size).clamp(0, 1)
        views = [one_view(view), one_view(view.flip(-1)).flip(-1)] if config.flip else [one_view(view)]
        for seen in views:
            total = total + _scaled(seen.softmax(1), (height, width))
    return total / (len(config.scales) * (2 if config.flip else 1))


def slide(logits: Logits, images: Tensor, config: InferenceConfig) -> Tensor:
    """Logits ``[B, classes, H, W]`` of images ``[B, c, H, W]``: the mean over all windows that see a pixel.

    A window is as large as the image where that is smaller than the crop.
    """
    B, _, H, W = images.shape
    height, width = min(H, config.crop[0]), min(W, config.crop[1])
    corners = [
        (top, left)
        for top in window_starts(H, config.crop[0], config.stride[0])
        for left in window_starts(W, config.crop[1], config.stride[1])
    ]
    seen = images.new_zeros(1, 1, H, W, dtype=torch.float32)
    total: Tensor | None = None
    at_once = max(1, config.windows_at_once // B)
    for start in range(0, len(corners), at_once):
        some = corners[start : start + at_once]
        windows = torch.cat([images[..., top : top + height, left : left + width] for top, left in some])
        for (top, left), found in zip(some, logits(windows).chunk(len(some)), strict=True):
            total = found.new_zeros(B, found.shape[1], H, W) if total is None else total
            total[..., top : top + height, left : left + width] += found
            seen[..., top : top + height, left : left + width] += 1
    assert total is not None  # an image has a pixel, and a window sees it
    return total / seen


def window_starts(length: int, crop: int, stride: int) -> list[int]:
    """Where windows begin along one axis: all of it is seen, none reaches beyond (as published)."""
    num_windows = max(0, -(-(length - crop) // stride)) + 1
    return [max(0, min(i * stride, length - crop)) for i in range(num_windows)]


def argmax_at(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """The best class at another size, ``long [B, height, width]``, from scores ``[B, classes, H, W]``.

    Some classes at a time: all scores of a large image would not fit in memory.
    """
    if scores.shape[-2:] == size:
        return scores.argmax(1)
    at_once = max(1, MAX_SCORES // (len(scores) * size[0] * size[1]))
    best, label = _scaled(scores[:, :at_once], size).max(1)
    for start in range(at_once, scores.shape[1], at_once):
        value, index = _scaled(scores[:, start : start + at_once], size).max(1)
        label = torch.where(value > best, index + start, label)
        best = torch.maximum(value, best)
    return label


def _scaled(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, without aliasing where it shrinks."""
    return (
        maps if maps.shape[-2:] == size else F.interpolate(maps, size=size, mode="bilinear", antialias=True)
    )
