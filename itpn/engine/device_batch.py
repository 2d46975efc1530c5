"""How many images a device takes at once. The recipe fixes the global batch; this only cuts it up."""

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from itpn.engine.run import Run
from itpn.engine.step import micro_step
from itpn.errors import UserError

Batch = dict[str, torch.Tensor]
Batches = Callable[[int, int], Iterator[Batch]]

LIMIT = {"cpu": 16, "mps": 64, "cuda": 512}


def check_division(batch_size: int, world_size: int, device_batch: int | None) -> None:
    """UserError with the nearest batch sizes, unless ranks x device batch divide the global batch."""
    unit = world_size * (device_batch or 1)
    if batch_size % unit:
        below = batch_size // unit * unit
        nearest = f"the nearest are {below} and {below + unit}" if below else f"the smallest is {unit}"
        ranks = f"{world_size} rank{'s' if world_size > 1 else ''}"
        parts = ranks if device_batch is None else f"{ranks} x --device-batch {device_batch}"
        raise UserError(f"--batch-size {batch_size} is not a multiple of {parts}; {nearest}")


def settle(
    objective: nn.Module,
    first_batch: Callable[[int], Batch],
    run: Run,
    *,
    share: int,
    given: int | None,
    precision: torch.dtype,
) -> int:
    """The device batch as given, or as this run used it before, or found out now; noted in run.json.

    Args:
        first_batch: of that many images, on the CPU.
        share: images per rank and step, which the result divides.
    """
    device = run.world.device
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    noted = run.notes.get("device_batch", {}).get(kind, 0) if run.world.is_main else 0
    noted = int(run.world.largest(noted)[0])  # rank 0 decides: the others may see an older note
    if given:
        size = given
    elif noted or device.type != "cuda":
        size = largest_divisor(share, noted or LIMIT[device.type])
    elif isinstance(objective, FSDPModule):
        raise UserError(
            "--strategy fsdp needs --device-batch here: a search would hang once a rank runs out of memory; "
            "start low, and double it while it fits"
        )
    else:
        size = largest_divisor(share, LIMIT["cuda"])
        batch = first_batch(size)
        while run.world.largest(not step_fits(objective, first(batch, size), device, precision))[0]:
            if size == 1:
                raise UserError("not even one image fits on the device: use a smaller model or image size")
            size = largest_divisor(share, size // 2)
    run.note(device_batch={**run.notes.get("device_batch", {}), kind: size})
    return size


def largest_divisor(share: int, limit: int) -> int:
    return max(size for size in range(1, min(share, limit) + 1) if share % size == 0)


def first(batch: Batch, size: int) -> Batch:
    return {key: value[:size] for key, value in batch.items()}


def step_fits(objective: nn.Module, batch: Batch, device: torch.device, precision: torch.dtype) -> bool:
    """Tries a forward and backward pass beside room for AdamW's two moments and a twentieth of the device.

    Leaves parameters and buffers as they were.
    """
    buffers = [(buffer, buffer.clone()) for buffer in objective.buffers()]
    try:
        room = [torch.empty_like(p) for p in objective.parameters() if p.requires_grad for _ in range(2)]
        if device.type == "cuda":
            spare = torch.cuda.get_device_properties(device).total_memory // 20
            room.append(torch.empty(spare, dtype=torch.uint8, device=device))
        with torch.compiler.set_stance("force_eager"):  # sizes that do not stay need not be compiled
            micro_step(objective, {key: value.to(device) for key, value in batch.items()}, precision)
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        objective.zero_grad(set_to_none=True)
        for buffer, before in buffers:
            buffer.copy_(before)
        torch.cuda.empty_cache()
