"""AdamW and the rule for what it decays."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from itpn.errors import UserError


@dataclass(frozen=True, kw_only=True)
class AdamWConfig:
    base_lr: float = 1.5e-4
    """Peak learning rate per 256 images of the global batch."""
    lr: float | None = None
    """Peak learning rate itself; where given, base_lr is not used."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the running means of the gradient and of its square."""
    eps: float = 1e-8
    """Added to the denominator."""
    weight_decay: float = 0.05
    """Decoupled decay of matrices and kernels; vectors, position tables and tokens have none."""

    def peak_lr(self, batch_size: int) -> float:
        return self.base_lr * batch_size / 256 if self.lr is None else self.lr


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Every trainable parameter in one of two groups, with decay and without; frozen ones in none.

    Raises:
        UserError: a parameter's name does not tell which group it belongs to, or nothing is trainable.
    """
    decayed, plain, unknown = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        last = name.rpartition(".")[2]
        table_or_token = "relative_position" in last or last.endswith(("position", "_token"))
        if parameter.ndim <= 1 or table_or_token:
            plain.append((name, parameter))
        elif last.endswith("weight"):
            decayed.append((name, parameter))
        else:
            unknown.append(name)
    if unknown:
        raise UserError(
            f"no optimiser group for {', '.join(unknown)}: a parameter of two or more dimensions must be "
            "called …weight (decayed), …position, …_token or …relative_position… (not decayed)"
        )
    if not decayed and not plain:
        raise UserError("the model has no trainable parameter: unfreeze a part of it")
    groups = ((decayed, weight_decay), (plain, 0.0))
    return [{"params": named, "weight_decay": decay} for named, decay in groups if named]


def adamw(model: nn.Module, config: AdamWConfig) -> torch.optim.AdamW:
    """The learning rate is set by the loop before every step."""
    groups = parameter_groups(model, config.weight_decay)
    return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=True)
