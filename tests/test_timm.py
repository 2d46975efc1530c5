"""What timm expects of a model, as its own tests ask it; the big sizes without memory."""

from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.models import group_parameters
from timm.models._features import FeatureInfo
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from torch import nn

import itpn
import itpn.timm
from itpn import models
from itpn.data.aligned import fitted
from itpn.data.transforms import center_crop, crop_ratio_of
from itpn.errors import UserError
from itpn.heads.classify import Classifier, ClassifierConfig
from itpn.hub import as_json
from itpn.models import FeatureModel, config_of
from itpn.nn.hivit import SIZES, HiViT
from itpn.nn.layers import to_map
from itpn.nn.pyramid import ModelConfig
from itpn.objectives.pixel import PixelConfig
from itpn.weights import files
from tests.saved import save

TOYS = ["itpn_pico", "itpn_nano", "fast_itpn_nano"]
toys = pytest.mark.parametrize("name", TOYS)


def images(size=(64, 64), channels=3):
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(0))


def create(name, **arguments):
    torch.manual_seed(0)
    return timm.create_model(name, **arguments)


def test_all_sizes_are_timms():
    assert set(SIZES) <= set(timm.list_models())
    assert all(timm.is_model(name) and not timm.models.is_model_pretrained(name) for name in SIZES)
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        create("itpn_pico", pretrained=True)


@pytest.mark.parametrize("name", SIZES)
def test_every_size_as_features_and_classifier(name):
    with torch.device("meta"):
        model, features = timm.create_model(name), timm.create_model(name, features_only=True)
        x = torch.empty(1, 3, 224, 224)
        width = SIZES[name].width
        assert model(x).shape == (1, 1000)
        assert [tuple(level.shape[1:]) for level in features(x)] == [
            (width // 4, 56, 56), (width // 2, 28, 28), (width, 14, 14)
        ]  # fmt: skip
    assert features.feature_info.channels() == [width // 4, width // 2, width]
    assert features.feature_info.reduction() == [4, 8, 16]


@toys
def test_forward_and_backward(name):
    model = create(name, num_classes=42).train()
    out = model(images())
    assert out.shape == (2, 42) and not out.isnan().any()
    out.mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@toys
def test_default_cfg(name):
    model = create(name).eval()
    cfg, state = model.default_cfg, model.state_dict()
    assert cfg is model.pretrained_cfg and cfg["architecture"] == name
    assert cfg["input_size"] == (3, 224, 224)
    assert cfg["mean"] == (0.485, 0.456, 0.406) and cfg["std"] == (0.229, 0.224, 0.225)
    assert f"{cfg['first_conv']}.weight" in state and f"{cfg['classifier']}.weight" in state
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 224, 224)
    assert model.num_classes == 1000 and model.get_classifier() is model.head


@toys
def test_features_head_and_resets(name):
    model, x = create(name).eval(), images()
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 16, model.num_features)
    pooled = model.forward_head(tokens, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)
    assert torch.equal(model.head(pooled), model(x)) and torch.equal(model.forward_head(tokens), model(x))
    model.reset_classifier(0)
    assert model.num_classes == 0 and torch.equal(model(x), pooled)
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 16, model.num_features)
    torch.testing.assert_close(model(x), model.norm(tokens))
    model.reset_classifier(7, "avg")
    assert model(x).shape == (2, 7) and isinstance(model.get_classifier(), nn.Linear)
    bare = create(name, num_classes=0, global_pool="").eval()
    assert bare(x).shape == (2, 16, bare.num_features)


