import pytest
import torch
from torch import nn

from itpn.engine.optim import AdamWConfig, adamw, parameter_groups
from itpn.errors import UserError


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3)
        self.norm = nn.LayerNorm(3)
        self.position = nn.Parameter(torch.ones(1, 4, 3))
        self.mask_token = nn.Parameter(torch.ones(1, 1, 3))
        self.relative_position_table = nn.Parameter(torch.ones(9, 2))
        self.scale = nn.Parameter(torch.ones(()))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def test_only_matrices_and_kernels_decay() -> None:
    model = Parts()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = adamw(model, AdamWConfig(lr=0.1, weight_decay=0.5))
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not parameter.equal(before[name])}
    assert moved == {"linear.weight"}
    assert torch.allclose(model.linear.weight, before["linear.weight"] * (1 - 0.1 * 0.5))


def test_every_trainable_parameter_is_in_one_group() -> None:
    model = Parts()
    grouped = [name for group in parameter_groups(model, 0.1) for name, _ in group["params"]]
    assert sorted(grouped) == sorted(name for name, p in model.named_parameters() if p.requires_grad)


def test_a_name_of_no_group() -> None:
    model = nn.Module()
    model.mixing = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(UserError, match="no optimiser group for mixing"):
        parameter_groups(model, 0.1)


def test_nothing_to_train() -> None:
    with pytest.raises(UserError, match="no trainable parameter"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False), 0.1)


def test_peak_lr() -> None:
    assert AdamWConfig(base_lr=1.5e-4).peak_lr(4096) == pytest.approx(2.4e-3)
    assert AdamWConfig(base_lr=1.5e-4, lr=1e-3).peak_lr(4096) == 1e-3
