"""Precision, determinism and the speed of a device."""

import hashlib
import os
from typing import Literal

import torch

Precision = Literal["auto", "bf16", "fp16", "fp32"]


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


def seed_of(*numbers: int) -> int:
    """For what is drawn inside the model (Dropout): resuming at a step draws the same again."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest(), "big")


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a 4096-cubed product on a CUDA device: the median of ten, the first of which warm up."""
    size, milliseconds = 4096, []
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    for _ in range(10):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begun.record()
        matrix @ matrix
        ended.record()
        ended.synchronize()
        milliseconds.append(begun.elapsed_time(ended))
    return float(2 * size**3 / (sorted(milliseconds)[5] / 1000))
