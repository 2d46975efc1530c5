"""What the wiring of every task has in common: its run, its batches, its config, the weights it keeps."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from itpn.data.loader import Batch, Draw, train_loader
from itpn.data.picture import BadImageError
from itpn.data.source import Images
from itpn.engine import checkpoint
from itpn.engine.bad_files import BadFiles
from itpn.engine.distributed import World
from itpn.engine.numerics import Precision, choose_precision
from itpn.engine.run import Run
from itpn.errors import UserError
from itpn.nn.hivit import HiViTConfig
from itpn.recipes.classify import Classify
from itpn.recipes.lookup import Recipe
from itpn.recipes.pretrain import Pretrain
from itpn.weights import files

BEST, LAST = "best.safetensors", "last.safetensors"

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
    )


def is_finished(run: Run) -> bool:
    """Whether nothing is left to do, which it then says."""
    if run.finished_step is None:
        return False
    run.say(f"{run.directory} is finished ({run.finished_step} steps); --run-dir names another run")
    return True


def has_checkpoint(run: Run) -> bool:
    """As rank 0 sees it, whose view the others may not share yet."""
    found = run.world.is_main and bool(checkpoint.steps(run.checkpoints))
    return bool(run.world.largest(found)[0])


def fine_tuned(ours: HiViTConfig, there: HiViTConfig | None) -> HiViTConfig:
    """The backbone to fine-tune: that of the weights to start from, but for what a recipe decides; without
    weights, the recipe's.

    Raises:
        UserError: it does not take pictures.
    """
    backbone = ours
    if there is not None:
        backbone = replace(
            there,
            drop_path=ours.drop_path,
            checkpointing=ours.checkpointing,
            relative_resampling=ours.relative_resampling,
            relative_position_bias=there.relative_position_bias or ours.relative_position_bias,
        )
    if backbone.in_channels != 3:
        raise UserError("model.backbone.in_channels: images are read as 3 channels; leave it at 3 to train")
    return backbone


def batches(
    recipe: Pretrain | Classify,
    images: Images,
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
        image_size=recipe.image_size,
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


@contextmanager
def evaluating(precision: Precision, device: torch.device) -> Iterator[None]:
    """Without gradient, in the precision of training."""
    dtype = choose_precision(precision, device)
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        yield


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


class Kept:
    """The best and the last weights of a run, as files of their own that say what was measured.

    Args:
        key: the number that is best where it is highest.
        last_step: of the whole run.
    """

    def __init__(self, directory: Path, key: str, last_step: int) -> None:
        self.directory, self.key, self.last_step = directory, key, last_step

    def offer(
        self,
        model: nn.Module,
        config: Mapping[str, Any],
        epoch: float,
        step: int,
        numbers: Mapping[str, float],
    ) -> None:
        """Keeps the model where it is better than those before, and at the last step."""
        measured = {"epoch": epoch, **numbers}
        before = self.best
        better = self.key not in before or measured[self.key] > before[self.key]
        if better or before["epoch"] >= epoch:  # a later one is of a future that was gone back from
            self._save(BEST, model, {**config, "measured": measured})
        if step == self.last_step:
            self._save(LAST, model, {**config, "measured": measured})

    @property
    def best(self) -> dict[str, Any]:
        """What was measured of the best; nothing where its file is damaged."""
        weights = files.read_if_ours(self.directory / BEST)
        measured: dict[str, Any] = weights.config.get("measured", {}) if weights else {}
        return measured

    def _save(self, name: str, model: nn.Module, config: Mapping[str, Any]) -> None:
        tensors = {key: tensor.cpu() for key, tensor in files.portable(model).items()}
        with leaving(self.directory / name):
            files.save(self.directory / name, tensors, config)


def config_of(recipe: Any) -> dict[str, Any]:
    """A recipe as JSON-able values."""
    return {name: _plain(value) for name, value in asdict(recipe).items()}


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


def _plain(value: Any) -> Any:
    match value:
        case dict():
            return {key: _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case Path():
            return str(value)
        case _:
            return value
