"""Attention within windows, for images whose units are too many for each to see all (ViTDet, 2203.16527)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from itpn.nn.positions import Grid


class Windows(NamedTuple):
    """A grid of units in windows of ``side`` x ``side``, row by row; the last of a row or column may be
    filled up."""

    grid: Grid
    side: int
    filled: Tensor | None
    """0 for a unit and -inf for a filler, to be added to the scores of its keys: ``[windows, 1, 1,
    side^2]``; None without fillers."""

    @classmethod
    def of(cls, grid: Grid, side: int, device: torch.device | None = None) -> "Windows":
        windows = cls(grid, side, None)
        if grid[0] % side == 0 and grid[1] % side == 0:
            return windows
        units = windows.cut(torch.ones(1, grid[0] * grid[1], 1, device=device))
        filled = torch.zeros_like(units).masked_fill(units == 0, float("-inf"))
        return windows._replace(filled=filled[:, None, None, :, 0])

    def cut(self, tokens: Tensor) -> Tensor:
        """``[B, N, C]`` to ``[B * windows, side^2, C]``."""
        (rows, cols), side = self.grid, self.side
        B, _, C = tokens.shape
        laid = F.pad(tokens.view(B, rows, cols, C), (0, 0, 0, -cols % side, 0, -rows % side))
        laid = laid.view(B, -(-rows // side), side, -(-cols // side), side, C)
        return laid.transpose(2, 3).reshape(-1, side * side, C)

    def join(self, tokens: Tensor) -> Tensor:
        """The inverse: ``[B * windows, side^2, C]`` to ``[B, N, C]``, without fillers."""
        (rows, cols), side, C = self.grid, self.side, tokens.shape[-1]
        down, across = -(-rows // side), -(-cols // side)
        laid = tokens.view(-1, down, across, side, side, C).transpose(2, 3)
        laid = laid.reshape(-1, down * side, across * side, C)[:, :rows, :cols]
        return laid.reshape(len(laid), rows * cols, C)
