"""Pre-training: from a recipe to model, data, objective and evaluation."""

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor

from itpn.data.classes import check_same_classes
from itpn.data.images import find_images
from itpn.data.loader import steps_per_epoch, train_loader
from itpn.data.picture import BadImageError
from itpn.data.source import Images
from itpn.data.transforms import center_crop
from itpn.engine.bad_files import BadFiles
from itpn.engine.distributed import World, join_world
from itpn.engine.loop import Interlude, train
from itpn.engine.run import Run
from itpn.errors import UserError
from itpn.evaluate.knn import knn
from itpn.nn.pyramid import Levels, ModelConfig
from itpn.objectives.distill import DistillObjective
from itpn.objectives.features import FeaturesConfig
from itpn.objectives.pixel import PixelConfig, PixelObjective
from itpn.objectives.stages import FrozenConfig
from itpn.objectives.teacher import build_teacher
from itpn.recipes.pretrain import Pretrain
from itpn.show.curves import loss_curves
from itpn.show.reconstruction import distillation_picture, reconstruction_picture
from itpn.tasks.common import (
    batches,
    begins_with,
    config_of,
    going_through,
    is_finished,
    leaving,
    left_out,
    open_run,
    warn,
)
from itpn.weights import files, loading
from itpn.weights.convert import read_foreign

NUM_PICTURED = 6


def pretrain(recipe: Pretrain) -> Path:
    """Pre-train as the recipe says, or go on where its run stopped; returns the run directory.

    Raises:
        UserError: settings, data or weights that do not go together.
    """
    with join_world(recipe.loop.device) as world:
        run = open_run(recipe, world)
        if is_finished(run):
            return run.directory
        if recipe.model.backbone.in_channels != 3:
            raise UserError(
                "model.backbone.in_channels: images are read as 3 channels; leave it at 3 to train"
            )
        images = find_images(recipe.data.root, "train", recipe.data.list)
        run.say(images.description)
        run.pin("images", images.fingerprint)
        warn(run, {"train": images})
        bad = BadFiles(run, len(images), recipe.data.max_bad_share)
        steps = steps_per_epoch(len(images), recipe.loop.batch_size)
        objective = build(recipe)
        if taught := teach(objective):
            run.say(taught)
        if recipe.init and begins_with(run, recipe.init):
            run.say(loading.load_into(objective, files.read(recipe.init)))
        loader = partial(train_loader, images, recipe.data, image_size=recipe.image_size)
        finished = train(
            objective,
            partial(batches, loader, recipe, objective.draw, world, bad),
            steps_per_epoch=steps,
            loop=recipe.loop,
            optim=recipe.optim,
            schedule=recipe.schedule,
            run=run,
            bad=bad,
            interludes=[
                _pictures(recipe, images, objective, world),
                _knn(recipe, images, objective, world, bad),
            ],
        )
        if finished:
            _finish(recipe, objective, run, recipe.loop.num_steps(steps))
        return run.directory


Objective = PixelObjective | DistillObjective


def build(recipe: Pretrain) -> Objective:
    """The recipe's objective with its starting weights, the same on every rank; without its teacher."""
    torch.manual_seed(recipe.loop.seed)
    return files.build_objective(recipe.model, recipe.objective)


def teach(objective: Objective) -> str | None:
    """Give an objective its frozen teacher, if it has one, and say in one line who that is.

    Raises:
        UserError: there is no such teacher, no weights of it, or its tokens do not match the student's units.
    """
    config, grid = objective.teacher_config, objective.model.backbone.config.grid
    if config is None:
        return None
    path = config.teacher_weights
    teacher = build_teacher(config, grid, None if path is None else read_foreign(path).tensors)
    objective.attach(teacher)
    size = teacher.image_size
    return (
        f"teacher {config.teacher or path}: {grid[0]} x {grid[1]} tokens of {size} x {size} pixels, "
        f"targets {teacher.width} wide"
    )


def load_objective(path: Path, *, mask_ratio: float | None = None) -> PixelObjective:
    """The objective of a run directory or a file with decoder, to look at what it does.

    Raises:
        UserError: there is no such file, it is none of ours, or it holds no decoder.
    """
    weights = files.read(path)
    if "decoder" not in weights.parts:
        raise UserError(
            f"{weights.path} holds {', '.join(sorted(weights.parts))} but no decoder; "
            "name a run that pre-trained on pixels, or a model.safetensors of its checkpoints"
        )
    trained = weights.part("objective", PixelConfig)
    config = replace(
        trained,
        features=FeaturesConfig(),
        frozen=FrozenConfig(),
        teacher="",
        teacher_weights=None,
        mask_ratio=trained.mask_ratio if mask_ratio is None else mask_ratio,
    )
    objective = PixelObjective(weights.part("model", ModelConfig), config)
    loading.load_into(objective, weights.without("features").without("frozen"))
    return objective


