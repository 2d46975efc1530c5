"""Models by name and from files: maps as promised, detectors take them, and what does not fit is said."""

import subprocess
import sys
from copy import deepcopy
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

import itpn
from itpn.errors import UserError
from itpn.heads.classify import Classifier, ClassifierConfig
from itpn.models import ClassifierModel, FeatureModel, config_of
from itpn.nn.hivit import SIZES, HiViT
from itpn.nn.layers import to_map
from itpn.nn.pyramid import Model, ModelConfig, PyramidConfig, detection_maps
from itpn.objectives.distill import DistillConfig, DistillObjective
from itpn.weights import files
from tests.saved import save
from tests.toys import toy_backbone, toy_model, toy_objective

SIZE_OF = {"c4": 4, "p4": 4, "c8": 8, "p8": 8, "c16": 16, "p16": 16, "p32": 32, "p64": 64}


@pytest.fixture
def pretrained(tmp_path):
    """A pre-training checkpoint with decoder: path and objective."""
    objective = toy_objective()
    path = tmp_path / "all.safetensors"
    return save(path, objective, objective.model.config, objective=objective.config), objective


@pytest.fixture
def classifier(tmp_path):
    torch.manual_seed(1)
    model = Classifier(HiViT(toy_backbone()), ClassifierConfig(num_classes=5, pooling="norm-mean"))
    nn.init.normal_(model.head.weight)
    config = ModelConfig(backbone=toy_backbone(), pyramid=None)
    return save(tmp_path / "classifier.safetensors", model, config, classifier=model.config), model.eval()


def test_importing_itpn_does_not_wait_for_torch():
    code = "import sys, itpn; assert itpn.__version__; assert 'torch' not in sys.modules; itpn.load"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    with pytest.raises(AttributeError, match="no attribute 'lood'"):
        itpn.lood  # noqa: B018


@pytest.mark.parametrize("name", SIZES)
def test_every_size_by_name(name):
    with torch.device("meta"):
        model = itpn.create_model(name)
        maps = model(torch.empty(1, 3, 224, 224))
    assert [tuple(level.shape[1:]) for level in maps.values()] == [
        (256, 56, 56),
        (256, 28, 28),
        (256, 14, 14),
    ]
    backbone = model.backbone.config
    assert not backbone.relative_position_bias
    assert backbone.layer_scale == (0.1 if name.startswith("fast") else None)
    assert model.backbone.stage3[0].attn.qkv.weight.shape[1] == SIZES[name].width


