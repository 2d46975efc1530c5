"""Linear layers whose bias and activation ride on the product, and weights that are cast once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Callable[[Tensor], Tensor]
ONEDNN: dict[Activation | None, tuple[str, str]] = {
    None: ("none", ""),
    F.gelu: ("gelu", "none"),
    F.silu: ("swish", ""),
}
"""What oneDNN calls an activation, and the way of computing it."""

_kept: dict[Tensor, Tensor] | None = None
"""Parameters and what they were cast to; None: nothing is kept."""


@contextmanager
def casting_once(device: torch.device) -> Iterator[None]:
    """Around all batches of an evaluation, whose weights do not change: each is cast for the first alone.

    Autocast keeps what it has cast until its outermost context ends, which is then this one; `linear` casts
    for itself, and keeps it as long.
    """
    global _kept
    outer, _kept = _kept, {}
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        _kept = outer


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: Activation | None = None
) -> Tensor:
    """``activation(x @ weight.T + bias)`` of ``x [..., C]`` and ``weight [F, C]``; F.gelu, F.silu or none.

    On a CPU in bf16 and without gradient it is one call of oneDNN, the one that torch's own compiler makes,
    and rounded once. Else torch first copies the bias to where the product goes, and reads and writes all of
    that once more for an activation.
    """
    if not _fuses(x):
        x = F.linear(x, weight, bias)
        return activation(x) if activation else x
    name, way = ONEDNN[activation]
    bias = bias if bias is None else _cast(bias)
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x.bfloat16(), _cast(weight), bias, name, [], way)
    return y


class Linear(nn.Linear):
    """`torch.nn.Linear` by way of `linear`."""

    def forward(self, input: Tensor, activation: Activation | None = None) -> Tensor:
        return linear(input, self.weight, self.bias, activation)


def _fuses(x: Tensor) -> bool:
    if torch.is_grad_enabled() or x.device.type != "cpu" or torch.compiler.is_compiling() or not x.numel():
        return False
    cast = torch.is_autocast_enabled("cpu") and x.dtype == torch.float32
    bf16 = (torch.get_autocast_dtype("cpu") if cast else x.dtype) == torch.bfloat16
    return bf16 and _has_onednn() and bool(torch.backends.mkldnn.enabled)


@cache
def _has_onednn() -> bool:
    """Whether oneDNN is there and computes in bf16 on this processor."""
    there: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return there and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _cast(x: Tensor) -> Tensor:
    """In bf16; of a parameter, which stays, the same tensor again within `casting_once`."""
    if _kept is None or not isinstance(x, nn.Parameter):
        return x.bfloat16()
    if x not in _kept:
        _kept[x] = x.bfloat16()
    return _kept[x]
