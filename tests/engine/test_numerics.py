"""Weights are cast once for an evaluation, not once a batch."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from itpn.engine.numerics import casting_once, evaluating

CPU = torch.device("cpu")


class Casts(TorchDispatchMode):
    """Counts what is cast."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


def evaluated(layer, batches):
    with Casts() as casts:
        outputs = []
        for batch in batches:
            with evaluating("bf16", CPU):
                outputs.append(layer(batch))
    return torch.stack(outputs), casts.count


def test_weights_are_cast_once_for_all_batches_and_forgotten_afterwards():
    layer, batches = torch.nn.Linear(4, 3), torch.randn(5, 2, 4)
    expected, each_time = evaluated(layer, batches)
    assert each_time == 15  # a batch, the weight and the bias, five times
    with casting_once(CPU):
        outputs, once = evaluated(layer, batches)
    assert (once, outputs.dtype) == (7, torch.bfloat16)
    assert torch.equal(outputs, expected)
    with torch.no_grad():
        layer.weight.mul_(2)
    assert not torch.equal(evaluated(layer, batches)[0], expected)
