"""Fine-tuning and testing a classifier: from a recipe to model, data, objective and evaluation."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from itpn.data.classes import check_same_classes, class_names_of, describe_balance, readable
from itpn.data.folders import split_folder
from itpn.data.images import find_images
from itpn.data.loader import DataConfig, train_loader
from itpn.data.picture import BadImageError
from itpn.data.source import Images, hold_out
from itpn.engine.distributed import World, join_world
from itpn.engine.numerics import Precision, evaluating
from itpn.engine.run import Run
from itpn.evaluate.classify import Predictions, Report, predict, report, scores
from itpn.heads.finetune import ClassifyObjective
from itpn.nn.linear import casting_once
from itpn.nn.pyramid import ModelConfig
from itpn.objectives.pixel import PixelConfig
from itpn.recipes.classify import Classify
from itpn.show.classify import confusion_picture
from itpn.tasks import finetuning
from itpn.tasks.common import (
    begins_with,
    config_of,
    going_through,
    is_finished,
    left_out,
    open_run,
)
from itpn.tasks.finetuning import fine_tune, fine_tuned, introduce
from itpn.weights import files, loading
from itpn.weights.files import Weights


def classify(recipe: Classify) -> Path:
    """Fine-tune as the recipe says, or go on where its run stopped; returns the run directory.

    Raises:
        UserError: settings, data or weights that do not go together.
    """
    with join_world(recipe.loop.device) as world:
        images, val = splits(recipe.data, recipe.val_share)
        weights = files.read(recipe.init) if recipe.init else None
        recipe = settled(recipe, len(images.class_names or ()), weights)
        run = open_run(recipe, world)
        if is_finished(run):
            return run.directory
        introduce(run, images, val)
        run.say(describe_balance(images))
        objective = build(recipe)
        if weights and begins_with(run, weights.path):
            run.say(loading.load_backbone(objective.model.backbone, weights))
            objective.restart_average()
        loader = partial(train_loader, images, recipe.data, image_size=recipe.image_size)
        fine_tune(recipe, objective, images, loader, Evaluation(recipe, objective, images, val, run))
        return run.directory


def splits(data: DataConfig, val_share: float) -> tuple[Images, Images]:
    """Images to train and to validate on, of the same classes; a share is held out where there is no val.

    Raises:
        UserError: there are no class folders, or train and val have different ones.
    """
    images = find_images(data.root, "train", data.list)
    class_names_of(images)
    if split_folder(data.root, "val") is None:
        return hold_out(images, val_share, seed=0)
    val = find_images(data.root, "val")
    check_same_classes(images, val)
    return images, val


def settled(recipe: Classify, num_classes: int, weights: Weights | None) -> Classify:
    """The recipe with what follows from the data and from the weights to start from: the number of classes,
    the architecture, the normalisation of images."""
    finetune, there = recipe.finetune, None
    mean, std = PixelConfig.mean, PixelConfig.std
    if weights is not None:
        there = weights.part("model", ModelConfig).backbone
        mean, std = weights.statistics(mean, std)
    backbone = fine_tuned(recipe.model.backbone, there)
    height, width = recipe.image_size
    if height == width:  # else tables keep their size, and are resampled in every forward pass
        backbone = replace(backbone, image_size=height, relative_image_size=None)
    return replace(
        recipe,
        model=ModelConfig(backbone=backbone, pyramid=None),
        classifier=replace(recipe.classifier, num_classes=num_classes),
        finetune=replace(finetune, mean=finetune.mean or mean, std=finetune.std or std),
    )


def build(recipe: Classify) -> ClassifyObjective:
    """A settled recipe's objective with its starting weights, the same on every rank."""
    torch.manual_seed(recipe.loop.seed)
    return ClassifyObjective(recipe.model.backbone, recipe.classifier, recipe.finetune, recipe.image_size)


class Evaluation(finetuning.Evaluation):
    """Validates at the end of epochs, and keeps the best and the last weights."""

    NAMES: ClassVar = {"val_top1": "top-1"}
    CURVES = ("loss", "accuracy", "val_top1", "val_loss")
    PICTURE = "confusion.png"

    def __init__(
        self, recipe: Classify, objective: ClassifyObjective, images: Images, val: Images, run: Run
    ) -> None:
        super().__init__(recipe, images, run)
        self.recipe, self.objective, self.val = recipe, objective, val
        self.found: Report | None = None

    @property
    def model(self) -> nn.Module:
        return self.objective.evaluated

    @property
    def portable_config(self) -> dict[str, Any]:
        return portable_config(self.recipe, self.val.class_names or ())

    def measure(self) -> dict[str, float]:
        model, normalise = self.model.eval(), self.objective.normalise
        found = validate(
            lambda images: model(normalise(images)),
            self.recipe,
            self.val,
            self.run.world,
            partial(left_out, self.bad),
        )
        self.found = report(found, self.val.class_names or ())
        return scores(self.found)

    def report(self, directory: Path) -> None:
        if self.found is not None:
            write_report(self.found, self.val.class_names or (), directory, self.run.warnings)


def portable_config(recipe: Classify, class_names: tuple[str, ...]) -> dict[str, Any]:
    """What the file of a classifier says of itself: the recipe, its classes, and the images it wants."""
    images = {"mean": recipe.finetune.mean, "std": recipe.finetune.std, "image_size": recipe.image_size}
    return config_of(recipe, paths=False) | {"classes": list(class_names), "input": images}


def in_precision(
    call: Callable[[Tensor], Tensor], precision: Precision, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """A model's forward pass as evaluations call it: without gradient, in the precision of training."""

    def run(images: Tensor) -> Tensor:
        with evaluating(precision, device):
            return call(images).float()

    return run


def validate(
    logits: Callable[[Tensor], Tensor],
    recipe: Classify,
    val: Images,
    world: World,
    on_bad: Callable[[BadImageError], None],
    progress: str = "",
) -> Predictions:
    """Predictions for every validation image, once over all ranks."""
    forward = in_precision(logits, recipe.loop.precision, world.device)
    with casting_once(world.device):
        return predict(forward, val, recipe.eval_batch, going_through(recipe, world, on_bad), progress)


def write_report(
    found: Report, class_names: tuple[str, ...], directory: Path, warnings: Sequence[str]
) -> list[Path]:
    """A report as JSON and as a picture."""
    names = readable(class_names)
    path, picture = directory / "report.json", directory / "pictures" / "confusion.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    rows = [row._asdict() | ({} if row.images else {"top1": None}) for row in found.classes]
    numbers = {"val_top1": None, "val_top5": None, **scores(found)}  # null where nothing was measured
    rest = {"images": found.images, "unreadable": found.unreadable, "warnings": [*warnings], "classes": rows}
    path.write_text(json.dumps(numbers | rest, indent=1) + "\n")
    confusion_picture(found.confusion, found.reliability, names, picture)
    return [path, picture]
