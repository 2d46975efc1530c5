"""Products with bias and activation in one call, and weights cast once for an evaluation."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from itpn.engine.numerics import evaluating
from itpn.nn import linear as module
from itpn.nn.linear import Linear, casting_once, linear

CPU = torch.device("cpu")
has_onednn = pytest.mark.skipif(not module._has_onednn(), reason="needs oneDNN's products in bf16")


class Calls(TorchDispatchMode):
    """Counts what is called."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(func)
        return func(*args, **(kwargs or {}))

    @property
    def casts(self):
        return self.calls.count(torch.ops.aten._to_copy.default)


def evaluated(layer, batches):
    with Calls() as calls:
        outputs = []
        for batch in batches:
            with evaluating("bf16", CPU):
                outputs.append(layer(batch))
    return torch.stack(outputs), calls.casts


@pytest.mark.parametrize("kind", [torch.nn.Linear, Linear])
def test_weights_are_cast_once_for_all_batches_and_forgotten_afterwards(kind):
    layer, batches = kind(4, 3), torch.randn(5, 2, 4)
    expected, each_time = evaluated(layer, batches)
    assert each_time == 15  # a batch, the weight and the bias, five times
    with casting_once(CPU):
        outputs, once = evaluated(layer, batches)
    assert (once, outputs.dtype) == (7, torch.bfloat16)
    assert torch.equal(outputs, expected)
    with torch.no_grad():
        layer.weight.mul_(2)
    assert not torch.equal(evaluated(layer, batches)[0], expected)


def test_only_what_stays_is_kept():
    """A bias put together for a batch would otherwise pile up."""
    weight, bias = torch.nn.Parameter(torch.randn(3, 4)), torch.zeros(3)
    with casting_once(CPU), evaluating("bf16", CPU):
        first, second = (linear(torch.ones(1, 4), weight, bias + i) for i in range(2))
        assert len(module._kept) == (1 if module._has_onednn() else 0)
    assert torch.allclose(second, first + 1, atol=0.05)
    assert module._kept is None


@given(
    shape=st.lists(st.integers(0, 5), min_size=0, max_size=3),
    width=st.integers(1, 40),
    out=st.integers(1, 40),
    activation=st.sampled_from([None, F.gelu, F.silu]),
    biased=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    strided=st.booleans(),
)
def test_one_call_gives_what_the_parts_give(shape, width, out, activation, biased, dtype, strided):
    generator = torch.Generator().manual_seed(width * 41 + out)
    layer = Linear(width, out, bias=biased)
    x = torch.randn(*shape, width, generator=generator).to(dtype)
    if strided and x.ndim > 1:
        x = x.transpose(0, -2).contiguous().transpose(0, -2)
    with evaluating("bf16", CPU):
        ours = layer(x, activation)
    exact = F.linear(
        x.bfloat16().double(),
        layer.weight.detach().bfloat16().double(),
        layer.bias.detach().bfloat16().double() if biased else None,
    )
    exact = activation(exact) if activation else exact
    assert (ours.dtype, ours.shape) == (torch.bfloat16, exact.shape)
    torch.testing.assert_close(ours.double(), exact, rtol=2**-7, atol=2**-7)


@has_onednn
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_one_call_is_made_in_bf16_alone(precision):
    layer, x = Linear(8, 8), torch.randn(2, 8)
    with Calls() as calls, evaluating(precision, CPU):
        layer(x, F.gelu)
    assert (torch.ops.mkldnn._linear_pointwise.default in calls.calls) == (precision == "bf16")
    assert (torch.ops.aten.gelu.default in calls.calls) == (precision == "fp32")


@has_onednn
def test_none_is_made_where_onednn_is_switched_off():
    layer, x = Linear(8, 8), torch.randn(2, 8)
    with torch.backends.mkldnn.flags(enabled=False), Calls() as calls, evaluating("bf16", CPU):
        layer(x)
    assert torch.ops.mkldnn._linear_pointwise.default not in calls.calls


def test_gradients_are_those_of_the_parts():
    layer, x = Linear(8, 5), torch.randn(3, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        ours = layer(x, F.gelu)
        theirs = F.gelu(F.linear(x, layer.weight, layer.bias))
    for mine, plain in zip(
        *(torch.autograd.grad(y.sum(), [x, layer.weight]) for y in (ours, theirs)), strict=True
    ):
        assert torch.equal(mine, plain)
