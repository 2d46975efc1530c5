"""The benchmark measures the code that trains, and counts what that code does."""

import json
from copy import deepcopy

import pytest
import torch

from itpn.bench.plain import Plain
from itpn.bench.pretrain import run
from itpn.bench.profile import kind_of
from itpn.commands import bench
from itpn.engine.step import micro_step
from itpn.errors import UserError
from tests.counting import macs_of_backbone, macs_of_pyramid, macs_of_tokens
from tests.toys import toy_batch, toy_objective

CONFIG = """
from dataclasses import replace

from itpn.recipes.pretrain import itpn_pixel
from tests.counting import macs_of_backbone, macs_of_pyramid, macs_of_tokens
from tests.toys import toy_objective

_toy = toy_objective({features})
config = itpn_pixel(size="base", epochs=100)
config = replace(config, model=_toy.model.config, objective=_toy.config)
"""

FROZEN = """
from dataclasses import replace

from itpn.objectives.distill import DistillConfig
from itpn.objectives.stages import FrozenConfig
from itpn.recipes.pretrain import itpn_pixel
from tests.toys import toy_objective

_toy = toy_objective()
_frozen = {"teacher": "test_vit", "frozen": FrozenConfig(weight=1.0, width=64)}
_distil = DistillConfig(target="tokens", target_width=64, num_hidden=5, min_block=2, **_frozen)
config = itpn_pixel(size="base", epochs=100)
config = replace(
    config, model=_toy.model.config, objective=replace(_toy.config, **_frozen) if {pixels} else _distil
)
"""


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "setting", [{}, {"pyramid": False}, {"features": {}}, {"masks_per_image": 2, "layer_scale": 0.1}]
)
def test_the_plain_model_has_the_same_loss_and_gradient(setting, precision):
    objective = toy_objective(**setting)
    plain, batch = Plain(deepcopy(objective)), toy_batch(objective)
    ours, theirs = (micro_step(model, batch, precision)["loss"] for model in (objective, plain))
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    for mine, own in zip(objective.parameters(), plain.objective.parameters(), strict=True):
        assert (mine.grad is None) == (own.grad is None)
        if mine.grad is not None and precision == torch.float32:
            torch.testing.assert_close(mine.grad, own.grad, rtol=1e-4, atol=1e-6)


def test_the_plain_model_refuses_what_it_does_not_know():
    with pytest.raises(UserError, match="--baseline"):
        Plain(toy_objective(relative_position_bias=True))


@pytest.mark.parametrize("features", ["", "{}"])
def test_figures(tmp_path, capsys, features):
    config, out = tmp_path / "toy.py", tmp_path / "figures.json"
    config.write_text(CONFIG.replace("{features}", features))
    words = f"{config} --device cpu --device-batch 2 --steps 1 --baseline --profile --json {out}"
    run(words.split())
    figures = json.loads(out.read_text())
    for parts in (figures["parts"], figures["baseline_parts"]):
        assert {"teacher", "teacher's average"} <= set(parts) if features else "teacher" not in parts
        assert min(parts.values()) > 0
    assert figures["losses"] == pytest.approx(figures["baseline_losses"], abs=1e-4)
    assert figures["flops"] == figures["flops_per_image"] * figures["images_per_s"]
    assert figures["ratio"] == pytest.approx(figures["flops"] / figures["ceiling"])  # of one step
    assert {kind for kind, seconds in figures["kinds"].items() if seconds} >= {"matmul", "norm", "GELU"}
    shown = capsys.readouterr().out
    assert (
        "images/s" in shown
        and "of the ceiling" in shown
        and "x the speed of the same model written plainly" in shown
    )


@pytest.mark.parametrize("pixels", [True, False])
def test_figures_with_a_frozen_teacher(tmp_path, capsys, monkeypatch, pixels):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("connected"))
    config, out = tmp_path / "toy.py", tmp_path / "figures.json"
    config.write_text(FROZEN.replace("{pixels}", str(pixels)))
    words = f"{config} --device cpu --device-batch 2 --steps 1 --json {out}"
    run(words.split())
    figures = json.loads(out.read_text())
    assert {"forward", "teacher", "backward", "optimiser"} <= figures["parts"].keys()
    assert figures["parts"]["teacher"] > 0
    assert figures["ratio"] == pytest.approx(figures["flops"] / figures["ceiling"])  # of one step
    assert "teacher" in capsys.readouterr().out
    with pytest.raises(UserError, match="--baseline supports only pixels without a frozen teacher"):
        run([*words.split(), "--baseline"])


def test_a_teacher_without_a_name_cannot_be_timed(tmp_path):
    config = tmp_path / "toy.py"
    config.write_text(FROZEN.replace("{pixels}", "False").replace("test_vit", ""))
    with pytest.raises(UserError, match="must name a teacher"):
        run([str(config), "--device", "cpu", "--device-batch", "2"])


def test_kinds_of_operators():
    kinds = {"aten::mm": "matmul", "aten::bmm": "attention", "aten::copy_": "casts and copies"}
    kinds |= {"aten::_fused_adamw_": "optimiser", "AddmmBackward0": "other", "mm": "other"}
    assert {name: kind_of(name) for name in kinds} == kinds


def test_no_steps_is_an_error(tmp_path):
    config = tmp_path / "toy.py"
    config.write_text(CONFIG.replace("{features}", ""))
    with pytest.raises(UserError, match="at least 1"):
        run([str(config), "--steps", "0"])


@pytest.mark.parametrize("features", [None, {}])
@pytest.mark.parametrize("masks", [1, 2])
def test_flops_by_hand(features, masks):
    """6 for each multiply-add of the masked forward pass, 2 for each of the teacher's on the whole image."""
    objective = toy_objective(features, masks_per_image=masks)
    visible, units, width, pyramid, decoder = 4, 16, 32, 24, 32
    student = macs_of_backbone(visible, width, (1, 1, 2))
    embeds = 3 * pyramid * decoder
    student += visible * (macs_of_pyramid(width, pyramid) + embeds)
    student += macs_of_tokens(units, decoder, 2) + units * decoder * 768
    teacher = 0.0
    if features is not None:
        student += units * decoder * (16 * width // 4 + 4 * width // 2 + width)
        teacher = macs_of_backbone(units, width, (1, 1, 2))
    assert objective.flops_per_image() == 6 * masks * student + 2 * teacher


def test_an_unknown_subject_is_an_error():
    with pytest.raises(UserError, match="pretrain, finetune, detect, segment, infer, data, memory"):
        bench.run(["pretraining"])
