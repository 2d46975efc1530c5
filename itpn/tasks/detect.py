"""Fine-tuning a detector: from a recipe to model, data, objective, evaluation and pictures."""

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL.Image import Image

from itpn.data.coco import Coco
from itpn.data.detection import find_splits, train_loader
from itpn.engine.distributed import World, join_world
from itpn.engine.run import Run
from itpn.errors import UserError
from itpn.evaluate.detect import Result, Scores
from itpn.heads.detect import DetectObjective
from itpn.nn.pyramid import ModelConfig
from itpn.objectives.pixel import PixelConfig
from itpn.recipes.detect import Detect
from itpn.tasks import finetuning
from itpn.tasks.common import begins_with, config_of, is_finished, left_out, open_run
from itpn.tasks.finetuning import fine_tune, fine_tuned, introduce
from itpn.tasks.objects import compared, found_in, numbers_of, pictured, scores_of, write_report
from itpn.weights import files, loading
from itpn.weights.files import Weights


def detect(recipe: Detect) -> Path:
    """Fine-tune as the recipe says, or go on where its run stopped; returns the run directory.

    Raises:
        UserError: settings, data or weights that do not go together.
    """
    with join_world(recipe.loop.device) as world:
        images, val = find_splits(recipe.data, recipe.val_share)
        weights = files.read(recipe.init) if recipe.init else None
        recipe = settled(recipe, images, weights)
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
            partial(train_loader, images, recipe.data),
            Evaluation(recipe, objective, images, val, run),
            group_norm="--detector.regions.head.norm group",
        )
        return run.directory


def settled(recipe: Detect, images: Coco | None, weights: Weights | None) -> Detect:
    """The recipe with what follows from the data and from the weights to start from: the classes and whether
    there are masks, the architecture, the normalisation of images.

    Raises:
        UserError: the weights have no pyramid, and it is to be loaded.
    """
    ours, there, detector = recipe.model, None, recipe.detector
    mean, std = PixelConfig.mean, PixelConfig.std
    if weights is not None:
        there = weights.part("model", ModelConfig)
        mean, std = weights.statistics(mean, std)
        if recipe.init_pyramid and (there.pyramid is None or "pyramid" not in weights.parts):
            raise UserError(
                f"--init {weights.path}: it holds no pyramid, which is the detector's neck; give weights "
                "that were pre-trained with one, or take the backbone alone: --no-init-pyramid"
            )
    backbone = fine_tuned(ours.backbone, there.backbone if there else None)
    pyramid = there.pyramid if there and recipe.init_pyramid else ours.pyramid
    if images is not None:
        masks = detector.masks and images.has_masks
        detector = replace(detector, num_classes=len(images.categories), masks=masks)
    detector = replace(detector, mean=detector.mean or mean, std=detector.std or std)
    return replace(recipe, model=ModelConfig(backbone=backbone, pyramid=pyramid), detector=detector)


def build(recipe: Detect) -> DetectObjective:
    """A settled recipe's objective with its starting weights, the same on every rank."""
    torch.manual_seed(recipe.loop.seed)
    return DetectObjective(recipe.model, recipe.detector)


class Evaluation(finetuning.Evaluation):
    """Validates now and then, keeps the best and the last weights, and draws what the model finds."""

    NAMES: ClassVar = {"box_AP": "box AP", "mask_AP": "mask AP"}
    CURVES = ("loss", "class", "box", "mask", "box_AP", "mask_AP")
    PICTURE = "the newest detections"

    def __init__(self, recipe: Detect, objective: DetectObjective, images: Coco, val: Coco, run: Run) -> None:
        super().__init__(recipe, images, run)
        self.recipe, self.objective, self.val = recipe, objective, val
        self.pictured = pictured(val)
        self.scores: list[Scores] = []

    @property
    def model(self) -> DetectObjective:
        return self.objective

    @property
    def portable_config(self) -> dict[str, Any]:
        return portable_config(self.recipe, self.val)

    def measure(self) -> dict[str, float]:
        results = self._found_in(self.val, self.run.world)
        if not self.run.world.is_main:
            return {}
        self.scores = scores_of(self.val, results, self.recipe.detector.masks)
        return numbers_of(self.scores)

    def report(self, directory: Path) -> None:
        write_report(self.val, self.scores, directory, self.run.warnings)

    def picture(self, epoch: float, step: int) -> dict[str, Image]:
        world = self.run.world
        if step == 0 or not world.is_main:
            return {}
        drawn = compared(self.pictured, self._found_in(self.pictured, World(0, 1, world.device)))
        return {} if drawn is None else {"detections": drawn}

    def _found_in(self, coco: Coco, world: World) -> list[Result]:
        self.objective.eval()
        return found_in(
            self.objective,
            coco,
            self.recipe.data,
            batch_size=self.recipe.eval_batch,
            precision=self.recipe.loop.precision,
            world=world,
            on_bad=partial(left_out, self.bad),
        )


def portable_config(recipe: Detect, coco: Coco) -> dict[str, Any]:
    """What the file of a detector says of itself: the recipe, its classes, and the images it wants."""
    images = {
        "mean": recipe.detector.mean,
        "std": recipe.detector.std,
        "views": asdict(recipe.data.scale),
    }
    names = [category.name for category in coco.categories]
    ids = [category.id for category in coco.categories]
    return config_of(recipe, paths=False) | {"classes": names, "category_ids": ids, "input": images}
