import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from itpn.engine import checkpoint
from itpn.engine.distributed import World
from itpn.engine.loop import LoopConfig, train
from itpn.engine.optim import AdamWConfig, adamw, parameter_groups
from itpn.engine.run import Run
from itpn.engine.schedule import ScheduleConfig
from itpn.errors import UserError
from itpn.nn.hivit import HiViTConfig
from itpn.nn.pyramid import ModelConfig, PyramidConfig
from itpn.objectives.distill import DistillConfig, DistillObjective
from itpn.objectives.pixel import PixelConfig, PixelObjective
from itpn.recipes.pretrain import mmpretrain_pixel
from itpn.weights.names import to_ours, to_theirs
from tests.engine.toy import OPTIM, STEPS_PER_EPOCH, Toy, toy_batches

RULES = Path(__file__).parents[1] / "reference" / "rules"


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
    grouped = [name for group in parameter_groups(model, AdamWConfig()) for name, _ in group["params"]]
    assert sorted(grouped) == sorted(name for name, p in model.named_parameters() if p.requires_grad)


def test_a_name_of_no_group() -> None:
    model = nn.Module()
    model.mixing = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(UserError, match="no optimiser group for mixing"):
        parameter_groups(model, AdamWConfig())


def test_nothing_to_train() -> None:
    with pytest.raises(UserError, match="no trainable parameter"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False), AdamWConfig())


def test_peak_lr() -> None:
    assert AdamWConfig(base_lr=1.5e-4).peak_lr(4096) == pytest.approx(2.4e-3)
    assert AdamWConfig(base_lr=1.5e-4, lr=1e-3).peak_lr(4096) == 1e-3


def test_without_scales_there_are_two_groups_and_no_more() -> None:
    """What checkpoints and other training loops have always met."""
    decayed, plain = parameter_groups(Parts(), AdamWConfig(weight_decay=0.1))
    assert [name for name, _ in decayed["params"]] == ["linear.weight"]
    assert {key: value for key, value in decayed.items() if key != "params"} == {"weight_decay": 0.1}
    assert {key: value for key, value in plain.items() if key != "params"} == {"weight_decay": 0.0}


def test_every_parameter_has_the_group_of_its_scale() -> None:
    model = Parts()
    scales = {name: 1.0 if name.startswith("linear") else 0.25 for name, _ in model.named_parameters()}
    groups = parameter_groups(model, AdamWConfig(weight_decay=0.1), scales)
    found = {
        name: (group["lr_scale"], group["weight_decay"]) for group in groups for name, _ in group["params"]
    }
    assert found["linear.weight"] == (1.0, 0.1)
    assert found["linear.bias"] == (1.0, 0.0)
    assert {found[name] for name in found if not name.startswith("linear")} == {(0.25, 0.0)}
    assert len(groups) == 3


def test_a_parameter_without_a_scale() -> None:
    with pytest.raises(KeyError, match="bias"):
        parameter_groups(nn.Linear(2, 2), AdamWConfig(), {"weight": 1.0})


def train_toy(directory: Path, scales: dict[str, float] | None, **fields) -> Toy:
    toy, world = Toy(dropout=0.0), World(0, 1, torch.device("cpu"))
    loop = LoopConfig(**{"epochs": 2, "batch_size": 12, "device_batch": 6, "checkpoint_every": 1, **fields})
    train(
        toy,
        toy_batches(world, loop.batch_size),
        steps_per_epoch=STEPS_PER_EPOCH,
        loop=loop,
        optim=OPTIM,
        schedule=ScheduleConfig(warmup_epochs=0),
        run=Run(directory, {}, world),
        lr_scales=scales,
    )
    return toy


def trained_names(toy: Toy) -> list[str]:
    return [name for name, parameter in toy.named_parameters() if parameter.requires_grad]


def test_the_loop_scales_each_step(tmp_path: Path) -> None:
    """AdamW's step is proportional to the rate: a quarter of it is a quarter of the way."""
    scales = dict.fromkeys(trained_names(Toy()), 1.0) | {"head.weight": 0.25, "norm.bias": 0.0}
    start = Toy().state_dict()
    plain = train_toy(tmp_path / "plain", None, max_steps=1).state_dict()
    scaled = train_toy(tmp_path / "scaled", scales, max_steps=1).state_dict()
    for name, scale in scales.items():
        way = plain[name] - start[name]
        assert way.abs().max() > 1e-3, name
        torch.testing.assert_close(scaled[name] - start[name], scale * way, atol=1e-6, rtol=1e-4)