@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(4, 7),
    cols=st.integers(4, 7),
    kind=st.sampled_from([("pyramid", 3), ("pyramid", 5), ("stages", 3), ("tokens", 3)]),
)
def test_maps_of_any_grid(rows, cols, kind):
    torch.manual_seed(0)
    features, num_levels = kind
    model = FeatureModel(toy_model(), features, num_levels).eval()
    images = torch.randn(1, 3, 16 * rows, 16 * cols)
    out = model(images)
    if features == "tokens":
        assert out.shape == (1, rows * cols, 32) == (1, rows * cols, *model.channels)
        assert model.strides == (16,)
        return
    assert tuple(SIZE_OF[name] for name in out) == model.strides
    assert tuple(level.shape[1] for level in out.values()) == model.channels
    for stride, level in zip(model.strides, out.values(), strict=True):
        assert level.shape[2:] == (16 * rows // stride, 16 * cols // stride)


def test_maps_are_those_of_backbone_and_pyramid(pretrained):
    path, objective = pretrained
    images, grid = torch.randn(2, 3, 64, 96), (4, 6)
    with torch.no_grad():
        features, levels = objective.model.eval()(images)
        whole = itpn.load(path)(images)
        five = itpn.load(path, num_levels=5)(images)
        stages = itpn.load(path, features="stages")(images)
        tokens = itpn.load(path, features="tokens")(images)
    for level, ours in zip(levels, whole.values(), strict=True):
        assert torch.equal(to_map(level, grid), ours)
    for level, ours in zip(detection_maps(levels, grid), five.values(), strict=True):
        assert torch.equal(level, ours)
    torch.testing.assert_close(five["p64"], F.avg_pool2d(whole["p16"], 4)[:, :, :1, :1])
    for stage, ours in zip(features, stages.values(), strict=True):
        assert torch.equal(to_map(stage, grid), ours)
    assert torch.equal(tokens, features.c16)


def test_a_copy_is_a_model_of_its_own():
    model = FeatureModel(toy_model()).eval()
    copy, images = deepcopy(model), torch.randn(1, 3, 32, 32)
    assert torch.equal(copy(images)["p4"], model(images)["p4"])
    nn.init.zeros_(copy.backbone.position)
    assert model.backbone.position.any()


def test_odd_sizes_and_short_sides_are_said():
    model = FeatureModel(toy_model(), num_levels=5)
    with pytest.raises(UserError, match="multiple of the unit of 16"):
        model(torch.zeros(1, 3, 64, 72))
    with pytest.raises(UserError, match="five levels need 64 pixels"):
        model(torch.zeros(1, 3, 128, 48))


@pytest.mark.parametrize("arguments", [("maps", 3), ("pyramid", 4), ("stages", 5), ("tokens", 5)])
def test_features_that_there_are_not(arguments):
    with pytest.raises(UserError, match=r"features|num_levels"):
        FeatureModel(toy_model(), *arguments)


def test_stages_hold_no_pyramid():
    model = itpn.create_model("itpn_pico", features="stages")
    assert model.pyramid is None
    images = torch.randn(1, 3, 32, 32)
    sum(level.sum() for level in model(images).values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("detector", [FasterRCNN, MaskRCNN])
def test_torchvisions_detectors_take_it_as_a_backbone(detector):
    torch.manual_seed(0)
    backbone = FeatureModel(
        ModelConfig(backbone=toy_backbone(), pyramid=PyramidConfig(width=96, depth=1, mlp_ratio=1.0)),
        num_levels=5,
    )
    anchors = AnchorGenerator(((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5)
    maps = ["p4", "p8", "p16", "p32"]
    pools = {"box_roi_pool": MultiScaleRoIAlign(maps, 7, 2)}
    if detector is MaskRCNN:
        pools["mask_roi_pool"] = MultiScaleRoIAlign(maps, 14, 2)
    model = detector(
        backbone, num_classes=3, rpn_anchor_generator=anchors, min_size=96, max_size=160, **pools
    )
    images = [torch.rand(3, 70, 100), torch.rand(3, 96, 96)]
    targets = [
        {
            "boxes": torch.tensor([[10.0, 10.0, 50.0, 60.0]]),
            "labels": torch.tensor([1]),
            "masks": torch.ones(1, *image.shape[1:], dtype=torch.uint8),
        }
        for image in images
    ]
    losses = model(images, targets)
    sum(losses.values()).backward()
    assert ("loss_mask" in losses) == (detector is MaskRCNN)
    assert all(parameter.grad is not None for parameter in backbone.parameters())
    found = model.eval()(images)
    assert [set(one) >= {"boxes", "labels", "scores"} for one in found] == [True, True]


def test_a_classifier_comes_back_exactly(classifier):
    path, model = classifier
    again, images = itpn.load(path), torch.randn(2, 3, 64, 64)
    assert isinstance(again, ClassifierModel) and not again.training
    assert torch.equal(again(images), model(images))
    stages = itpn.load(path, features="stages")
    assert torch.equal(stages(images)["c16"], to_map(model.backbone(images).c16, (4, 4)))
    with pytest.raises(UserError, match="holds no pyramid"):
        itpn.load(path, features="pyramid")


@pytest.mark.parametrize("mode", ["exact", "published"])
@pytest.mark.parametrize(
    "relative",
    [
        {},
        {"relative_position_bias": True},
        {"relative_position_bias": True, "relative_position_decomposed": True},
        {"relative_position_bias": True, "relative_image_size": 32},
    ],
)
def test_another_image_size_resamples_the_position_tables(tmp_path, mode, relative):
    objective = toy_objective(position_resampling=mode, **relative)
    for table in objective.model.parameters():
        nn.init.normal_(table, std=0.1)
    path = save(tmp_path / "w.safetensors", objective, objective.model.config, objective=objective.config)
    as_is, larger = itpn.load(path), itpn.load(path, image_size=96)
    assert larger.backbone.config.image_size == 96 and larger.backbone.position.shape == (36, 32)
    images = torch.randn(1, 3, 96, 96)
    for ours, theirs in zip(larger(images).values(), as_is(images).values(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_create_model_with_weights(tmp_path, pretrained):
    weights = itpn.create_model("itpn_nano", weights=files.NANO, drop_path=0.1, checkpointing=True)
    assert weights.training and weights.backbone.config.drop_path == 0.1
    assert torch.equal(weights.backbone.position, files.read(files.NANO).tensors["backbone.position"].float())
    with pytest.raises(UserError, match=r"itpn_base was asked for, but .*nano.safetensors holds itpn_nano"):
        itpn.create_model("itpn_base", weights=files.NANO)
    with pytest.raises(UserError, match=r"no model 'itpn_huge'.*itpn_base"):
        itpn.create_model("itpn_huge")
    with pytest.raises(UserError, match=r"stem_proj.weight"):
        itpn.create_model("itpn_nano", weights=files.NANO, in_channels=4)


def test_run_directories_load_their_newest_checkpoint(tmp_path, pretrained):
    path, objective = pretrained
    step = tmp_path / "run" / "checkpoints" / "00000007"
    step.mkdir(parents=True)
    path.rename(step / "model.safetensors")
    (step.parent / "last").write_text("00000007\n")
    model = itpn.load(tmp_path / "run")
    assert torch.equal(model.backbone.position, objective.model.backbone.position)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop("backbone.merge1.norm.weight"), "merge1.norm.weight is missing there"),
        (lambda tensors: tensors.pop("pyramid.align.bias"), "align.bias is missing there"),
        (
            lambda tensors: tensors.update({"surprise": torch.zeros(2)}),
            r"surprise is \[2\] there, missing here",
        ),
        (
            lambda tensors: tensors.update({"pyramid.align.bias": torch.zeros(2)}),
            r"align.bias is \[2\] there",
        ),
    ],
)
def test_a_file_that_is_not_what_its_config_says(tmp_path, pretrained, change, said):
    weights = files.read(pretrained[0])
    tensors = {name: tensor.clone() for name, tensor in weights.tensors.items()}
    change(tensors)
    files.save(tmp_path / "odd.safetensors", tensors, weights.config)
    with pytest.raises(UserError, match=said):
        itpn.load(tmp_path / "odd.safetensors")


def test_backbone_and_pyramid_alone(tmp_path, pretrained):
    _, objective = pretrained
    tensors = {n: t for n, t in files.portable(objective).items() if n.startswith(files.MODEL_PARTS)}
    config = {"model": asdict(objective.model.config), "objective": asdict(objective.config)}
    files.save(tmp_path / "pretrained.safetensors", tensors, config)
    model = itpn.load(str(tmp_path / "pretrained.safetensors"))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in tensors.items())
    assert set(model.state_dict()) == set(tensors)


def test_a_distilled_students_backbone_and_pyramid(tmp_path):
    student = DistillObjective(toy_model(), DistillConfig(target_width=8))
    path = save(tmp_path / "student.safetensors", student, toy_model(), objective=student.config)
    model = itpn.load(path)
    theirs = student.model.state_dict()
    assert set(model.state_dict()) == set(theirs)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())


def test_foreign_checkpoints_are_sent_to_convert(tmp_path):
    torch.save({"model": {}}, tmp_path / "theirs.pth")
    with pytest.raises(UserError, match="itpn convert"):
        itpn.load(tmp_path / "theirs.pth")
    with pytest.raises(UserError, match="no file"):
        itpn.load(tmp_path / "none.safetensors")


def test_fast_models_are_fast_throughout():
    config = config_of("fast_itpn_nano")
    torch.manual_seed(0)
    model, ours = Model(config).eval(), FeatureModel(config).eval()
    ours.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 32, 48)
    _, levels = model(images)
    for level, map_ in zip(levels, ours(images).values(), strict=True):
        assert torch.equal(to_map(level, (2, 3)), map_)
    assert replace(config.pyramid, layers="hivit") != config.pyramid
