"""Fine-tuning a detector: from a recipe to model, data, objective, evaluation and pictures."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from itpn.data.coco import Coco
from itpn.data.detection import find_splits, train_loader
from itpn.data.loader import Batch, Draw, steps_per_epoch
from itpn.engine.bad_files import BadFiles
from itpn.engine.distributed import World, join_world
from itpn.engine.loop import Interlude, train
from itpn.engine.run import Run
from itpn.errors import UserError
from itpn.evaluate.detect import Result, Scores
from itpn.heads.detect import DetectObjective
from itpn.nn.depth import lr_scales
from itpn.nn.pyramid import ModelConfig
from itpn.objectives.pixel import PixelConfig
from itpn.recipes.detect import Detect
from itpn.show.curves import loss_curves
from itpn.tasks.common import (
    BEST,
    LAST,
    Kept,
    config_of,
    fine_tuned,
    has_checkpoint,
    is_finished,
    leaving,
    left_out,
    open_run,
    replaced,
)
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
        run.say(f"to train on: {images.description}\nto validate on: {val.description}")
        run.pin("images", images.fingerprint)
        run.pin("validation images", val.fingerprint)
        bad = BadFiles(run, len(images), recipe.data.max_bad_share)
        objective = build(recipe)
        if weights and has_checkpoint(run):
            run.say(f"going on from a checkpoint; --init {recipe.init} was for the start")
        elif weights:
            run.say(loading.load_model(objective.model, weights, pyramid=recipe.init_pyramid))
        if world.size > 1 and world.device.type == "cpu" and recipe.detector.regions.head.norm == "batch":
            run.say(
                "each rank normalises its own boxes, since CPUs have no synchronised batch norm; "
                "--detector.regions.head.norm group does not depend on ranks"
            )
        steps = steps_per_epoch(len(images), recipe.loop.batch_size)
        num_steps = recipe.loop.num_steps(steps)
        evaluation = Evaluation(recipe, objective, val, run, bad, num_steps)
        finished = train(
            objective,
            partial(views, recipe, images, objective.draw, world, bad),
            steps_per_epoch=steps,
            loop=recipe.loop,
            optim=recipe.optim,
            schedule=recipe.schedule,
            run=run,
            bad=bad,
            interludes=[
                Interlude(recipe.eval_every or num_steps, evaluation),
                Interlude(recipe.loop.picture_every, evaluation.picture),
            ],
            lr_scales=lr_scales(
                (name for name, _ in objective.named_parameters()),
                recipe.model.backbone.shape.depths,
                recipe.layer_decay,
            ),
        )
        if finished:
            _finish(recipe, evaluation, num_steps)
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


def views(
    recipe: Detect,
    images: Coco,
    draw: Draw,
    world: World,
    bad: BadFiles | None,
    start_step: int,
    device_batch: int,
) -> Iterator[Batch]:
    """A rank's micro-batches from a step on, without end."""
    return train_loader(
        images,
        recipe.data,
        draw=draw,
        seed=recipe.loop.seed,
        batch_size=recipe.loop.batch_size,
        micro_batch=device_batch,
        rank=world.rank,
        world_size=world.size,
        start_step=start_step,
        device=world.device,
        on_bad=None if bad is None else partial(replaced, bad),
    )


class Evaluation:
    """Validates now and then, keeps the best and the last weights, and draws what the model finds."""

    def __init__(
        self, recipe: Detect, objective: DetectObjective, val: Coco, run: Run, bad: BadFiles, num_steps: int
    ) -> None:
        self.recipe, self.objective, self.val, self.run, self.bad = recipe, objective, val, run, bad
        self.kept = Kept(run.directory, "box_AP", num_steps)
        self.pictured = pictured(val)
        self.scores: list[Scores] = []

    def __call__(self, epoch: float, step: int) -> dict[str, float]:
        if step == 0:  # a head that has learned nothing says nothing
            return {}
        results = self._found_in(self.val, self.run.world)
        if not self.run.world.is_main:
            return {}
        self.scores = scores_of(self.val, results, self.recipe.detector.masks)
        numbers = numbers_of(self.scores)
        self.kept.offer(self.objective, portable_config(self.recipe, self.val), epoch, step, numbers)
        return numbers

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
    return config_of(recipe) | {"classes": names, "category_ids": ids, "input": images}


def _finish(recipe: Detect, evaluation: Evaluation, step: int) -> None:
    """What the run leaves behind: its best and last weights, a report of the last, and its curves."""
    run = evaluation.run
    if not run.world.is_main:
        return
    directory = run.directory
    with leaving(directory):
        write_report(evaluation.val, evaluation.scores, directory)
        measured = [f"{part.kind}_AP" for part in evaluation.scores]
        keys = ("loss", "class", "box", *["mask"] * recipe.detector.masks, *measured)
        loss_curves({recipe.name: [directory / "metrics.jsonl"]}, run.pictures / "curves.png", keys)
    run.finish(step)
    best = evaluation.kept.best
    told = ", ".join(f"{best[name]:.1%} {name.replace('_', ' ')}" for name in measured if name in best)
    run.say(f"finished: {directory / BEST} is of epoch {best['epoch']:g}, {told}; {LAST} beside it")
    run.say(f"look first at {run.pictures}: the newest detections, and curves.png")
