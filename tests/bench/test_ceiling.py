"""A step is held against the products that were taken just before and after it."""

import pytest
import torch

from itpn.bench import ceiling as module
from itpn.bench.ceiling import Ceiling


def test_a_machine_that_slows_down_does_not_change_the_share(monkeypatch):
    monkeypatch.setattr(module, "ceiling_matrix", lambda device, dtype: torch.zeros(100, 100, device=device))
    speeds = [100.0, 100.0, 100.0, 20.0, 20.0]  # FLOP/s
    seconds = iter([1.0, *(2e6 / speed for speed in speeds)])
    monkeypatch.setattr(module, "product_seconds", lambda _: next(seconds))
    ceiling = Ceiling(torch.device("cpu"), torch.float32)
    for _ in speeds:
        ceiling.measure()
    assert (ceiling.measured, ceiling.median) == (speeds, 100.0)
    steps = [600 / 0.4 / speed for speed in (100, 100, 60, 20)]
    assert ceiling.share(600, steps) == pytest.approx(0.4)
    assert ceiling.share(600, [2 * step for step in steps]) == pytest.approx(0.2)
    with pytest.raises(ValueError, match="zip"):
        ceiling.share(600, steps[:-1])  # a product is missing on one side
