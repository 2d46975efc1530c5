"""What the device reaches in products of large matrices, measured beside the steps."""

import itertools
import statistics
from collections.abc import Sequence

import torch

from itpn.engine.numerics import ceiling_matrix, product_flops, product_seconds

PRODUCTS = {"cpu": 1, "mps": 10, "cuda": 10}
"""Products at a time."""


class Ceiling:
    """FLOP/s of 4096-cubed products, measured before every step and after the last one."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.matrix = ceiling_matrix(device, dtype)
        self.measured: list[float] = []
        product_seconds(self.matrix)

    def measure(self) -> None:
        count = PRODUCTS[self.matrix.device.type]
        seconds = statistics.median(product_seconds(self.matrix) for _ in range(count))
        self.measured.append(product_flops(self.matrix) / seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.measured)

    def share(self, flops: float, seconds: Sequence[float]) -> float:
        """Median share of the ceiling of steps that do ``flops`` each: a shared machine's speed drifts, so
        each is held against the mean of what was measured on either side of it."""
        around = itertools.pairwise(self.measured)
        shares = [flops / step / statistics.mean(pair) for step, pair in zip(seconds, around, strict=True)]
        return statistics.median(shares)
