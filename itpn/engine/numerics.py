"""Precision, determinism and the speed of a device."""

import ctypes
import hashlib
import os
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from itpn.engine.clock import Clock

Precision = Literal["auto", "bf16", "fp16", "fp32"]
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def choose_precision(name: Precision, device: torch.device) -> torch.dtype:
    """The dtype of the forward pass; parameters are always float32."""
    match name:
        case "bf16":
            return torch.bfloat16
        case "fp16":
            return torch.float16
        case "auto" if device.type == "cuda":
            return (
                torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
            )
        case "fp32" | "auto":
            return torch.float32


def set_numerics(device: torch.device, precision: torch.dtype, *, deterministic: bool = False) -> None:
    """Deterministic algorithms on a CPU; on CUDA, TF32 for the little that autocast leaves in float32.

    Args:
        deterministic: on CUDA too.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    if deterministic or device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        # This only finds reads of unwritten memory, and costs a pass over every new tensor.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.type == "cuda" and precision != torch.float32:
        torch.set_float32_matmul_precision("high")
    if device.type == "cpu":
        keep_freed_memory()


@contextmanager
def evaluating(precision: Precision, device: torch.device) -> Iterator[None]:
    """Without gradient, in the precision of training."""
    dtype = choose_precision(precision, device)
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        yield


def keep_freed_memory() -> None:
    """Lets glibc keep what a step frees for the next one, which would have to fault in every page again."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def seed_of(*numbers: int) -> int:
    """For what is drawn inside the model (Dropout): resuming at a step draws the same again."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest(), "big")


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of 4096-cubed products: the median of ten, the first of which warm up."""
    matrix = ceiling_matrix(device, dtype)
    return product_flops(matrix) / statistics.median(product_seconds(matrix) for _ in range(10))


def ceiling_matrix(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(4096, 4096, device=device, dtype=dtype)


def product_flops(matrix: Tensor) -> int:
    return 2 * len(matrix) ** 3


def product_seconds(matrix: Tensor) -> float:
    """Time of one product of a square matrix with itself."""
    clock = Clock(matrix.device)
    clock.mark("begun")
    torch.mm(matrix, matrix)
    clock.mark("product")
    return clock.read()["product"]
