import time

import pytest
import torch

from itpn.engine.clock import Clock
from itpn.engine.numerics import product_flops


def test_parts_are_summed_by_name_and_forgotten_once_read():
    clock = Clock(torch.device("cpu"))
    begun = time.perf_counter()
    for name in ("begun", "one", "two", "one"):
        clock.mark(name)
        time.sleep(0.002)
    parts = clock.read()
    assert list(parts) == ["one", "two"]
    assert parts["two"] >= 0.002 and parts["one"] >= 0.004
    assert sum(parts.values()) <= time.perf_counter() - begun
    assert clock.read() == {}


@pytest.mark.parametrize("size", [3, 8])
def test_flops_of_a_product(size):
    assert product_flops(torch.empty(size, size)) == 2 * size * size * size
