"""Epochs whose global batches hold images of about one size, so that little is padded and few sizes occur."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from itpn.data.randomness import generator, permutation
from itpn.data.views import NUM_DRAWS, Array, MultiScale, fitting, paddings, random_views


class Plan(NamedTuple):
    """One epoch."""

    order: Tensor
    """Batch after batch, then the images that are left over: a permutation, long [n]."""
    draws: Array
    """What each image's view is made of, float64 [n, 8]."""
    padded: Array
    """Height and width that each image is padded to, int64 [n, 2]; all of a global batch alike."""


class GroupedEpochs:
    """Each epoch is a function of (seed, epoch), the images' sizes and the global batch size.

    Views of one padded size make up global batches. What then remains of all sizes is sorted by shape, and
    makes up the others; a view that is too long for the padding of such a batch is shrunk.
    """

    def __init__(self, sizes: Array, scale: MultiScale, batch_size: int) -> None:
        self.sizes, self.scale, self.batch_size = sizes, scale, batch_size
        self.paddings = paddings(scale)
        self._plan = lru_cache(2)(self._planned)  # loading ahead, a worker is in two epochs

    def __len__(self) -> int:
        return len(self.sizes)

    def __reduce__(self) -> tuple[type["GroupedEpochs"], tuple[Array, MultiScale, int]]:
        return GroupedEpochs, (self.sizes, self.scale, self.batch_size)

    def order(self, seed: int, epoch: int) -> Tensor:
        return self.plan(seed, epoch).order

    def plan(self, seed: int, epoch: int) -> Plan:
        return self._plan(seed, epoch)

    def _planned(self, seed: int, epoch: int) -> Plan:
        shape = len(self), NUM_DRAWS
        uniform = torch.rand(shape, dtype=torch.float64, generator=generator(seed, epoch, 0, "views"))
        draws = uniform.numpy()
        group = fitting(random_views(self.sizes, draws, self.scale).sizes, self.paddings)
        order = permutation(seed, epoch, len(self)).numpy()
        batches, left_over = self._batches(order, group)
        shuffled = torch.randperm(len(batches), generator=generator(seed, epoch, 0, "batches"))
        batches = batches[shuffled.numpy()]
        # The padding of the largest area, which all views of a batch of one group have.
        group[batches] = group[batches].max(1, initial=0, keepdims=True)
        together = np.concatenate([batches.ravel(), left_over])
        return Plan(torch.from_numpy(together), draws, self.paddings[group])

    def _batches(self, order: Array, group: Array) -> tuple[Array, Array]:
        """Global batches [b, batch_size] of images, and the images that fill no batch."""
        sorted_ = order[group[order].argsort(kind="stable")]
        sizes = np.bincount(group, minlength=len(self.paddings))
        place = np.arange(len(order)) - np.repeat(sizes.cumsum() - sizes, sizes)  # within its group
        whole = place < np.repeat(sizes // self.batch_size * self.batch_size, sizes)
        remains = np.ones(len(order), np.bool_)
        remains[sorted_[whole]] = False
        rest = order[remains[order]]
        num_left_over = len(rest) % self.batch_size
        rest, left_over = np.split(rest, [len(rest) - num_left_over])
        standing = self.paddings[:, 0] > self.paddings[:, 1]
        rest = rest[np.lexsort((group[rest], standing[group[rest]]))]
        return np.concatenate([sorted_[whole], rest]).reshape(-1, self.batch_size), left_over
