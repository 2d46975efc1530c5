"""Every config that detects: its name tells the truth, its values are the published ones, it trains."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from itpn.engine.optim import adamw
from itpn.engine.schedule import lr_at
from itpn.errors import UserError
from itpn.evaluate.count import count_parameters
from itpn.heads.detect import Detector
from itpn.nn.depth import lr_scales
from itpn.recipes.detect import Detect, own_data
from itpn.recipes.lookup import config_files, load, packaged
from itpn.tasks.detect import build, settled
from tests.toys import toy_scenes

FILES = {
    name: path
    for name, path in config_files(packaged()).items()
    if path.parent.name == "detect" or name.startswith("detect_")
}
PUBLISHED = [name for name in FILES if not name.startswith("detect_")]
NAME = re.compile(
    r"(?P<cascade>cascade-)?mask-rcnn_itpn-(?P<pretrained>pixel-|clip-|)(?P<size>base|large)_(?P<times>\d)x_coco"
)
DROP_PATH_AND_RATE = {  # of those released; ours have the values beside them
    ("mask", "base", 12): (0.05, 2e-4),
    ("mask", "base", 36): (0.3, 1.5e-4),
    ("mask", "large", 12): (0.2, 2e-4),
    ("mask", "large", 36): (0.3, 1.5e-4),
    ("cascade", "base", 36): (0.2, 1e-4),
    ("cascade", "large", 36): (0.2, 1e-4),
}


def recipe_of(name: str) -> Detect:
    recipe = load(FILES[name])
    assert isinstance(recipe, Detect)
    return recipe


def told(name: str) -> dict[str, str | None]:
    match = NAME.fullmatch(name)
    assert match
    return match.groupdict()


def test_the_promised_configs_are_there():
    models = [f"itpn-{pretrained}-{size}" for pretrained in ("pixel", "clip") for size in ("base", "large")]
    assert set(PUBLISHED) == {
        "mask-rcnn_itpn-base_1x_coco",
        *(f"mask-rcnn_{model}_{times}x_coco" for model in models for times in (1, 3)),
        *(f"cascade-mask-rcnn_{model}_3x_coco" for model in models),
    }
    assert {"detect_own-data", "detect_demo"} <= set(FILES)


def test_the_short_name_means_the_usual_one():
    short, long = (recipe_of(f"mask-rcnn_itpn-{name}_1x_coco") for name in ("base", "pixel-base"))
    assert replace(short, name="") == replace(long, name="")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_name_tells_the_truth(name):
    recipe, name_says = recipe_of(name), told(name)
    assert recipe.loop.epochs == 12 * int(name_says["times"])
    assert recipe.model.backbone.size == f"itpn_{name_says['size']}"
    assert recipe.detector.regions.cascade == bool(name_says["cascade"])
    assert (recipe.model.backbone.layer_scale is not None) == (name_says["pretrained"] == "clip-")
    assert recipe.data.root == Path("data/coco")


@pytest.mark.parametrize("name", PUBLISHED)
def test_values_are_the_published_ones(name):
    recipe, name_says = recipe_of(name), told(name)
    kind = "cascade" if name_says["cascade"] else "mask"
    drop_path, peak = DROP_PATH_AND_RATE[kind, name_says["size"], recipe.loop.epochs]
    assert (recipe.model.backbone.drop_path, recipe.optim.peak_lr(64)) == (drop_path, peak)
    assert (recipe.optim.betas, recipe.optim.weight_decay) == ((0.9, 0.999), 0.05)
    rate = 0.90 if name_says["size"] == "base" else 0.95
    assert (recipe.layer_decay.rate, recipe.layer_decay.rule) == (rate, "sound")
    assert (recipe.loop.batch_size, recipe.loop.clip_grad) == (64, None)
    assert recipe.model.backbone.checkpointing
    regions, proposals, scale = recipe.detector.regions, recipe.detector.proposals, recipe.data.scale
    assert (regions.box_weight, regions.head.norm, regions.head.num_convs) == (10, "batch", 4)
    assert proposals.num_proposals == ((2000, 1000) if kind == "cascade" else (1000, 1000))
    assert proposals.box_beta == (1 / 9 if kind == "cascade" else 0)
    assert (scale.short_sides, scale.max_side) == (tuple(range(480, 801, 32)), 1333)
    steps, epochs = 1832, recipe.loop.epochs
    first, second = (epochs * share // 12 * steps for share in (9, 11))
    expected = {0: peak / 1000, 250: peak * 0.5005, 500: peak, first - 1: peak, first: peak / 10}
    expected |= {second - 1: peak / 10, second: peak / 100, epochs * steps - 1: peak / 100}
    rates = {
        step: lr_at(step, recipe.schedule, peak=peak, epochs=epochs, steps_per_epoch=steps)
        for step in expected
    }
    assert rates == pytest.approx(expected)


def test_the_size_of_the_base_model():
    recipe = settled(recipe_of("mask-rcnn_itpn-base_1x_coco"), None, None)
    with torch.device("meta"):
        model = Detector(recipe.model, recipe.detector)
    assert count_parameters(model).total == 101_459_824


@pytest.mark.parametrize("name", ["mask-rcnn_itpn-clip-base_1x_coco", "detect_own-data", "detect_demo"])
def test_it_trains_a_step_at_toy_size(name):
    recipe = recipe_of(name)
    small = {"width": 32, "depths": (1, 1, 2), "num_heads": 2, "image_size": 32}
    regions = recipe.detector.regions
    head = replace(regions.head, num_convs=1, conv_width=24, hidden_width=32)
    detector = replace(recipe.detector, num_classes=3, regions=replace(regions, head=head))
    model = replace(
        recipe.model,
        backbone=replace(recipe.model.backbone, **small),
        pyramid=replace(recipe.model.pyramid, width=24),
    )
    recipe = settled(replace(recipe, model=model, detector=detector), None, None)
    objective = build(recipe)
    trained = [name for name, _ in objective.named_parameters()]
    scales = lr_scales(trained, recipe.model.backbone.shape.depths, recipe.layer_decay)
    optimizer = adamw(objective, recipe.optim, scales)
    batch, generator = toy_scenes(2), torch.Generator().manual_seed(0)
    draws = [objective.draw(generator) for _ in range(2)]
    batch |= {key: torch.stack([draw[key] for draw in draws]) for key in draws[0]}
    loss = objective(batch)["loss"]
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    assert all(parameter.grad is not None for parameter in objective.parameters())


def test_what_does_not_go_together_is_refused():
    with pytest.raises(UserError, match="must not be none"):
        replace(own_data(), model=replace(own_data().model, pyramid=None))
    with pytest.raises(UserError, match="--eval-every"):
        replace(own_data(), eval_every=-1)
    with pytest.raises(UserError, match="--val-share"):
        replace(own_data(), val_share=0.0)
    assert own_data(size="hivit_tiny", epochs=3).loop.epochs == 3