@toys
@pytest.mark.parametrize("features", ["stages", "pyramid"])
def test_forward_intermediates_are_the_features(name, features):
    model, x = create(name, features=features).eval(), images((64, 96))
    only = create(name, features=features, features_only=True, out_indices=(0, 1, 2)).eval()
    only.model.load_state_dict(model.state_dict(), strict=False)  # its head was dropped
    final, maps = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x))
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    for level, again, channels, stride in zip(maps, only(x), info.channels(), info.reduction(), strict=True):
        assert level.shape == (2, channels, 64 // stride, 96 // stride)
        assert torch.equal(level, again)
    nhwc = model.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
    assert all(torch.equal(level.permute(0, 2, 3, 1), again) for level, again in zip(maps, nhwc, strict=True))
    with pytest.raises(UserError, match="NLC"):
        model.forward_intermediates(x, output_fmt="NLC")


@toys
@pytest.mark.parametrize(
    ("indices", "numbers"), [(1, [2]), (2, [1, 2]), ([0], [0]), ([-2], [1]), ([2, 0], [2, 0])]
)
def test_indices_early_stop_and_norm(name, indices, numbers):
    model, x = create(name).eval(), images()
    nn.init.normal_(model.norm.weight)
    final, maps = model.forward_intermediates(x)
    for stop_early in (False, True):
        last, some = model.forward_intermediates(x, indices, stop_early=stop_early)
        assert all(torch.equal(maps[n], level) for n, level in zip(numbers, some, strict=True))
        expected = maps[max(numbers)] if stop_early else maps[2]
        assert last.shape[2] == expected.shape[1]
    assert torch.equal(last, final) == (max(numbers) == 2)
    normed = model.forward_intermediates(x, indices, norm=True, intermediates_only=True)
    for n, level in zip(numbers, normed, strict=True):
        theirs = to_map(model.norm(final), (4, 4)) if n == 2 else maps[n]
        assert torch.equal(theirs, level)


@toys
@pytest.mark.parametrize("last", [0, 1, 2])
def test_pruning_leaves_what_the_map_needs(name, last):
    whole = create(name, drop_path_rate=0.2).eval()
    only = create(name, features_only=True, out_indices=(last,), drop_path_rate=0.2).eval()
    x = images()
    [level] = only(x)
    assert torch.equal(level, whole.forward_intermediates(x, [last], intermediates_only=True)[0])
    assert only.feature_info.channels() == [whole.feature_info[last]["num_chs"]]
    only.train()(x)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in only.parameters())
    pruned = create(name)
    assert pruned.prune_intermediate_layers([last - 3]) == [last]
    assert pruned.eval()(x).shape[2] == pruned.num_features == whole.feature_info[last]["num_chs"]


@toys
def test_layer_groups_count_each_block_once(name):
    model = create(name)
    depths = SIZES[name].depths
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    assert set(layers) == {key for key, _ in model.named_parameters()}
    assert layers["backbone.position"] == layers["backbone.stem_proj.weight"] == 0
    assert layers["backbone.stage1.0.mlp.fc1.weight"] == 1
    assert (
        layers["backbone.merge1.reduce.weight"] == layers[f"backbone.stage1.{depths[0] - 1}.mlp.fc1.weight"]
    )
    assert (
        layers["backbone.merge2.reduce.weight"] == layers[f"backbone.stage2.{depths[1] - 1}.mlp.fc1.weight"]
    )
    assert layers["backbone.stage3.0.attn.proj.weight"] == 1 + depths[0] + depths[1]
    assert layers["head.weight"] == layers["norm.weight"] == 1 + sum(depths) == max(layers.values())
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert coarse["backbone.merge1.reduce.weight"] == 1 and coarse["head.weight"] == 4
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert scales[id(model.head.weight)] == 1.0
    assert scales[id(model.backbone.position)] == 0.5 ** (1 + sum(depths))
    assert len(scales) == len(list(model.parameters()))


def test_no_weight_decay_on_tables():
    model = create("itpn_pico")
    assert model.no_weight_decay() == {"backbone.position"}
    none, some = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    assert {p.ndim for p in some["params"]} == {2}
    assert any(p is model.backbone.position for p in none["params"])
    assert len(create_optimizer_v2(model, "adamw", layer_decay=0.7).param_groups) > 2


@toys
def test_checkpointing_changes_nothing(name):
    model, x = create(name, num_classes=3).train(), images()
    nn.init.normal_(model.head.weight)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        assert model.backbone.config.checkpointing == enable
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


