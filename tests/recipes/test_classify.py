"""Every config that fine-tunes: its name tells the truth, its model has the published size, its values are
the published ones, it trains a step."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from itpn.engine.optim import adamw
from itpn.engine.schedule import lr_at
from itpn.evaluate.count import count_parameters
from itpn.heads.classify import Classifier
from itpn.heads.finetune import ClassifyObjective
from itpn.nn.depth import lr_scales
from itpn.nn.hivit import HiViT
from itpn.objectives.pixel import PixelConfig
from itpn.recipes.classify import Classify, own_data
from itpn.recipes.lookup import config_files, load, packaged

FILES = {
    name: path
    for name, path in config_files(packaged()).items()
    if path.parent.name == "classify" or name.startswith("classify_")
}
PUBLISHED = [name for name in FILES if name.endswith("in1k")]
NAME = re.compile(
    r"(?P<family>itpn-pixel|itpn-clip|fast-itpn|hivit)-(?P<size>tiny|small|base|large)(-(?P<pixels>\d+)px)?"
    r"_(?P<epochs>\d+)e_in1k"
)
SIZES = {  # parameters with a head of 1,000 classes at 224 pixels; of Fast-iTPN large at 640
    "itpn-pixel-base": 78_557_992,
    "itpn-pixel-large": 288_493_576,
    "itpn-clip-base": 78_583_720,
    "itpn-clip-large": 288_556_168,
    "fast-itpn-tiny": 24_219_976,
    "fast-itpn-small": 39_902_920,
    "fast-itpn-base": 84_825_192,
    "fast-itpn-large": 313_095_592,
    "hivit-tiny": 19_180_000,  # mmpretrain states two decimals
    "hivit-small": 37_530_000,
    "hivit-base": 79_050_000,
}
VALUES = {  # batch, peak and last learning rate, warm-up, layer decay and its rule, drop path, average
    "itpn-pixel-base": (1024, 1.6e-3, 5e-6, 5, 0.60, "itpn", 0.15, 0),
    "itpn-pixel-large": (1024, 4e-3, 5e-6, 5, 0.55, "itpn", 0.2, 0),
    "itpn-clip-base": (1024, 5e-4, 1e-6, 20, 0.60, "itpn", 0.1, 0),
    "itpn-clip-large": (512, 2e-4, 1e-6, 5, 0.55, "itpn", 0.25, 0),
    "fast-itpn-tiny": (1024, 1e-4, 1e-6, 5, 0.80, "fast", 0.1, 0.9999),
    "fast-itpn-small": (1024, 1e-4, 1e-6, 5, 0.90, "fast", 0.1, 0.9999),
    "fast-itpn-base": (1024, 1e-4, 1e-6, 3, 0.90, "fast", 0.1, 0.9999),
    "fast-itpn-large": (512, 5e-5, 1e-6, 3, 0.95, "fast", 0.2, 0.9999),
    "hivit-tiny": (1024, 1e-3, 1e-5, 20, 1.0, "sound", 0.05, 0),
    "hivit-small": (1024, 1e-3, 1e-5, 20, 1.0, "sound", 0.3, 0),
    "hivit-base": (1024, 1e-3, 1e-5, 20, 1.0, "sound", 0.5, 0),
}


def model_of(name: str) -> str:
    match = NAME.fullmatch(name)
    assert match
    return f"{match['family']}-{match['size']}"


def recipe_of(name: str) -> Classify:
    recipe = load(FILES[name])
    assert isinstance(recipe, Classify)
    return recipe


def test_the_promised_configs_are_there():
    sizes = ("tiny", "small", "base")
    assert set(PUBLISHED) == {
        "itpn-pixel-base_100e_in1k", "itpn-pixel-large_50e_in1k", "itpn-clip-base_100e_in1k",
        "itpn-clip-large_50e_in1k", "fast-itpn-large-640px_20e_in1k",
        *(f"hivit-{size}_300e_in1k" for size in sizes),
        *(f"fast-itpn-{size}{pixels}_{20 if size == 'base' else 100}e_in1k"
          for size in sizes for pixels in ("", "-384px", "-512px")),
    }  # fmt: skip
    assert {"classify_own-data", "classify_demo"} <= set(FILES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_name_tells_the_truth(name):
    recipe, match = recipe_of(name), NAME.fullmatch(name)
    assert match
    side = int(match["pixels"] or 224)
    assert recipe.image_size == (side, side) == (recipe.model.backbone.image_size,) * 2
    assert recipe.loop.epochs == int(match["epochs"])
    family = {"itpn-pixel": "itpn", "itpn-clip": "itpn", "fast-itpn": "fast_itpn", "hivit": "hivit"}
    assert recipe.model.backbone.size == f"{family[match['family']]}_{match['size']}"
    assert recipe.model.pyramid is None


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name):
    recipe = recipe_of(name)
    with torch.device("meta"):
        model = Classifier(HiViT(recipe.model.backbone), recipe.classifier)
    total, side = SIZES[model_of(name)], recipe.image_size[0]
    if not name.startswith("fast-itpn-large"):  # position tables grow with the image
        total += ((side // 16) ** 2 - 196) * recipe.model.backbone.shape.width
    found = count_parameters(model).total
    assert (round(found, -4) if name.startswith("hivit") else found) == total


@pytest.mark.parametrize("name", PUBLISHED)
def test_values_are_the_published_ones(name):
    recipe = recipe_of(name)
    peak, decay = recipe.optim.peak_lr(recipe.loop.batch_size), recipe.layer_decay
    found = (
        recipe.loop.batch_size, peak, recipe.schedule.min_lr, recipe.schedule.warmup_epochs, decay.rate,
        decay.rule, recipe.model.backbone.drop_path, recipe.finetune.average,
    )  # fmt: skip
    assert found == pytest.approx(VALUES[model_of(name)])
    assert recipe.optim.betas == (0.9, 0.999)
    assert recipe.optim.weight_decay == 0.05
    assert (recipe.data.min_scale, recipe.data.randaugment) == (0.08, "rand-m9-mstd0.5-inc1")
    mix = recipe.finetune.mix
    assert (mix.mixup, mix.cutmix, mix.erasing, mix.smoothing, mix.prob) == (0.8, 1.0, 0.25, 0.1, 1.0)
    rates = [
        lr_at(step, recipe.schedule, peak=peak, epochs=recipe.loop.epochs, steps_per_epoch=10)
        for step in range(10 * recipe.loop.epochs)
    ]
    assert max(rates) == pytest.approx(peak)


@pytest.mark.parametrize("name", FILES)
def test_it_trains_a_step_at_toy_size(name):
    recipe = recipe_of(name)
    small = {"width": 32, "depths": (1, 1, 2), "num_heads": 2, "image_size": 32}
    backbone = replace(recipe.model.backbone, **small)
    finetune = replace(recipe.finetune, mean=PixelConfig.mean, std=PixelConfig.std)
    torch.manual_seed(0)
    head = replace(recipe.classifier, num_classes=3)
    objective = ClassifyObjective(backbone, head, finetune, (32, 32))
    trained = [key for key, parameter in objective.named_parameters() if parameter.requires_grad]
    scales = lr_scales(trained, backbone.shape.depths, recipe.layer_decay)
    optimizer = adamw(objective, recipe.optim, scales)
    generator = torch.Generator().manual_seed(0)
    draws = [objective.draw(generator) for _ in range(4)]
    batch = {key: torch.stack([draw[key] for draw in draws]) for key in draws[0]}
    batch["images"] = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=generator)
    batch["labels"] = torch.tensor([0, 1, 2, 0])
    loss = objective(batch)["loss"]
    loss.backward()
    optimizer.step()
    objective.end_step(0, 10)
    assert loss.item() == pytest.approx(torch.tensor(3.0).log().item(), abs=0.2)
    assert all(parameter.grad is not None for _, parameter in objective.model.named_parameters()
               if parameter.requires_grad)  # fmt: skip


def test_own_data_asks_for_a_folder_and_weights_alone():
    assert own_data().data.root == Path("data/images")
    assert json.dumps(own_data(size="hivit_tiny", epochs=3).loop.epochs) == "3"
