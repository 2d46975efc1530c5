"""Every config on pixels: its name tells the truth, its model has the published size, it trains a step."""

import re
from dataclasses import replace
from functools import cache

import pytest
import torch

from itpn.commands.info import backbone_multiply_adds, parts
from itpn.engine.optim import adamw
from itpn.engine.schedule import lr_at
from itpn.evaluate.count import Parameters, count_parameters
from itpn.nn.pyramid import ModelConfig
from itpn.objectives.pixel import PixelConfig, PixelObjective
from itpn.recipes.lookup import config_files, load, packaged
from itpn.recipes.pretrain import Pretrain
from tests.toys import toy_batch

FILES = {
    name: path
    for name, path in config_files(packaged()).items()
    if (path.parent.name in ("itpn", "mae") and "-clip-" not in name) or name.startswith("pretrain_")
}
PUBLISHED = [name for name in FILES if name.endswith("in1k")]
NAME = re.compile(
    r"(?P<method>itpn-pixel|itpn-pixel-mfm|mae)_(?P<family>hivit|itpn)-(?P<size>base|large)-p(?P<patch>\d+)"
    r"_(?P<gpus>\d+)xb(?P<per_gpu>\d+)-amp-coslr-(?P<epochs>\d+)e_in1k"
)
SIZES = {  # parameters, trainable ones, multiply-adds: mmpretrain's and the authors' own models
    "itpn-pixel_hivit-base": (102_682_400, 102_481_696, 18_473_799_680),
    "itpn-pixel_hivit-large": (314_253_792, 314_002_912, 63_977_109_504),
    "itpn-pixel_itpn-base": (108_493_344, 108_392_992, 17_854_226_432),
    "itpn-pixel_itpn-large": (318_339_808, 318_239_456, 61_193_545_728),
    # mmpretrain's decoder has a frozen position more, a class token's, of 512 numbers
    "mae_hivit-base": (98_071_168 - 512, None, 18_473_799_680),
    "mae_hivit-large": (309_396_288 - 512, None, 63_977_109_504),
}


def promised_names() -> set[str]:
    mmpretrain = {
        f"_hivit-{s}-p16_8xb512-amp-coslr-{e}e_in1k" for s in ("base", "large") for e in (400, 800, 1600)
    }
    official = {f"_itpn-{s}-p16_64xb64-amp-coslr-{e}e_in1k" for s in ("base", "large") for e in (400, 1600)}
    features = {f"_hivit-{s}-p16_8xb512-amp-coslr-800e_in1k" for s in ("base", "large")} | {
        f"_itpn-{s}-p16_64xb64-amp-coslr-800e_in1k" for s in ("base", "large")
    }
    return (
        {f"itpn-pixel{name}" for name in mmpretrain | official}
        | {f"itpn-pixel-mfm{name}" for name in features}
        | {f"mae{name}" for name in mmpretrain}
    )


@cache
def on_meta(model: ModelConfig, objective: PixelConfig) -> PixelObjective:
    with torch.device("meta"):
        return PixelObjective(model, objective)


def shrunk(recipe: Pretrain) -> Pretrain:
    """The same choices, toy numbers."""
    model, decoder = recipe.model, recipe.objective.decoder
    return replace(
        recipe,
        model=replace(
            model,
            backbone=replace(model.backbone, width=32, depths=(1, 1, 2), num_heads=2, image_size=64),
            pyramid=model.pyramid and replace(model.pyramid, width=24, depth=1),
        ),
        objective=replace(recipe.objective, decoder=replace(decoder, width=32, depth=1, num_heads=2)),
    )


def test_every_published_config_is_there():
    assert set(PUBLISHED) == promised_names()
    assert {"pretrain_own-data", "pretrain_demo"} <= set(FILES)


def test_configs_are_short():
    assert all(3 <= len(path.read_text().splitlines()) <= 10 for path in FILES.values())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_name_agrees_with_its_contents(name):
    match = NAME.fullmatch(name)
    assert match is not None
    told, recipe = match.groupdict(), load(FILES[name])
    backbone, features = recipe.model.backbone, recipe.objective.features
    assert backbone.size == f"{told['family']}_{told['size']}"
    assert backbone.patch_size == int(told["patch"])
    assert recipe.loop.batch_size == int(told["gpus"]) * int(told["per_gpu"]) == 4096
    assert recipe.loop.epochs == int(told["epochs"])
    assert recipe.loop.precision in ("auto", "bf16", "fp16")
    assert (recipe.model.pyramid is None) == (told["method"] == "mae")
    assert features.weight == (0.3 if "mfm" in told["method"] else 0)
    assert recipe.data.root.as_posix() == "data/imagenet"


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_schedule_is_the_published_one(name):
    recipe = load(FILES[name])
    start = 2.4e-7 if "_hivit" in name else 0.0
    epochs = recipe.loop.epochs

    def lr(epoch: float) -> float:
        peak = recipe.optim.peak_lr(recipe.loop.batch_size)
        return lr_at(int(epoch * 100), recipe.schedule, peak=peak, epochs=epochs, steps_per_epoch=100)

    expected = [start, 2.4e-3, 1.2e-3, 0.0]
    assert [lr(0), lr(40), lr((40 + epochs) / 2), lr(epochs)] == pytest.approx(expected, abs=1e-12)
    assert (recipe.optim.betas, recipe.optim.weight_decay) == ((0.9, 0.95), 0.05)


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name):
    recipe = load(FILES[name])
    objective = on_meta(recipe.model, recipe.objective)
    found = count_parameters(objective)
    features = count_parameters(objective.features) if objective.features is not None else Parameters(0, 0)
    total, trainable, macs = SIZES[name.replace("-mfm", "").partition("-p16")[0]]
    assert found.total - features.total == total
    assert trainable is None or found.trainable - features.trainable == trainable
    assert backbone_multiply_adds(objective.model.backbone, recipe.image_size) == macs


@pytest.mark.parametrize("name", FILES)
def test_the_parts_hold_every_parameter_once(name):
    recipe = load(FILES[name])
    objective = on_meta(recipe.model, recipe.objective)
    assert (
        sum(count_parameters(part).total for part in parts(objective).values())
        == count_parameters(objective).total
    )


@pytest.mark.parametrize("name", FILES)
def test_one_step_moves_every_trained_parameter(name):
    recipe = shrunk(load(FILES[name]))
    torch.manual_seed(0)
    objective = PixelObjective(recipe.model, recipe.objective)
    before = {key: value.detach().clone() for key, value in objective.named_parameters()}
    optimizer = adamw(objective, recipe.optim)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    objective(toy_batch(objective, size=2))["loss"].backward()
    optimizer.step()
    still = [key for key, value in objective.named_parameters() if torch.equal(value, before[key])]
    assert still == [key for key, value in objective.named_parameters() if not value.requires_grad]
    assert all(value.isfinite().all() for value in objective.parameters())
