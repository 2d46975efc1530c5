"""`itpn replay`: a run's step that went wrong, taken again."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from itpn.data import detection
from itpn.data.images import find_images
from itpn.data.loader import train_loader
from itpn.data.segmentation import find_splits, train_crops
from itpn.data.source import Images
from itpn.engine import replay
from itpn.engine.device_batch import Batch
from itpn.engine.distributed import DeviceName, World, choose_device
from itpn.engine.numerics import set_numerics
from itpn.engine.replay import BadStep
from itpn.heads.detect import DetectObjective
from itpn.heads.finetune import ClassifyObjective
from itpn.heads.segment import SegmentObjective
from itpn.recipes.classify import Classify
from itpn.recipes.detect import Detect
from itpn.recipes.lookup import Recipe
from itpn.recipes.pretrain import Pretrain
from itpn.recipes.segment import Segment
from itpn.tasks import classify, common, detect, pretrain, segment
from itpn.weights import files


def replay_step(
    directory: Path, device_name: DeviceName, root: Path | None
) -> tuple[BadStep, BadStep, Images]:
    """Takes the step again that a run left in its `replay/`: what came out then and now, and the images.

    Args:
        directory: the run's, or its `replay/`.
        root: where the images are, if they have moved.

    Raises:
        UserError: there is no such step, or its images are not there.
    """
    kept = directory if (directory / replay.STEP).is_file() else directory / "replay"
    before = replay.read(kept)
    weights = files.read(kept / replay.MODEL)
    recipe: Recipe
    if "classifier" in weights.config:
        recipe = weights.recipe(Classify)
    elif "detector" in weights.config:
        recipe = weights.recipe(Detect)
    elif "segmenter" in weights.config:
        recipe = weights.recipe(Segment)
    else:
        recipe = weights.recipe(Pretrain)
    objective: ClassifyObjective | DetectObjective | SegmentObjective | pretrain.Objective
    images: Images
    loader: common.Loader
    match recipe:
        case Pretrain():
            recipe = replace(recipe, data=replace(recipe.data, root=root or recipe.data.root))
            images = find_images(recipe.data.root, "train", recipe.data.list)
            objective = pretrain.build(recipe)
            pretrain.teach(objective)
            loader = partial(train_loader, images, recipe.data, image_size=recipe.image_size)
        case Classify():
            recipe = replace(recipe, data=replace(recipe.data, root=root or recipe.data.root))
            images, _ = classify.splits(recipe.data, recipe.val_share)
            objective = classify.build(recipe)
            loader = partial(train_loader, images, recipe.data, image_size=recipe.image_size)
        case Detect():
            recipe = replace(recipe, data=replace(recipe.data, root=root or recipe.data.root))
            images, _ = detection.find_splits(recipe.data, recipe.val_share)
            objective = detect.build(recipe)
            loader = partial(detection.train_loader, images, recipe.data)
        case Segment():
            recipe = replace(recipe, data=replace(recipe.data, root=root or recipe.data.root))
            images, _ = find_splits(recipe.data, recipe.val_share)
            objective = segment.build(recipe)
            loader = partial(train_crops, images, recipe.data)
    for block in objective.compile_blocks() if recipe.loop.compile else ():
        block.compile()
    device = choose_device(device_name)
    set_numerics(device, getattr(torch, before.precision), deterministic=recipe.loop.deterministic)

    def batches(rank: int) -> Iterator[Batch]:
        world = World(rank, len(before.losses), device)
        return common.batches(loader, recipe, objective.draw, world, None, before.step, before.micro_batch)

    return before, replay.again(objective, kept, batches, device), images
