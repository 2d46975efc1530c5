"""Every config that segments: names, the published values, a step at toy size."""

import re
from dataclasses import replace

import pytest
import torch

from itpn.engine.optim import adamw
from itpn.engine.schedule import lr_at
from itpn.errors import UserError
from itpn.evaluate.count import count_parameters
from itpn.heads.segment import Segmenter
from itpn.nn.depth import lr_scales
from itpn.recipes.lookup import config_files, load, packaged
from itpn.recipes.segment import Segment, own_data
from itpn.tasks.segment import build, settled

FILES = {
    name: path
    for name, path in config_files(packaged()).items()
    if path.parent.name == "segment" or name.startswith("segment_")
}
PUBLISHED = [name for name in FILES if name.startswith("upernet")]
NAME = re.compile(
    r"upernet_itpn-(?P<pretrained>pixel-|clip-|)(?P<size>base|large)_(?P<thousands>\d+)k_ade20k-(?P<crop>\d+)"
)
VALUES = {  # drop path, layer scale, layer decay, blocks per level of the pyramid; parameters of the model
    "base": (0.1, None, 0.90, 2),
    "pixel-large": (0.2, None, 0.95, 2),
    "clip-base": (0.2, 0.1, 0.90, 1),
    "clip-large": (0.2, 0.1, 0.95, 1),
}


def recipe_of(name: str) -> Segment:
    recipe = load(FILES[name])
    assert isinstance(recipe, Segment)
    return recipe


def told(name: str) -> dict[str, str]:
    match = NAME.fullmatch(name)
    assert match
    return match.groupdict()


def test_the_promised_configs_are_there():
    models = ("itpn-base", "itpn-pixel-large", "itpn-clip-base", "itpn-clip-large")
    assert set(PUBLISHED) == {f"upernet_{model}_160k_ade20k-512" for model in models}
    assert {"segment_own-data", "segment_demo"} <= set(FILES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_name_tells_the_truth(name):
    recipe, name_says = recipe_of(name), told(name)
    crop = int(name_says["crop"])
    assert recipe.data.crop == recipe.inference.crop == recipe.image_size == (crop, crop)
    assert recipe.loop.iterations == 1000 * int(name_says["thousands"])
    assert recipe.model.backbone.size == f"itpn_{name_says['size']}"
    assert recipe.data.format == "ade20k"
    assert recipe.segmenter.num_classes == 150


@pytest.mark.parametrize("name", PUBLISHED)
def test_values_are_the_published_ones(name):
    recipe, name_says = recipe_of(name), told(name)
    backbone, pyramid = recipe.model.backbone, recipe.model.pyramid
    found = (backbone.drop_path, backbone.layer_scale, recipe.layer_decay.rate, pyramid.depth)
    assert found == VALUES[name_says["pretrained"] + name_says["size"]]
    assert (recipe.optim.peak_lr(16), recipe.optim.betas, recipe.optim.weight_decay) == (
        3e-5,
        (0.9, 0.999),
        0.05,
    )
    assert (recipe.layer_decay.rule, recipe.optim.weight_decay_rule) == ("segmentation", "itpn-pixel")
    assert (recipe.loop.batch_size, recipe.loop.clip_grad, recipe.eval_every) == (16, None, 16_000)
    assert (recipe.inference.mode, recipe.inference.stride) == ("slide", (341, 341))
    head = recipe.segmenter
    assert (head.width, head.norm, head.auxiliary_weight, head.loss_over) == (768, "batch", 0.4, "all")
    rates = {
        step: lr_at(step, recipe.schedule, peak=3e-5, epochs=160_000 / 1263, steps_per_epoch=1263)
        for step in (0, 750, 1500, 80_000, 160_000)
    }
    expected = {0: 3e-11, 750: 3e-5 * (1 - 750 / 160_000) * 0.5000005, 1500: 3e-5 * (1 - 1500 / 160_000)}
    assert rates == pytest.approx(expected | {80_000: 1.5e-5, 160_000: 0}, abs=1e-18)


def test_the_size_of_the_base_model():
    recipe = settled(recipe_of("upernet_itpn-base_160k_ade20k-512"), 150, None)
    with torch.device("meta"):
        model = Segmenter(recipe.model, recipe.segmenter)
    heads = 67_472_022 + (768 * 256 * 9 + 2 * 256 + 256 * 150 + 150)  # by hand in tests/heads
    tables = 24 * (63**2) * 8  # relative positions of every block and head
    assert count_parameters(model.model.backbone).total == 77_904_000 + tables
    assert count_parameters(model).total == count_parameters(model.model).total + heads


@pytest.mark.parametrize("name", FILES)
def test_it_trains_a_step_at_toy_size(name):
    recipe = recipe_of(name)
    small = {"width": 32, "depths": (1, 1, 2), "num_heads": 2, "image_size": 64}
    model = replace(
        recipe.model,
        backbone=replace(recipe.model.backbone, **small),
        pyramid=replace(recipe.model.pyramid, width=24),
    )
    recipe = replace(
        recipe,
        model=model,
        segmenter=replace(recipe.segmenter, width=16, auxiliary_width=8),
        data=replace(recipe.data, crop=(64, 64)),
    )
    recipe = settled(recipe, 3, None)
    objective = build(recipe)
    names = [key for key, _ in objective.named_parameters()]
    optimizer = adamw(objective, recipe.optim, lr_scales(names, (1, 1, 2), recipe.layer_decay))
    generator = torch.Generator().manual_seed(0)
    draws = [objective.draw(generator) for _ in range(2)]
    batch = {key: torch.stack([draw[key] for draw in draws]) for key in draws[0]}
    batch["images"] = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=generator)
    batch["labels"] = torch.randint(0, 3, (2, 64, 64), generator=generator)
    outputs = objective(batch)
    outputs["loss"].backward()
    optimizer.step()
    assert outputs["decode"].item() == pytest.approx(torch.tensor(3.0).log().item(), abs=0.2)
    assert all(parameter.grad is not None for parameter in objective.parameters())


def test_mistakes():
    with pytest.raises(UserError, match="pyramid"):
        replace(own_data(), model=replace(own_data().model, pyramid=None))
    with pytest.raises(UserError, match="--val-share"):
        replace(own_data(), val_share=1.0)
    with pytest.raises(UserError, match="--eval-every"):
        replace(own_data(), eval_every=-1)
