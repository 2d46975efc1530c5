"""One step under torch's profiler, its time by kind of work."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

KINDS = {
    "matmul": ("mm", "addmm", "convolution"),
    "attention": ("bmm", "baddbmm", "_softmax", "_scaled_dot_product", "_flash_attention"),
    "norm": ("native_layer_norm",),
    "GELU": ("gelu",),
    "casts and copies": (
        "copy_",
        "cat",
        "stack",
        "fill_",
        "zero_",
        "gather",
        "scatter",
        "empty",
        "embedding",
    ),
    "optimiser": ("_fused_adam", "_foreach", "linalg_vector_norm", "lerp"),
    "sums and losses": ("add", "sum", "mul", "sub", "div", "mean", "var", "pow", "mse_loss", "smooth_l1"),
}
"""Each kind's operators, by how their names begin behind `aten::`."""


def profiled(step: Callable[[], None], device: torch.device) -> dict[str, float]:
    """Seconds of each kind, of what is no operator of these, and of all.

    On a GPU these are its own; what torch.compile has fused counts as `other`.
    """
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as profiler:
        step()
    seconds = dict.fromkeys((*KINDS, "other"), 0.0)
    for event in profiler.key_averages():
        if event.device_type == torch._C._autograd.DeviceType.CPU:
            taken = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            seconds[kind_of(event.key)] += taken / 1e6
    return seconds | {"step": sum(seconds.values())}


def kind_of(operator: str) -> str:
    name = operator.removeprefix("aten::")
    starts = (kind for kind, heads in KINDS.items() if operator != name and name.startswith(heads))
    return next(starts, "other")