def _pictured(recipe: Pretrain, images: Images) -> Tensor:
    """A few images to look at, of the validation split where there is one: ``uint8 [n, 3, S, S]``."""
    with contextlib.suppress(UserError):
        images = find_images(recipe.data.root, "val")
    pixels: list[Tensor] = []
    for i in torch.linspace(0, len(images) - 1, min(NUM_PICTURED, len(images))).long().tolist():
        with contextlib.suppress(BadImageError), images.open(i) as picture:
            pixels.append(center_crop(picture.decode(), recipe.image_size))
    return torch.stack(pixels) if pixels else torch.empty(0)


def _pictures(recipe: Pretrain, images: Images, objective: Objective, world: World) -> Interlude:
    """What becomes of the same images under the same masks every time."""
    pixels = _pictured(recipe, images) if recipe.loop.picture_every else torch.empty(0)

    def draw(epoch: float, step: int) -> dict[str, Image]:
        generator = torch.Generator().manual_seed(recipe.loop.seed)
        shown = pixels.to(world.device)
        match objective:
            case PixelObjective():
                return {"reconstruction": picture_of(objective, shown, generator)}
            case DistillObjective():
                return {"distillation": comparison_of(objective, shown, generator)}

    return Interlude(recipe.loop.picture_every if len(pixels) else 0, draw)


def picture_of(
    objective: PixelObjective, images: Tensor, generator: torch.Generator, captions: Sequence[str] = ()
) -> Image:
    """The reconstruction picture of uint8 ``images [B, 3, H, W]``, under masks drawn from ``generator``."""
    training = objective.training
    objective.eval()
    keep = torch.stack([objective.draw(generator)["keep"][0] for _ in images]).to(images.device)
    shown = objective.reconstruct(images, keep)
    objective.train(training)
    named = zip(Levels._fields, shown.levels, strict=True) if shown.levels else ()  # MAE has no pyramid
    return reconstruction_picture(
        shown.original.cpu(),
        shown.masked.cpu(),
        shown.reconstruction.cpu(),
        [(name, level.cpu()) for name, level in named],
        captions,
    )


def comparison_of(objective: DistillObjective, images: Tensor, generator: torch.Generator) -> Image:
    """The picture of student and teacher on uint8 ``images [B, 3, H, W]``, under masks from ``generator``."""
    training = objective.training
    objective.eval()
    hidden = torch.stack([objective.draw(generator)["hidden"] for _ in images]).to(images.device)
    shown = objective.compare(images, hidden)
    objective.train(training)
    similarity = shown.similarity.flatten(1)
    captions = [
        f"cosine similarity {values[mask].mean().item():z.2f} on the {mask.sum()} hidden units, "
        f"{values[~mask].mean().item():z.2f} on the others"
        for values, mask in zip(similarity, hidden, strict=True)
    ]
    return distillation_picture(
        shown.original.cpu(),
        shown.masked.cpu(),
        [(name, level.cpu()) for name, level in zip(Levels._fields, shown.levels, strict=True)],
        shown.target.cpu(),
        shown.prediction.cpu(),
        shown.similarity.cpu(),
        captions,
    )


def _knn(recipe: Pretrain, images: Images, objective: Objective, world: World, bad: BadFiles) -> Interlude:
    """k-NN on the mean of stage 3's tokens; the folders are checked now, before hours of training."""
    if not recipe.knn.every:
        return Interlude(0, lambda epoch, step: {})
    root = recipe.knn.root or recipe.data.root
    train_images = find_images(root, "train") if recipe.knn.root or recipe.data.list else images
    val_images = find_images(root, "val")
    check_same_classes(train_images, val_images)

    through = going_through(recipe, world, partial(left_out, bad))

    def pooled(pixels: Tensor) -> Tensor:
        tokens: Tensor = objective.model.backbone(objective.normalise(pixels)).c16
        return tokens.mean(1)

    def evaluate(epoch: float, step: int) -> dict[str, float]:
        objective.eval()
        return knn(pooled, train_images, val_images, recipe.knn, through)

    return Interlude(recipe.knn.every, evaluate)


def _finish(recipe: Pretrain, objective: Objective, run: Run, step: int) -> None:
    """What the run leaves behind: weights to fine-tune from, and its curves."""
    path, metrics = run.directory / "pretrained.safetensors", run.directory / "metrics.jsonl"
    portable = files.portable(objective, keep=run.world.is_main)
    tensors = {name: tensor for name, tensor in portable.items() if name.startswith(files.MODEL_PARTS)}
    if not run.world.is_main:
        return
    with leaving(run.directory):
        files.save(path, tensors, config_of(recipe, paths=False))
        loss_curves({recipe.name: [metrics]}, run.pictures / "curves.png")
    run.finish(step)
    run.say(f"finished: {path} holds backbone and pyramid")
    seen = "reconstruction" if isinstance(objective, PixelObjective) else "distillation"
    run.say(f"look first at {run.pictures}: the newest {seen}, and curves.png")
