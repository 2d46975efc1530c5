"""Parameters and multiply-adds. On PyTorch's meta device neither takes memory or time."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


class Parameters(NamedTuple):
    total: int
    trainable: int


def count_parameters(part: nn.Module | nn.Parameter) -> Parameters:
    parameters = list(part.parameters()) if isinstance(part, nn.Module) else [part]
    return Parameters(
        sum(parameter.numel() for parameter in parameters),
        sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
    )


def multiply_adds(call: Callable[[], object]) -> int:
    """Those of matrix products and convolutions, and 5 per element of a LayerNorm, during a call.

    This is the counting of the published tables: activations, softmax and sums are left out.
    """
    mapping = {torch.ops.aten.native_layer_norm: _norm_flops}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter, torch.no_grad():
        call()
    return int(counter.get_total_flops()) // 2


def _norm_flops(shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    return 2 * 5 * math.prod(shape)
