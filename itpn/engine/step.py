"""The inside of a training step, which the loop, the search for the device batch, replay and bench share."""

import torch
from torch import Tensor, nn

from itpn.errors import UserError


def micro_step(
    model: nn.Module,
    batch: dict[str, Tensor],
    precision: torch.dtype,
    *,
    share: float = 1.0,
    scaler: torch.amp.GradScaler | None = None,
) -> dict[str, Tensor]:
    """Forward and backward of one micro-batch; the objective's outputs, detached.

    Args:
        batch: on the model's device.
        precision: of the forward pass; parameters and their gradients stay in float32.
        share: of the step's gradient that this one is.
    """
    device = next(iter(batch.values())).device
    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
        outputs: dict[str, Tensor] = model(batch)
    loss = outputs["loss"] * share
    (scaler.scale(loss) if scaler else loss).backward()  # type: ignore[no-untyped-call]
    return {name: value.detach().float() for name, value in outputs.items()}


def out_of_memory(size: int) -> UserError:
    return UserError(
        f"out of memory with {size} images at once on the device: lower --device-batch "
        "(results stay the same), or set --model.backbone.checkpointing"
    )
