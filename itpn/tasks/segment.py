"""Fine-tuning a segmenter: from a recipe to model, data, objective, evaluation and pictures."""

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from itpn.data.aligned import fitted
from itpn.data.labelled import LabelledImages
from itpn.data.loader import Batch, Draw, steps_per_epoch
from itpn.data.picture import BadImageError
from itpn.data.segmentation import SegmentationDataConfig, find_splits, train_crops
from itpn.engine.bad_files import BadFiles
from itpn.engine.distributed import World, join_world
from itpn.engine.loop import Interlude, train
from itpn.engine.numerics import Precision
from itpn.engine.run import Run
from itpn.evaluate.segment import SegmentationScores, SegmentFn, evaluate_segmentation
from itpn.heads.segment import Segmenter, SegmentObjective, synchronise_norms
from itpn.heads.windows import InferenceConfig
from itpn.nn.depth import lr_scales
from itpn.nn.pyramid import ModelConfig
from itpn.objectives.pixel import PixelConfig
from itpn.recipes.segment import Segment
from itpn.show.curves import loss_curves
from itpn.show.segment import comparison_picture
from itpn.tasks.common import (
    BEST,
    LAST,
    Kept,
    config_of,
    evaluating,
    fine_tuned,
    has_checkpoint,
    is_finished,
    leaving,
    left_out,
    open_run,
    replaced,
)
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
        weights = files.read(recipe.init) if recipe.init else None
        recipe = settled(recipe, images.labelling.num_classes, weights)
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
        synchronise_norms(objective, world.size, world.device)
        steps = steps_per_epoch(len(images), recipe.loop.batch_size)
        num_steps = recipe.loop.num_steps(steps)
        evaluation = Evaluation(recipe, objective, val, run, bad, num_steps)
        finished = train(
            objective,
            partial(crops, recipe, images, objective.draw, world, bad),
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


def crops(
    recipe: Segment,
    images: LabelledImages,
    draw: Draw,
    world: World,
    bad: BadFiles | None,
    start_step: int,
    device_batch: int,
) -> Iterator[Batch]:
    """A rank's micro-batches from a step on, without end."""
    return train_crops(
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
    """Validates now and then, keeps the best and the last weights, and draws what the model says."""

    def __init__(
        self,
        recipe: Segment,
        objective: SegmentObjective,
        val: LabelledImages,
        run: Run,
        bad: BadFiles,
        num_steps: int,
    ) -> None:
        self.recipe, self.objective, self.val, self.run, self.bad = recipe, objective, val, run, bad
        self.kept = Kept(run.directory, "miou", num_steps)
        self.labels = labeller(objective, recipe.inference, recipe.loop.precision, run.world.device)
        self.scores: SegmentationScores | None = None

    def __call__(self, epoch: float, step: int) -> dict[str, float]:
        if step == 0:  # a head that has learned nothing says nothing
            return {}
        self.objective.eval()
        world = self.run.world
        self.scores = evaluate_segmentation(
            self.labels,
            self.val,
            self.recipe.data,
            device=world.device,
            rank=world.rank,
            world_size=world.size,
            on_bad=partial(left_out, self.bad),
        )
        numbers = self.scores.numbers()
        if world.is_main:
            config = portable_config(self.recipe, self.val.labelling.class_names)
            self.kept.offer(self.objective, config, epoch, step, numbers)
        return numbers

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
    return config_of(recipe) | {"classes": list(class_names), "input": images}


def write_report(found: SegmentationScores, directory: Path) -> Path:
    """A report as JSON; what could not be counted is null."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "report.json"
    rows = [_without_nan(row._asdict()) for row in found.classes]
    counts = {"images": found.num_images, "left_out": found.num_left_out}
    path.write_text(json.dumps(_without_nan(found.numbers()) | counts | {"classes": rows}, indent=1) + "\n")
    return path


def _without_nan(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in values.items()
    }


def _finish(recipe: Segment, evaluation: Evaluation, step: int) -> None:
    """What the run leaves behind: its best and last weights, a report of the last, and its curves."""
    run, found = evaluation.run, evaluation.scores
    if not run.world.is_main:
        return
    directory = run.directory
    with leaving(directory):
        if found is not None:
            write_report(found, directory)
        keys = ("loss", "accuracy", "miou", "pixel_accuracy")
        loss_curves({recipe.name: [directory / "metrics.jsonl"]}, run.pictures / "curves.png", keys)
    run.finish(step)
    best = evaluation.kept.best
    run.say(
        f"finished: {directory / BEST} is of epoch {best['epoch']:g}, {best['miou']:.1%} mIoU; "
        f"{LAST} beside it"
    )
    run.say(f"look first at {run.pictures}: the newest segmentation, and curves.png")