def test_arguments_of_timm():
    model = create(
        "itpn_pico", in_chans=5, img_size=(96, 96), drop_path_rate=0.3, drop_rate=0.5, num_classes=2
    )
    backbone = model.backbone.config
    assert (backbone.in_channels, backbone.image_size, backbone.drop_path) == (5, 96, 0.3)
    assert model(images((32, 48), 5)).shape == (2, 2)
    nn.init.normal_(model.head.weight)
    tokens = torch.randn(1, 4, 64)
    assert not torch.equal(model.forward_head(tokens), model.forward_head(tokens))
    assert torch.equal(model.eval().forward_head(tokens), model.forward_head(tokens))
    for wrong in ({"img_size": (64, 96)}, {"global_pool": "max"}, {"features": "maps"}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            create("itpn_pico", **wrong)


@pytest.mark.parametrize("features", ["stages", "pyramid"])
def test_weights_give_the_maps_of_load(features):
    model = create("itpn_nano", weights=files.NANO, features=features, features_only=True).eval()
    expected = itpn.load(files.NANO, features=features)(images())
    assert all(torch.equal(*pair) for pair in zip(model(images()), expected.values(), strict=True))
    larger = create(
        "itpn_nano", weights=files.NANO, img_size=128, features=features, features_only=True
    ).eval()
    expected = itpn.load(files.NANO, features=features, image_size=128)(images())
    assert larger.model.backbone.position.shape == (64, 192)
    assert all(torch.equal(*pair) for pair in zip(larger(images()), expected.values(), strict=True))
    with pytest.raises(UserError, match="itpn_pico was asked for"):
        create("itpn_pico", weights=files.NANO)


@pytest.mark.parametrize("pooling", ["mean-norm", "norm-mean", "mean"])
def test_a_classifiers_file(tmp_path, pooling):
    torch.manual_seed(1)
    config = config_of("itpn_pico").backbone
    model = Classifier(HiViT(config), ClassifierConfig(num_classes=6, pooling=pooling)).eval()
    nn.init.normal_(model.head.weight)
    path = tmp_path / "classifier.safetensors"
    save(path, model, ModelConfig(backbone=config, pyramid=None), classifier=model.config)
    by_weights = create("itpn_pico", weights=path, num_classes=6).eval()
    assert torch.equal(by_weights(images()), model(images()))
    other = create("itpn_pico", weights=path, num_classes=4).eval()
    assert torch.equal(other.forward_head(other.forward_features(images()), pre_logits=True),
                       model.pool(model.backbone(images()).c16))  # fmt: skip
    if pooling == "mean-norm":
        by_path = create("itpn_pico", checkpoint_path=path, num_classes=6).eval()
        assert torch.equal(by_path(images()), model(images()))
    with pytest.raises(UserError, match="no pyramid"):
        create("itpn_pico", weights=path, features="pyramid")


HALF = (0.5, 0.5, 0.5)


def file_of(path, kind: str, told: dict | None = None, image_size: int = 96):
    """A file of ours whose config says of its images what is ``told``."""
    backbone = replace(config_of("itpn_pico").backbone, image_size=image_size)
    model, objective = ModelConfig(backbone=backbone, pyramid=None), PixelConfig(mean=HALF, std=HALF)
    config = {"model": as_json(model)}
    module = nn.ModuleDict({"backbone": HiViT(backbone)})
    if kind == "classifier":
        module = Classifier(HiViT(backbone), ClassifierConfig(num_classes=6))
        config["classifier"] = as_json(module.config)
    elif kind == "pretrained":
        config["objective"] = as_json(objective)
    elif kind in ("detector", "segmenter"):
        config[kind] = {"mean": HALF, "std": HALF}
    files.save(path, module.state_dict(), config | ({"input": told} if told else {}))
    return path


def photograph(width: int = 300, height: int = 200) -> Image.Image:
    """A smooth picture, where a shift of a pixel or another filter shows."""
    noise = torch.rand(3, 12, 16, generator=torch.Generator().manual_seed(0))
    pixels = F.interpolate(noise[None], (height, width), mode="bicubic", align_corners=False)[0].clamp(0, 1)
    return Image.fromarray((pixels * 255).byte().permute(1, 2, 0).numpy())


def assert_prepared(model, ours, mean, std):
    """That timm's transform gives our evaluation's uint8 pixels, but for rounding."""
    theirs = create_transform(**resolve_model_data_config(model))(photograph())
    expected = (ours.float() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(theirs, expected, rtol=0, atol=4 / 255 / min(std))


@pytest.mark.parametrize("image_size", [96, 256])
@pytest.mark.parametrize("kind", ["pretrained", "classifier", "converted"])
def test_timm_prepares_images_as_evaluations_do(tmp_path, kind, image_size):
    told = {"mean": HALF, "std": HALF, "image_size": [image_size] * 2}
    path = file_of(tmp_path / "a.safetensors", kind, told if kind == "classifier" else None, image_size)
    model = create("itpn_pico", weights=path)
    config = resolve_model_data_config(model)
    mean, std = (models.MEAN, models.STD) if kind == "converted" else (HALF, HALF)
    size = (image_size, image_size)
    assert config == {
        "input_size": (3, *size),
        "mean": mean,
        "std": std,
        "interpolation": "bicubic",
        "crop_pct": crop_ratio_of(size),
        "crop_mode": "center",
    }
    assert_prepared(model, center_crop(photograph(), size, crop_ratio_of(size)), mean, std)
    assert model.num_classes == model.pretrained_cfg["num_classes"] == (6 if kind == "classifier" else 0)
    assert model.pretrained_cfg["classifier"] == "head"
    assert model.pretrained_cfg["first_conv"] == "backbone.stem_proj"


def test_timm_cuts_the_middle_out_of_what_segmenters_and_detectors_see(tmp_path):
    told = {"mean": HALF, "std": HALF, "image_size": [64, 64], "scale": [128, 512]}
    model = create("itpn_pico", weights=file_of(tmp_path / "s.safetensors", "segmenter", told))
    whole = fitted(photograph(), 128, 512)[0]
    top, left = round((whole.shape[1] - 64) / 2), round((whole.shape[2] - 64) / 2)
    assert_prepared(model, whole[:, top : top + 64, left : left + 64], HALF, HALF)
    told = {"mean": HALF, "std": HALF, "views": {"eval_short_side": 100}}
    model = create("itpn_pico", weights=file_of(tmp_path / "d.safetensors", "detector", told))
    config = resolve_model_data_config(model)
    assert (config["input_size"], config["crop_pct"], config["mean"]) == ((3, 96, 96), 0.96, HALF)


def test_timm_is_told_of_folders_checkpoints_and_what_a_call_changes(tmp_path):
    told = {"mean": HALF, "std": HALF, "image_size": [64, 96]}
    path = file_of(tmp_path / "a.safetensors", "classifier", told)
    itpn.load(path).save_pretrained(tmp_path / "folder")
    itpn.load(path, features="stages").save_pretrained(tmp_path / "stages")
    for source in (tmp_path / "folder", tmp_path / "stages"):
        for changed in ({}, {"features_only": True}):
            config = resolve_model_data_config(create("itpn_pico", weights=source, **changed))
            assert (config["input_size"], config["mean"], config["std"]) == ((3, 64, 96), HALF, HALF)
    larger = create("itpn_pico", weights=path, img_size=256, pretrained_cfg_overlay={"mean": models.STD})
    config = resolve_model_data_config(larger)
    assert (config["input_size"], config["crop_pct"]) == ((3, 256, 256), 1.0)
    assert (config["mean"], config["std"]) == (models.STD, HALF)


def test_timm_takes_the_channels_of_the_file(tmp_path):
    config = config_of("itpn_pico")
    model = FeatureModel(replace(config, backbone=replace(config.backbone, in_channels=5)))
    model.mean, model.std = (0.25,), (0.5,)
    model.save_pretrained(tmp_path / "five")
    config = resolve_model_data_config(create("itpn_pico", weights=tmp_path / "five"))
    assert (config["input_size"], config["mean"], config["std"]) == ((5, 224, 224), (0.25,) * 5, (0.5,) * 5)
