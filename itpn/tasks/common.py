"""What the wiring of every task has in common: its run, its batches, its config."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

from safetensors import SafetensorError

from itpn.data.check_labels import warnings_of
from itpn.data.loader import Batch, Draw
from itpn.data.picture import BadImageError
from itpn.data.source import Images
from itpn.data.transforms import crop_ratio_of
from itpn.engine import checkpoint
from itpn.engine.bad_files import BadFiles
from itpn.engine.distributed import World
from itpn.engine.run import Run
from itpn.errors import UserError
from itpn.evaluate.gather import Pass
from itpn.recipes.classify import Classify
from itpn.recipes.lookup import Recipe
from itpn.recipes.pretrain import Pretrain
from itpn.weights import files

Loader = Callable[..., Iterator[Batch]]
"""A room's training loader of a data set, waiting for the arguments that all such loaders share."""

FREE = (
    "data.root",  # the images themselves are pinned
    "data.list",
    *(f"data.{split}_{what}" for split in ("train", "val") for what in ("images", "annotations")),
    "data.workers",
    "data.max_bad_share",
    "objective.teacher_weights",
    "knn",
    "eval_every",
    "eval_batch",
    "init",
    "inference.windows_at_once",
    *(
        f"loop.{name}"
        for name in (
            "device",
            "device_batch",
            "strategy",
            "log_every",
            "checkpoint_every",
            "checkpoint_minutes",
            "keep_last",
            "keep_every",
            "picture_every",
            "run_dir",
            "max_steps",
            "skip_bad_steps",
            "force",
        )
    ),
)
"""Fields that may change while a run lasts: they decide where and how it runs, not what it learns."""


def open_run(recipe: Recipe, world: World) -> Run:
    """The recipe's run directory, new or as it was left.

    Raises:
        UserError: it is in use, cannot be written, or began with another config.
    """
    return Run(
        recipe.loop.run_dir or Path("runs") / recipe.name,
        config_of(recipe),
        world,
        free=FREE,
        force=recipe.loop.force,
        completed=partial(_completed, type(recipe)),
        portable=config_of(recipe, paths=False),
    )


def warn(run: Run, splits: Mapping[str, Images]) -> None:
    """Warn of what is odd about the data, as far as rank 0 sees it in a few images of each split."""
    if run.world.is_main:
        run.warn([f"{split}: {line}" for split, images in splits.items() for line in warnings_of(images)])


def is_finished(run: Run) -> bool:
    """Whether nothing is left to do, which it then says."""
    step = 0 if run.is_extended or not run.world.is_main else run.finished_step or 0
    (step,) = map(int, run.world.largest(step))  # as rank 0 sees it
    if step:
        run.say(f"{run.directory} is finished ({step} steps); --run-dir names another run")
    return bool(step)


def has_checkpoint(run: Run) -> bool:
    """As rank 0 sees it, whose view the others may not share yet."""
    found = run.world.is_main and bool(checkpoint.steps(run.checkpoints))
    return bool(run.world.largest(found)[0])


def begins_with(run: Run, init: Path) -> bool:
    """Whether the run starts from these weights; one that has begun goes on from its own, which it says."""
    if not has_checkpoint(run):
        return True
    run.say(f"resuming from a checkpoint; --init {init} is not loaded again")
    return False


def batches(
    loader: Loader,
    recipe: Recipe,
    draw: Draw,
    world: World,
    bad: BadFiles | None,
    start_step: int,
    device_batch: int,
) -> Iterator[Batch]:
    """A rank's micro-batches from a step on, without end."""
    return loader(
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


def replaced(bad: BadFiles, error: BadImageError) -> None:
    """A training sample could not be read."""
    bad.met(error.path, error.reason, replaced=True)


def left_out(bad: BadFiles, error: BadImageError) -> None:
    """An image of an evaluation could not be read."""
    bad.met(error.path, error.reason, replaced=False)


def going_through(recipe: Pretrain | Classify, world: World, on_bad: Callable[[BadImageError], None]) -> Pass:
    """How an evaluation goes through images for a recipe: its size, the whole world, its workers."""
    return Pass(
        image_size=recipe.image_size,
        crop_ratio=crop_ratio_of(recipe.image_size),
        device=world.device,
        rank=world.rank,
        world_size=world.size,
        workers=recipe.data.workers,
        on_bad=on_bad,
    )


@contextmanager
def leaving(path: Path) -> Iterator[None]:
    """What a run leaves in a file or folder is written.

    Raises:
        UserError: it cannot be.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write {path} ({error}); make room and give the same command again"
        ) from error


def config_of(recipe: Any, *, paths: bool = True) -> dict[str, Any]:
    """A recipe as JSON-able values.

    Args:
        paths: with its paths, which only this machine has a use for; files of weights go without.
    """
    kinds = get_type_hints(type(recipe))
    return {
        field.name: _plain(getattr(recipe, field.name), paths)
        for field in fields(recipe)
        if paths or not _is_path(kinds[field.name])
    }


def _is_path(kind: Any) -> bool:
    """Whether a type is that of paths, alone, among others or in a collection."""
    return kind is Path or any(map(_is_path, get_args(kind)))


def _completed(kind: type[Recipe], config: dict[str, Any]) -> dict[str, Any]:
    """A config in this version's form, with the defaults of fields that came after it; as it is if it does
    not fit any more."""
    try:
        recipe = files.structured(config, kind)
    except UserError:
        return config
    backbone = recipe.model.backbone
    usual = replace(backbone, mlp_ratio=None)
    if usual.stage3_mlp_ratio == backbone.mlp_ratio:  # which used to be written out
        recipe = replace(recipe, model=replace(recipe.model, backbone=usual))
    return config_of(recipe)


def _plain(value: Any, paths: bool) -> Any:
    match value:
        case dict():
            return {key: _plain(item, paths) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item, paths) for item in value]
        case Path():
            return str(value)
        case _ if is_dataclass(value):
            return config_of(value, paths=paths)
        case _:
            return value
