"""Fine-tuning a segmenter: from a recipe to model, data, objective, evaluation and pictures."""

import contextlib
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL.Image import Image

from itpn.data.aligned import fitted
from itpn.data.check_labels import check_classes
from itpn.data.labelled import LabelledImages
from itpn.data.picture import BadImageError
from itpn.data.segmentation import SegmentationDataConfig, find_splits, train_crops
from itpn.engine.distributed import join_world
from itpn.engine.numerics import Precision, evaluating
from itpn.engine.run import Run
from itpn.evaluate.segment import SegmentationScores, SegmentFn, evaluate_segmentation
from itpn.heads.segment import Segmenter, SegmentObjective
from itpn.heads.windows import InferenceConfig
from itpn.nn.linear import casting_once
from itpn.nn.pyramid import ModelConfig
from itpn.objectives.pixel import PixelConfig
from itpn.recipes.segment import Segment
from itpn.show.segment import comparison_picture
from itpn.tasks import finetuning
from itpn.tasks.common import begins_with, config_of, is_finished, left_out, open_run
from itpn.tasks.finetuning import fine_tune, fine_tuned, introduce
from itpn.weights import files, loading
from itpn.weights.files import Weights

NUM_PICTURED = 6


def segment(recipe: Segment) -> Path:
    """Fine-tune as the recipe says, or go on where its run stopped; returns the run directory.

    Raises:
        UserError: settings, data or weights that do not go together.
    """
    with join_world(recipe.loop.device) as world:
        images, val = find_splits(recipe.data, recipe.val_share)
        check_classes(images)
        weights = files.read(recipe.init) if recipe.init else None
        recipe = settled(recipe, images.labelling.num_classes, weights)
        run = open_run(recipe, world)
        if is_finished(run):
            return run.directory
        introduce(run, images, val)
        objective = build(recipe)
        if weights and begins_with(run, weights.path):
            run.say(loading.load_model(objective.model, weights, pyramid=recipe.init_pyramid))
        fine_tune(
            recipe,
            objective,
            images,
            partial(train_crops, images, recipe.data),
            Evaluation(recipe, objective, images, val, run),
            group_norm="--segmenter.norm group",
        )
        return run.directory


def settled(recipe: Segment, num_classes: int, weights: Weights | None) -> Segment:
    """The recipe with what follows from the data and from the weights to start from: the number of classes,
    the architecture, the normalisation of images."""
    ours, there = recipe.model, None
    mean, std = PixelConfig.mean, PixelConfig.std
    if weights is not None:
        there = weights.part("model", ModelConfig)
        mean, std = weights.statistics(mean, std)
    backbone = fine_tuned(ours.backbone, there.backbone if there else None)
    height, width = recipe.data.crop
    if height == width:  # the other position table stays as it is, and is resampled in every forward pass
        backbone = replace(backbone, relative_image_size=height)
    pyramid = there.pyramid if there and recipe.init_pyramid and there.pyramid else ours.pyramid
    segmenter = replace(
        recipe.segmenter,
        num_classes=num_classes,
        mean=recipe.segmenter.mean or mean,
        std=recipe.segmenter.std or std,
    )
    return replace(recipe, model=ModelConfig(backbone=backbone, pyramid=pyramid), segmenter=segmenter)


def build(recipe: Segment) -> SegmentObjective:
    """A settled recipe's objective with its starting weights, the same on every rank."""
    torch.manual_seed(recipe.loop.seed)
    return SegmentObjective(recipe.model, recipe.segmenter, recipe.image_size)


class Evaluation(finetuning.Evaluation):
    """Validates now and then, keeps the best and the last weights, and draws what the model says."""

    NAMES: ClassVar = {"miou": "mIoU"}
    CURVES = ("loss", "accuracy", "miou", "pixel_accuracy")
    PICTURE = "the newest segmentation"

    def __init__(
        self,
        recipe: Segment,
        objective: SegmentObjective,
        images: LabelledImages,
        val: LabelledImages,
        run: Run,
    ) -> None:
        super().__init__(recipe, images, run)
        self.recipe, self.objective, self.val = recipe, objective, val
        self.labels = labeller(objective, recipe.inference, recipe.loop.precision, run.world.device)
        self.scores: SegmentationScores | None = None

    @property
    def model(self) -> SegmentObjective:
        return self.objective

    @property
    def portable_config(self) -> dict[str, Any]:
        return portable_config(self.recipe, self.val.labelling.class_names)

    def measure(self) -> dict[str, float]:
        self.objective.eval()
        world = self.run.world
        with casting_once(world.device):
            self.scores = evaluate_segmentation(
                self.labels,
                self.val,
                self.recipe.data,
                device=world.device,
                rank=world.rank,
                world_size=world.size,
                on_bad=partial(left_out, self.bad),
            )
        return self.scores.numbers()

    def report(self, directory: Path) -> None:
        if self.scores is not None:
            write_report(self.scores, directory, self.run.warnings)

    def picture(self, epoch: float, step: int) -> dict[str, Image]:
        if step == 0:
            return {}
        self.objective.eval()
        found = compared(self.labels, self.val, self.recipe.data, self.run.world.device)
        return {} if found is None else {"segmentation": found}


def labeller(
    model: Segmenter, inference: InferenceConfig, precision: Precision, device: torch.device
) -> SegmentFn:
    """What a model labels an image with, as evaluations call it."""

    def labels(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        with evaluating(precision, device):
            return model.segment(images, size, inference)

    return labels


def compared(
    labels: SegmentFn, val: LabelledImages, data: SegmentationDataConfig, device: torch.device
) -> Image | None:
    """A few images, their true labels, those of the model, and its mistakes; None if none can be read."""
    images, truths, predictions, captions = [], [], [], []
    for i in torch.linspace(0, len(val) - 1, min(NUM_PICTURED, len(val))).long().tolist():
        with contextlib.suppress(BadImageError):
            image, truth = val.pair(i)
            found = labels(fitted(image, data.short, data.long).to(device), (image.height, image.width))
            images.append(image)
            truths.append(truth)
            predictions.append(found[0].cpu().numpy())
            captions.append(val.name(i).name)
    if not images:
        return None
    return comparison_picture(images, truths, predictions, val.labelling.class_names, captions)


def portable_config(recipe: Segment, class_names: tuple[str, ...]) -> dict[str, Any]:
    """What the file of a segmenter says of itself: the recipe, its classes, and the images it wants."""
    images = {
        "mean": recipe.segmenter.mean,
        "std": recipe.segmenter.std,
        "image_size": recipe.image_size,
        "scale": (recipe.data.short, recipe.data.long),
    }
    return config_of(recipe, paths=False) | {"classes": list(class_names), "input": images}


def write_report(found: SegmentationScores, directory: Path, warnings: Sequence[str]) -> Path:
    """A report as JSON; what could not be counted is null."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "report.json"
    rows = [_without_nan(row._asdict()) for row in found.classes]
    rest = {
        "images": found.num_images,
        "left_out": found.num_left_out,
        "warnings": [*warnings],
        "classes": rows,
    }
    path.write_text(json.dumps(_without_nan(found.overall) | rest, indent=1) + "\n")
    return path


def _without_nan(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in values.items()
    }
