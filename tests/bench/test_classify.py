"""Benches of fine-tuning and of inference count what they do."""

import json

import pytest
import torch

from itpn.bench import finetune, infer
from itpn.errors import UserError
from itpn.recipes.classify import Classify
from itpn.recipes.lookup import find, load_as
from tests.counting import macs_of_backbone

CONFIG = """
from dataclasses import replace

from itpn.nn.pyramid import ModelConfig
from itpn.recipes.classify import itpn_pixel
from tests.toys import toy_backbone

recipe = itpn_pixel(size="base")
model = ModelConfig(backbone=toy_backbone(relative_position_bias=True), pyramid=None)
config = replace(recipe, model=model, image_size=(64, 64))
"""


@pytest.mark.parametrize(("bench", "passes"), [(finetune, 3), (infer, 1)])
def test_figures(tmp_path, capsys, bench, passes):
    config, out = tmp_path / "toy.py", tmp_path / "figures.json"
    config.write_text(CONFIG)
    bench.run(f"{config} --device cpu --device-batch 2 --steps 2 --json {out}".split())
    figures = json.loads(out.read_text())
    head = 32 * 1000
    macs = macs_of_backbone(16, 32, (1, 1, 2)) + head
    assert figures["flops_per_image"] == 2 * passes * macs
    assert figures["parts"]["step"] > 0
    assert "of the ceiling" in (printed := capsys.readouterr().out)
    assert ("relative positions add" in printed) == (bench is infer)


def test_checkpointing_is_asked_for(tmp_path):
    config = tmp_path / "toy.py"
    config.write_text(CONFIG)
    finetune.run(f"{config} --device cpu --device-batch 2 --steps 1 --checkpointing".split())


def test_what_relative_positions_cost_a_step(tmp_path, capsys):
    config, out = tmp_path / "toy.py", tmp_path / "figures.json"
    config.write_text(CONFIG)
    finetune.run(f"{config} --device cpu --device-batch 2 --steps 1 --baseline --json {out}".split())
    figures = json.loads(out.read_text())
    assert figures["baseline_parts"].keys() == figures["parts"].keys()
    assert figures["losses"][0] == figures["baseline_losses"][0]  # the tables start at zero
    ours = finetune.subject(load_as(Classify, find(str(config))), True, torch.device("cpu"), 2)
    left_out = {name for name, _ in ours.model.named_parameters()} - {
        name for name, _ in ours.baseline().model.named_parameters()
    }
    assert left_out and all(name.endswith("relative_position") for name in left_out)
    assert "x the speed of the same model without relative positions" in capsys.readouterr().out
    config.write_text(CONFIG.replace("relative_position_bias=True", ""))
    with pytest.raises(UserError, match="no relative positions to leave out"):
        finetune.run(f"{config} --baseline".split())


def test_another_kind_of_config():
    with pytest.raises(UserError, match="is a Pretrain config, but a Classify config is needed"):
        infer.run(["pretrain_demo"])
