"""Floating-point operations, counted on the meta device, where they take neither memory nor time."""

import copy
from collections.abc import Callable
from itertools import chain
from typing import TypeVar

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)


def flops_of(call: Callable[[], T]) -> tuple[int, T]:
    """Those of a call's matrix products, and what it returned."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        result = call()
    return int(counter.get_total_flops()), result


def without_weights(module: M) -> M:
    """A copy on the meta device; no weight is copied on the way."""
    tensors = chain(module.parameters(), module.buffers())
    return copy.deepcopy(module, {id(tensor): torch.empty_like(tensor, device="meta") for tensor in tensors})
