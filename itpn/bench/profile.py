"""One step under torch's profiler, its time by kind of work."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

KINDS = {
    "matmul": ("mm", "addmm", "convolution"),
    "attention": ("bmm", "baddbmm", "_softmax", "_scaled_dot_product", "_flash_attention"),
    "norm": ("native_layer_norm", "native_batch_norm", "native_group_norm"),
    "GELU": ("gelu",),
    "RoIAlign, NMS": ("roi_align", "_roi_align", "nms"),
    "resizing": ("upsample", "_upsample", "avg_pool", "max_pool", "_adaptive_avg_pool"),
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
"""Each kind's operators, by how their names begin behind `aten::` or `torchvision::`."""


def profiled(step: Callable[[], None], device: torch.device) -> dict[str, float]:
    """Seconds of each kind that comes, of what is no operator of these, and of all.

    On a GPU these are its own; what torch.compile has fused counts as `other`.
    """
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as profiler:
        step()
    seconds = dict.fromkeys((*KINDS, "other"), 0.0)
    for event in profiler.key_averages():
        if event.device_type == torch._C._autograd.DeviceType.CPU:
            own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            seconds[kind_of(event.key)] += own / 1e6
    taken = {kind: each for kind, each in seconds.items() if each}
    return taken | {"step": sum(taken.values())}


def kind_of(operator: str) -> str:
    name = operator.removeprefix("aten::").removeprefix("torchvision::")
    starts = (kind for kind, heads in KINDS.items() if operator != name and name.startswith(heads))
    return next(starts, "other")
