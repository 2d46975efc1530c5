"""Which units a sample hides: drawn per sample on the CPU, so that it travels in the batch."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from itpn.errors import UserError
from itpn.nn.positions import Grid

NUM_TRIES = 10
"""Tries at laying a further block."""
MIN_ASPECT = 0.3
"""Height over width of a block lies between this and its inverse."""


def num_kept(num_units: int, mask_ratio: float) -> int:
    """Visible units of ``num_units`` under a mask ratio (int(N * (1 - ratio)), as MAE).

    Raises:
        UserError: the ratio lies outside (0, 1), or leaves nothing to see or nothing to predict.
    """
    kept = int(num_units * (1 - mask_ratio)) if 0 < mask_ratio < 1 else 0
    if not 0 < kept < num_units:
        raise UserError(
            f"objective.mask_ratio: {mask_ratio} of {num_units} units leaves "
            f"{'none' if not kept else 'all'} visible; it must lie between {1 / num_units:.3f} "
            f"and {1 - 1 / num_units:.3f}"
        )
    return kept


def kept_ids(noise: Tensor, kept: int) -> Tensor:
    """The ids ``[..., K]`` of the units with the smallest noise ``[..., N]``."""
    return noise.argsort(dim=-1)[..., :kept]


def hidden_units(keep: Tensor, num_units: int) -> Tensor:
    """``hidden: bool [B, N]``, True where a unit is not in ``keep [B, K]``."""
    return torch.ones(len(keep), num_units, dtype=torch.bool, device=keep.device).scatter(1, keep, False)


@dataclass(frozen=True)
class RandomMasking:
    """Draws a sample's visible units, uniformly at random, and its numbers for drop path."""

    num_units: int
    num_kept: int
    num_masks: int = 1
    num_drops: int = 0

    def __call__(self, generator: torch.Generator) -> dict[str, Tensor]:
        """``keep: long [masks, K]`` and, where drop path is on, ``drop: float [masks, num_drops]`` in [0,
        1)."""
        noise = torch.rand(self.num_masks, self.num_units, generator=generator)
        draws = {"keep": kept_ids(noise, self.num_kept)}
        if self.num_drops:
            draws["drop"] = torch.rand(self.num_masks, self.num_drops, generator=generator)
        return draws


@dataclass(frozen=True)
class BlockMasking:
    """Draws the units that a sample hides, in rectangular blocks (BEiT), and its numbers for drop path.

    A block's area is uniform between min_block and the units still to hide, its aspect log-uniform in
    0.3..1/0.3, its place uniform; it is laid if its sides are shorter than the grid's and if it hides at
    least one unit more and not too many. After ten tries in vain no further block is laid. With ``exact`` the
    blocks then grow at their edges, one random unit at a time; else a sample may hide fewer than num_hidden,
    as published, though never none.

    Raises:
        UserError: num_hidden leaves nothing to see or nothing to predict, or no block fits the grid.
    """

    grid: Grid
    num_hidden: int = 75
    min_block: int = 16
    exact: bool = True
    num_drops: int = 0

    def __post_init__(self) -> None:
        height, width = self.grid
        if not 0 < self.num_hidden < height * width:
            raise UserError(
                f"objective.num_hidden: {self.num_hidden} of {height} x {width} units cannot be hidden; "
                f"it must lie between 1 and {height * width - 1}"
            )
        if not 1 <= self.min_block <= self.num_hidden:
            raise UserError(
                f"objective.min_block: {self.min_block} must lie between 1 and num_hidden, {self.num_hidden}"
            )
        # Sides are rounded, so the longest side that still fits is half a unit below the grid's.
        short, long = min(self.grid) - 0.5, max(self.grid) - 0.5
        if self.min_block >= short * min(long, short / MIN_ASPECT):
            raise UserError(
                f"objective.min_block: no block of {self.min_block} units fits into {height} x {width} units "
                "with both sides shorter; give a smaller number"
            )

    def __call__(self, generator: torch.Generator) -> dict[str, Tensor]:
        """``hidden: bool [N]`` in row-major order and, where drop path is on, ``drop: float [num_drops]`` in
        [0, 1)."""
        hidden = torch.zeros(self.grid, dtype=torch.bool)
        missing = self.num_hidden
        while missing and (added := self._lay_block(hidden, missing, generator)):
            missing -= added
        least = self.num_hidden if self.exact else 1
        for _ in range(least - (self.num_hidden - missing)):
            _grow(hidden, generator)
        draws = {"hidden": hidden.flatten()}
        if self.num_drops:
            draws["drop"] = torch.rand(self.num_drops, generator=generator)
        return draws

    def _lay_block(self, hidden: Tensor, missing: int, generator: torch.Generator) -> int:
        """Hide one block more in ``hidden [H, W]``; the number of units added, 0 if all tries failed."""
        height, width = self.grid
        for size, shape, row, column in torch.rand(NUM_TRIES, 4, generator=generator).tolist():
            area = self.min_block + size * (missing - self.min_block)
            aspect = MIN_ASPECT ** (1 - 2 * shape)
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h >= height or w >= width:
                continue
            top, left = int(row * (height - h + 1)), int(column * (width - w + 1))
            block = hidden[top : top + h, left : left + w]
            added = h * w - int(block.sum())
            if 0 < added <= missing:
                block.fill_(True)
                return added
        return 0


def _grow(hidden: Tensor, generator: torch.Generator) -> None:
    """Hide one random neighbour of what ``hidden [H, W]`` hides, or any unit if it hides none."""
    beside = torch.zeros_like(hidden)
    beside[1:] |= hidden[:-1]
    beside[:-1] |= hidden[1:]
    beside[:, 1:] |= hidden[:, :-1]
    beside[:, :-1] |= hidden[:, 1:]
    edge = beside & ~hidden if hidden.any() else ~hidden
    candidates = edge.nonzero()
    row, column = candidates[torch.randint(len(candidates), (), generator=generator)]
    hidden[row, column] = True