def test_a_run_with_scales_is_resumed(tmp_path: Path) -> None:
    """The checkpoint knows states by name, whatever the groups: one with scales has the same entries."""
    scales = {name: 0.5**i for i, name in enumerate(trained_names(Toy()))}
    whole = train_toy(tmp_path / "whole", scales)
    train_toy(tmp_path / "parts", scales, max_steps=3)
    parts = train_toy(tmp_path / "parts", scales)
    for name, tensor in whole.state_dict().items():
        assert tensor.equal(parts.state_dict()[name]), name
    entries = [checkpoint.optimizer_tensors(stepped(lr_scales)) for lr_scales in (None, scales)]
    assert entries[0].keys() == entries[1].keys()


def stepped(scales: dict[str, float] | None) -> torch.optim.Optimizer:
    toy = Toy()
    optimizer = adamw(toy, OPTIM, scales)
    for parameter in toy.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def decays(model: nn.Module, rule: str) -> dict[str, bool]:
    """Whether each trained parameter is decayed, under its portable name."""
    groups = parameter_groups(model, AdamWConfig(weight_decay_rule=rule))
    return {
        name.removeprefix("model."): group["weight_decay"] > 0
        for group in groups
        for name, _ in group["params"]
    }


def released(rule: str) -> nn.Module:
    """The model of base size that the rule was published with, without its weights."""
    backbone, pyramid = HiViTConfig(), PyramidConfig()
    with torch.device("meta"):
        match rule:
            case "itpn-pixel":
                return PixelObjective(ModelConfig(backbone=backbone, pyramid=pyramid), PixelConfig())
            case "itpn-clip":
                backbone = replace(backbone, relative_position_bias=True, layer_scale=0.1)
                pyramid = replace(pyramid, depth=1)
                return DistillObjective(ModelConfig(backbone=backbone, pyramid=pyramid), DistillConfig())
            case "mmpretrain-clip":
                backbone = replace(mmpretrain_pixel(size="base", epochs=1).model.backbone, layer_scale=0.1)
                backbone = replace(backbone, relative_position_bias=True)
                config = DistillConfig(auxiliary=False)
                return DistillObjective(ModelConfig(backbone=backbone, pyramid=pyramid), config)
            case _:
                recipe = mmpretrain_pixel(size="base", epochs=1)
                return PixelObjective(recipe.model, recipe.objective)


@pytest.mark.parametrize(
    ("rule", "table", "kind"),
    [
        ("itpn-pixel", "pixel_pretrain_base__timm032_add_weight_decay", "pixel"),
        ("itpn-clip", "clip_pretrain_base", "distill"),
    ],
)
def test_pre_training_as_published(rule, table, kind) -> None:
    rows = list(json.loads((RULES / f"{table}.json").read_text())["params"].items())
    ours, unknown = to_ours({key: torch.tensor([i]) for i, (key, _) in enumerate(rows)}, "official", kind)
    assert not unknown
    published = {name: rows[i][1]["weight_decay"] > 0 for name, i in ours.items()}
    assert decays(released(rule), rule) == published


@pytest.mark.parametrize(
    ("rule", "config", "kind"),
    [
        ("mmpretrain-pixel-base", "itpn-pixel_hivit-base-p16_8xb512-amp-coslr-800e_in1k", "pixel"),
        ("mmpretrain-pixel-large", "itpn-pixel_hivit-large-p16_8xb512-amp-coslr-800e_in1k", "pixel"),
        ("mmpretrain-clip", "itpn-clip-b_hivit-base-p16_8xb256-amp-coslr-800e_in1k", "distill"),
    ],
)
def test_mmpretrain_pre_training(rule, config, kind) -> None:
    """Read back from its optimiser, where # stands for any number; large differs from base in depth alone."""
    published = json.loads((RULES / "mmpretrain_weight_decay.json").read_text())["configs"][config]
    model = released(rule)
    ours = decays(model, rule)
    shapes = {name.removeprefix("model."): parameter.shape for name, parameter in model.named_parameters()}
    numbered = {name: torch.tensor(i).expand(shapes[name]) for i, name in enumerate(ours)}
    names = list(ours)
    patterns: dict[bool, set[str]] = {True: set(), False: set()}
    for theirs, number in to_theirs(numbered, "mmpretrain", kind, 3, None).items():
        decayed = ours[names[number.max().item()]]
        patterns[decayed].add(re.sub(r"(?<=\.)\d+(?=\.)", "#", theirs))
    teacher = {"target_generator.*"}
    assert patterns[True] == set(published["decay"]) - teacher
    assert patterns[False] == set(published["no_decay"])
