"""Our own weight files: what is written loads again, whole or in part, and what does not fit is said."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from itpn.errors import UserError
from itpn.nn.pyramid import ModelConfig
from itpn.objectives.distill import DistillConfig, DistillObjective
from itpn.objectives.pixel import PixelConfig, PixelObjective
from itpn.recipes.pretrain import demo
from itpn.tasks.common import config_of
from itpn.weights import files, loading
from tests.saved import save
from tests.toys import toy_model, toy_objective


def config_for(objective):
    return config_of(replace(demo(), model=objective.model.config, objective=objective.config))


@pytest.fixture
def written(tmp_path):
    objective = toy_objective({"branches": "levels"}, relative_position_bias=True)
    files.save(tmp_path / "all.safetensors", files.portable(objective), config_for(objective))
    return objective, files.read(tmp_path / "all.safetensors")


def same(first, second):
    return all(torch.equal(value, second.state_dict()[key]) for key, value in first.state_dict().items())


def test_config_and_weights_round_trip(written):
    objective, weights = written
    again = PixelObjective(weights.part("model", ModelConfig), weights.part("objective", PixelConfig))
    assert again.config == objective.config
    assert again.model.config == objective.model.config
    said = loading.load_into(again, weights)
    assert same(objective, again)
    assert "anew" not in said


def test_backbone_and_pyramid_alone_leave_the_rest_anew(tmp_path, written):
    objective, weights = written
    tensors = {name: value for name, value in weights.tensors.items() if name.startswith(files.MODEL_PARTS)}
    files.save(tmp_path / "pretrained.safetensors", tensors, weights.config)
    other = toy_objective({"branches": "levels"}, relative_position_bias=True, seed=5)
    head = other.head.weight.clone()
    said = loading.load_into(other, files.read(tmp_path / "pretrained.safetensors"))
    assert same(objective.model, other.model)
    assert same(objective.model.backbone, other.features.teacher), "a new teacher starts as the student"
    assert torch.equal(other.head.weight, head)
    assert "decoder" in said.split("anew")[0]


def test_features_of_the_file_do_not_disturb_plain_pixels(written):
    objective, weights = written
    plain = toy_objective(relative_position_bias=True, seed=5)
    loading.load_into(plain, weights)
    assert same(objective.model, plain.model)


@pytest.mark.parametrize(
    "numbers",
    [{"width": 64}, {"depths": (2, 1, 2)}, {"depths": (1, 1, 1)}, {"pyramid": False}],
)
def test_another_shape_is_named(written, numbers):
    with pytest.raises(UserError, match="do not fit"):
        loading.load_into(toy_objective(**{"relative_position_bias": True} | numbers), written[1])


def test_what_is_not_ours_is_said(tmp_path):
    with pytest.raises(UserError, match="no file"):
        files.read(tmp_path / "none.safetensors")
    (tmp_path / "noise.safetensors").write_bytes(b"\x80\x04noise")
    with pytest.raises(UserError, match="cannot read"):
        files.read(tmp_path / "noise.safetensors")
    save_file({"weight": torch.zeros(1)}, tmp_path / "bare.safetensors")
    with pytest.raises(UserError, match="no itpn config"):
        files.read(tmp_path / "bare.safetensors")
    with pytest.raises(UserError, match="no run directory"):
        files.read(tmp_path)
    save_file(
        {"weight": torch.zeros(1)}, tmp_path / "odd.safetensors", {"config": json.dumps({"model": {"x": 1}})}
    )
    with pytest.raises(UserError, match="does not fit"):
        files.read(tmp_path / "odd.safetensors").part("model", ModelConfig)
    with pytest.raises(UserError, match="objective"):
        files.read(tmp_path / "odd.safetensors").part("objective", PixelConfig)


def test_another_image_size_resamples_the_position_tables(written):
    objective, weights = written
    weights = replace(weights, tensors=weights.tensors | {"decoder.position": objective.decoder.position})
    larger = toy_objective({"branches": "levels"}, relative_position_bias=True, image_size=96)
    loading.load_into(larger, weights)
    images = torch.randn(1, 3, 96, 96)
    ours, theirs = larger.model.eval()(images), objective.model.eval()(images)
    torch.testing.assert_close(ours[0].c16, theirs[0].c16, atol=1e-5, rtol=1e-4)


def test_init_says_what_no_shape_tells(tmp_path):
    """Heads of another number are another model; an epsilon is worth a remark."""
    objective = toy_objective()
    path = save(tmp_path / "a.safetensors", objective, toy_model(), objective=objective.config)
    weights = files.read(path)
    with pytest.raises(
        UserError, match=r"has 2 attention heads, the model 4; give --model\.backbone\.num-heads 2"
    ):
        loading.load_into(toy_objective(num_heads=4), weights)
    said = loading.load_into(toy_objective(norm_eps=1e-5), weights)
    assert "these weights saw --model.backbone.norm-eps 1e-06, which this run does not have" in said


def test_tables_of_an_auxiliary_branch_are_resampled_without_a_bias_in_the_backbone(tmp_path):
    config = DistillConfig(target_width=8)
    small, large = (DistillObjective(toy_model(image_size=size), config) for size in (64, 96))
    path = save(tmp_path / "a.safetensors", small, toy_model(image_size=64), objective=config)
    weights = files.read(path)
    loading.load_exactly(large, loading.resampled(weights, large.model.config.backbone))
    assert large.auxiliary.blocks[0].attn.relative_position.shape == (121, 2)


def test_the_best_weights_of_a_run_come_first(tmp_path, written):
    _, weights = written
    run = tmp_path / "finetuned"
    (run / "checkpoints/00000001").mkdir(parents=True)
    (run / "checkpoints/last").write_text("00000001")
    for name in ("checkpoints/00000001/model.safetensors", "best.safetensors"):
        shutil.copy(weights.path, run / name)
        assert files.read(run).path == run / name
