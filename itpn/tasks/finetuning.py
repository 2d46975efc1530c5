"""What fine-tuning a classifier, a detector and a segmenter have in common: the model to start from, the run,
and its evaluations, which keep the best weights and leave a report."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from PIL.Image import Image
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from itpn.data.loader import steps_per_epoch
from itpn.data.source import Images
from itpn.engine.bad_files import BadFiles
from itpn.engine.distributed import World
from itpn.engine.loop import Interlude, train
from itpn.engine.run import Run
from itpn.errors import UserError
from itpn.heads.detect import DetectObjective
from itpn.heads.finetune import ClassifyObjective
from itpn.heads.segment import SegmentObjective
from itpn.nn.depth import lr_scales
from itpn.nn.hivit import HiViTConfig
from itpn.recipes.classify import Classify
from itpn.recipes.detect import Detect
from itpn.recipes.segment import Segment
from itpn.show.curves import loss_curves, read_metrics
from itpn.tasks.common import Loader, batches, leaving, warn
from itpn.weights import files

BEST, LAST = "best.safetensors", "last.safetensors"
FineTuning = Classify | Detect | Segment
Objective = ClassifyObjective | DetectObjective | SegmentObjective


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


def introduce(run: Run, images: Images, val: Images) -> None:
    """Say what the run learns from and is measured on, which stays the same while it lasts."""
    run.say(f"training images: {images.description}\nvalidation images: {val.description}")
    run.pin("images", images.fingerprint)
    run.pin("validation images", val.fingerprint)
    warn(run, {"train": images, "val": val})


class Evaluation(ABC):
    """Validates now and then, keeps the best and the last weights, and writes what the run leaves behind."""

    NAMES: ClassVar[Mapping[str, str]]
    """Measured numbers that are told in the end, and what they are called; the first one is best where it is
    highest."""
    CURVES: ClassVar[tuple[str, ...]]
    """Numbers to draw, of which a run without masks has not all."""
    PICTURE: ClassVar[str]
    """What to look at first."""

    def __init__(self, recipe: FineTuning, images: Images, run: Run) -> None:
        self.name, self.run = recipe.name, run
        self.bad = BadFiles(run, len(images), recipe.data.max_bad_share)
        self.num_steps = recipe.loop.num_steps(steps_per_epoch(len(images), recipe.loop.batch_size))
        self.kept = Kept(run.directory, next(iter(self.NAMES)), self.num_steps, run.world)
        self.numbers: dict[str, float] = {}

    def __call__(self, epoch: float, step: int) -> dict[str, float]:
        self.numbers = self.measure() if step else {}  # a head that has learned nothing says nothing
        return self.numbers

    def keep(self, epoch: float, step: int) -> None:
        """Keep what was measured last if it is the best or the last; all ranks take part."""
        if step:
            self.kept.offer(self.model, self.portable_config, epoch, step, self.numbers)

    def picture(self, epoch: float, step: int) -> dict[str, Image]:
        """What the model says of a few images, where there is something to look at while it learns."""
        return {}

    @property
    @abstractmethod
    def model(self) -> nn.Module:
        """Whose weights are kept."""

    @property
    @abstractmethod
    def portable_config(self) -> dict[str, Any]:
        """What a file of them says of itself: the recipe, its classes, and the images it wants."""

    @abstractmethod
    def measure(self) -> dict[str, float]:
        """How good the model is on the validation images; the numbers are needed on rank 0."""

    @abstractmethod
    def report(self, directory: Path) -> None:
        """What was measured last, as files."""

    def finish(self) -> None:
        """Beside the best and last weights, a run leaves a report of the last and its curves."""
        run, directory = self.run, self.run.directory
        if not run.world.is_main:
            return
        with leaving(directory):
            self.report(directory)
            metrics = directory / "metrics.jsonl"
            logged = {key for numbers in read_metrics(metrics).values() for key in numbers}
            keys = [key for key in self.CURVES if key in logged]
            loss_curves({self.name: [metrics]}, run.pictures / "curves.png", keys)
        run.finish(self.num_steps)
        best = self.kept.best
        told = ", ".join(f"{best[key]:.1%} {called}" for key, called in self.NAMES.items() if key in best)
        told = told or "which is not known to be best: the validation images do not tell"
        run.say(f"finished: {directory / BEST} is of epoch {best['epoch']:g}, {told}; {LAST} beside it")
        run.say(f"look first at {run.pictures}: {self.PICTURE}, and curves.png")


def fine_tune(
    recipe: FineTuning,
    objective: Objective,
    images: Images,
    loader: Loader,
    evaluation: Evaluation,
    group_norm: str = "",
) -> None:
    """Train to the end, or go on where the run stopped, validating on the way.

    Args:
        group_norm: options that make batch norms group norms.
    """
    run = evaluation.run
    if run.world.size > 1 and run.world.device.type == "cpu" and _has_batch_norm(objective):
        run.say(
            "each rank normalises its own samples, since CPUs have no synchronised batch norm; "
            f"{group_norm} does not depend on ranks"
        )
    run.describe(evaluation.portable_config)
    trained = [name for name, parameter in objective.named_parameters() if parameter.requires_grad]
    finished = train(
        objective,
        partial(batches, loader, recipe, objective.draw, run.world, evaluation.bad),
        steps_per_epoch=steps_per_epoch(len(images), recipe.loop.batch_size),
        loop=recipe.loop,
        optim=recipe.optim,
        schedule=recipe.schedule,
        run=run,
        bad=evaluation.bad,
        interludes=[
            Interlude(recipe.eval_every or evaluation.num_steps, evaluation, evaluation.keep),
            Interlude(recipe.loop.picture_every, evaluation.picture),
        ],
        lr_scales=lr_scales(trained, recipe.model.backbone.shape.depths, recipe.layer_decay),
    )
    if finished:
        evaluation.finish()


def _has_batch_norm(module: nn.Module) -> bool:
    return any(isinstance(layer, _BatchNorm) for layer in module.modules())


class Kept:
    """The best and the last weights of a run, as files of their own that say what was measured.

    Args:
        key: the number that is best where it is highest.
        last_step: of the whole run.
    """

    def __init__(self, directory: Path, key: str, last_step: int, world: World) -> None:
        self.directory, self.key, self.last_step, self.world = directory, key, last_step, world

    def offer(
        self,
        model: nn.Module,
        config: Mapping[str, Any],
        epoch: float,
        step: int,
        numbers: Mapping[str, float],
    ) -> None:
        """Keeps the model where it is better than those before, and at the last step.

        Rank 0, which has the numbers, decides; all ranks gather the weights. Without the number that decides,
        any model is better than none, and a later one than an earlier one.
        """
        measured = {"epoch": epoch, **numbers}
        is_best, is_last = self.world.largest(
            self.world.is_main and self._is_best(measured), step == self.last_step
        )
        if not (is_best or is_last):
            return
        tensors = files.portable(model, keep=self.world.is_main)
        if self.world.is_main:
            for name in [BEST] * bool(is_best) + [LAST] * bool(is_last):
                with leaving(self.directory / name):
                    files.save(self.directory / name, tensors, {**config, "measured": measured})

    def _is_best(self, measured: Mapping[str, Any]) -> bool:
        before = self.best
        better = self.key not in before or measured.get(self.key, -math.inf) > before[self.key]
        return better or before["epoch"] >= measured["epoch"]  # a later one is of a future gone back from

    @property
    def best(self) -> dict[str, Any]:
        """What was measured of the best; nothing where its file is damaged."""
        weights = files.read_if_ours(self.directory / BEST)
        measured: dict[str, Any] = weights.config.get("measured", {}) if weights else {}
        return measured
