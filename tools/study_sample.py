"""What pre-training is worth on the bundled sample: `python tools/study_sample.py [STAGE …]`.

Stages, each of which goes on where it stopped: `data`, `teacher`, `pretrain`, `finetune`, `speed`, `report`;
all of them without a name. Every arm pre-trains a nano iTPN for about the same time, with five seeds, and is
then fine-tuned; its learning rate is chosen for each arm, with seed 0, on a fifth of the training
images, and everything that is reported is measured on the validation images. Runs take one core each.
"""

import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import tyro
from matplotlib.figure import Figure
from PIL import Image

from itpn.data.images import find_images
from itpn.data.sample_data import write_imagefolder
from itpn.data.source import hold_out
from itpn.engine.optim import AdamWConfig
from itpn.evaluate.knn import KnnConfig
from itpn.nn.depth import LayerDecayConfig
from itpn.objectives.distill import DistillConfig
from itpn.outputs import writing
from itpn.recipes import classify, pretrain
from itpn.recipes.lookup import Recipe
from itpn.show.curves import COLOURS, read_metrics
from itpn.show.sheet import FAINT

EPOCHS = {"pixel": 80, "mae": 80, "mfm": 48, "noise": 80, "distilled": 16, "brief": 16}
"""Of pre-training: about as long for each, as stage `speed` measures."""
ARMS = ("scratch", *EPOCHS)
FOLLOWED = ("pixel", "distilled", "brief")
"""Arms that are also fine-tuned from the weights after half of their epochs."""
TEACHERS = {"distilled": 60, "brief": 8}
"""Epochs of an arm's teacher: as good as it becomes, or so short that teacher and student together take no
longer than an arm without."""
SEEDS = range(5)
RATES = (3e-4, 1e-3, 3e-3)
FINE_EPOCHS = 8
T_95 = 2.776
"""Half the width of a 95 % interval over standard errors, of five differences (Student's t, 4 degrees)."""


A = TypeVar("A", bound=Any)
"""Arguments with `stages`."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    stages: Annotated[tuple[str, ...], tyro.conf.Positional] = (
        "data", "teacher", "pretrain", "finetune", "speed", "report",
    )  # fmt: skip
    out: Path = Path("runs/study")
    """Where everything goes, a few GB."""
    arms: tuple[str, ...] = ARMS
    processes: int = 2
    """Runs at a time."""
    picture: Path = Path("docs/pictures/study.png")

    @property
    def images(self) -> Path:
        return self.out / "images"


def write_data(given: Arguments) -> None:
    """The sample, its training images split again for the sweep, and as many images of noise."""
    if not given.images.is_dir():
        write_imagefolder(given.images)
    images = find_images(given.images, "train")
    for split, part in zip(("train", "val"), hold_out(images, 0.2, seed=0), strict=True):
        for i in range(len(part)):
            source = part.name(i)
            link = given.out / "sweep" / split / source.parent.name / source.name
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(source.resolve())
    write_noise(given.out / "noise-images" / "train", len(images))


def write_noise(folder: Path, count: int, side: int = 96) -> None:
    """Images whose spectrum falls as a photograph's, 1 / f, and which show nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = np.inf
    for i in range(count):
        spectrum = np.fft.rfft2(random.standard_normal((3, side, side))) / frequency
        pixels = np.fft.irfft2(spectrum, (side, side))
        pixels = (pixels / pixels.std() * 0.25 + 0.5).clip(0, 1) * 255
        Image.fromarray(pixels.astype(np.uint8).transpose(1, 2, 0)).save(folder / f"{i:05d}.png")


def teacher_of(arm: str, given: Arguments) -> Path:
    return given.out / f"teacher-{TEACHERS[arm]}.safetensors"


def train_teachers(given: Arguments) -> None:
    for arm in (arm for arm in given.arms if arm in TEACHERS):
        if not teacher_of(arm, given).is_file():
            print(teacher(teacher_of(arm, given), TEACHERS[arm], given))


def teacher(path: Path, epochs: int, given: Arguments) -> dict[str, float]:
    """Trains one; its top-1 on the validation images, and minutes."""
    tool = Path(__file__).with_name("train_teacher.py")
    options = {"--root": given.images, "--out": path, "--epochs": epochs}
    command = [sys.executable, str(tool), *(str(word) for pair in options.items() for word in pair)]
    done = subprocess.run(
        command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def pretraining(arm: str, seed: int, given: Arguments) -> pretrain.Pretrain:
    epochs = EPOCHS[arm]
    keep = epochs // 4 if arm in FOLLOWED else None
    base = pretrain.demo(epochs=epochs, feature_weight=0.3 if arm == "mfm" else 0)
    loop = replace(
        base.loop, seed=seed, run_dir=given.out / f"{arm}-s{seed}", device="cpu", device_batch=64,
        precision="bf16", picture_every=epochs, keep_last=1, keep_every=keep, checkpoint_every=keep,
        checkpoint_minutes=60,
    )  # fmt: skip
    root = given.out / "noise-images" if arm == "noise" else given.images
    recipe = replace(
        base,
        name=arm,
        data=replace(base.data, root=root, workers=0),
        loop=loop,
        knn=KnnConfig(every=epochs // 8, root=given.images),
    )
    if arm == "mae":
        return replace(recipe, model=replace(recipe.model, pyramid=None))
    if arm in TEACHERS:
        objective = DistillConfig(
            teacher="vit_tiny_patch16_224", teacher_weights=teacher_of(arm, given),
            target="tokens", target_width=192, num_hidden=14, min_block=4, positions="all",
        )  # fmt: skip
        return replace(recipe, objective=objective)
    return recipe


def fine_tuning(
    arm: str, seed: int, lr: float, given: Arguments, *, sweep: bool = False, epoch: int | None = None
) -> classify.Classify:
    """From the weights after an epoch of pre-training, by default the last."""
    name = f"{arm}-s{seed}" + ("" if epoch is None else f"-e{epoch}")
    folder = given.out / ("sweep-runs" if sweep else "fine")
    recipe = classify.demo(epochs=FINE_EPOCHS)
    loop = replace(
        recipe.loop, seed=seed, run_dir=folder / f"{name}-{lr:g}", device="cpu", device_batch=64,
        precision="bf16", checkpoint_minutes=60, keep_last=1,
    )  # fmt: skip
    return replace(
        recipe,
        name=name,
        data=replace(recipe.data, root=given.out / "sweep" if sweep else given.images, workers=0),
        optim=AdamWConfig(lr=lr, betas=(0.9, 0.999)),
        layer_decay=LayerDecayConfig(rate=1.0),
        loop=loop,
        eval_every=0,
        init=None if arm == "scratch" else weights_of(arm, seed, epoch, given),
    )


def weights_of(arm: str, seed: int, epoch: int | None, given: Arguments) -> Path:
    run = given.out / f"{arm}-s{seed}"
    if epoch is None:
        return run / "pretrained.safetensors"
    steps = len(find_images(given.images)) // 64
    return run / "checkpoints" / f"{epoch * steps:08d}" / "model.safetensors"


def run_one(recipe: Recipe) -> None:
    """In a process of its own, on one thread; what it prints goes beside its directory."""
    import torch

    from itpn.commands.train import train

    torch.set_num_threads(1)
    directory = recipe.loop.run_dir
    assert directory is not None
    directory.parent.mkdir(parents=True, exist_ok=True)
    with directory.with_name(f"{directory.name}.log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        train(recipe)


def run_all(recipes: Sequence[Recipe], processes: int) -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, max_tasks_per_child=1) as pool:
        jobs = {pool.submit(run_one, recipe): recipe for recipe in recipes}
        for number, (job, recipe) in enumerate(jobs.items(), start=1):
            job.result()
            print(f"{number} of {len(jobs)}: {recipe.loop.run_dir}", flush=True)


def pretrain_all(given: Arguments) -> None:
    arms = pretrained(given)
    run_all([pretraining(arm, seed, given) for seed in SEEDS for arm in arms], given.processes)


def finetune_all(given: Arguments) -> None:
    sweeps = [fine_tuning(arm, 0, lr, given, sweep=True) for arm in given.arms for lr in RATES]
    run_all(sweeps, given.processes)
    finals = [fine_tuning(arm, seed, best_rate(arm, given), given) for seed in SEEDS for arm in given.arms]
    halfway = [
        fine_tuning(arm, seed, best_rate(arm, given), given, epoch=EPOCHS[arm] // 2)
        for seed in SEEDS
        for arm in FOLLOWED
        if arm in given.arms
    ]
    run_all(finals + halfway, given.processes)


def best_rate(arm: str, given: Arguments) -> float:
    return max(RATES, key=lambda lr: top1(fine_tuning(arm, 0, lr, given, sweep=True)))


def top1(recipe: classify.Classify) -> float:
    assert recipe.loop.run_dir is not None
    return float(json.loads((recipe.loop.run_dir / "report.json").read_text())["val_top1"])


def measure_speed(given: Arguments) -> None:
    """Minutes of each arm's pre-training and of a teacher's epoch, one at a time, from 60 steps of each."""
    path = given.out / "minutes.json"
    minutes = json.loads(path.read_text()) if path.is_file() else {}
    minutes["teacher epoch"] = teacher(given.out / "speed" / "teacher.safetensors", 3, given)["minutes"] / 3
    for arm in pretrained(given):
        recipe = pretraining(arm, 0, given)
        directory = given.out / "speed" / arm
        loop = replace(recipe.loop, run_dir=directory, max_steps=60)
        run_all([replace(recipe, loop=loop, knn=KnnConfig())], 1)
        lines = [json.loads(line) for line in (directory / "speed.jsonl").read_text().splitlines()]
        rate = statistics.median(line["images_per_s"] for line in lines[2:])
        minutes[arm] = EPOCHS[arm] * len(find_images(given.images)) / rate / 60
    path.write_text(json.dumps(minutes) + "\n")
    print(json.dumps(minutes))


def report(given: Arguments) -> None:
    """The tables of docs/results.md, and their picture."""
    accuracies = {
        arm: [top1(fine_tuning(arm, seed, best_rate(arm, given), given)) for seed in SEEDS]
        for arm in given.arms
    }
    print(
        "| arm | learning rate | by seed | mean | against scratch | against pixel |\n"
        "|---|---|---|---|---|---|"
    )
    for arm, values in accuracies.items():
        against = [
            "" if other == arm or other not in accuracies else difference(values, accuracies[other])
            for other in ("scratch", "pixel")
        ]
        listed = ", ".join(f"{value:.1%}" for value in values)
        mean = f"{statistics.mean(values):.1%}"
        if arm in FOLLOWED:
            mean += f" (after half of the epochs {statistics.mean(halfway_of(arm, given)):.1%})"
        print(f"| {arm} | {best_rate(arm, given):g} | {listed} | {mean} | {' | '.join(against)} |")
    neighbours = {arm: [by_neighbours(arm, seed, given)[-1] for seed in SEEDS] for arm in pretrained(given)}
    print("| arm | k-NN at the end of pre-training, by seed | mean | against pixel |\n|---|---|---|---|")
    for arm, values in neighbours.items():
        against = ["" if arm == "pixel" else difference(values, neighbours["pixel"])] * (
            "pixel" in neighbours
        )
        listed = ", ".join(f"{value:.1%}" for value in values)
        print(f"| {' | '.join([arm, listed, f'{statistics.mean(values):.1%}', *against])} |")
    draw(accuracies, given)


def pretrained(given: Arguments) -> list[str]:
    return [arm for arm in given.arms if arm != "scratch"]


def by_neighbours(arm: str, seed: int, given: Arguments) -> list[float]:
    """k-NN accuracy in the course of pre-training."""
    lines = read_metrics(given.out / f"{arm}-s{seed}" / "metrics.jsonl").values()
    return [line["knn_top1"] for line in lines if "knn_top1" in line]


def draw(accuracies: Mapping[str, Sequence[float]], given: Arguments) -> None:
    """k-NN while pre-training and accuracy once fine-tuned, against minutes that count the teacher's own."""
    minutes = json.loads((given.out / "minutes.json").read_text())
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    arms = pretrained(given)
    for colour, arm in zip(COLOURS[: len(arms)], arms, strict=True):
        label = f"{arm}, teacher of {TEACHERS[arm]} epochs" if arm in TEACHERS else arm
        start = minutes["teacher epoch"] * TEACHERS.get(arm, 0)
        values = 100 * np.array([by_neighbours(arm, seed, given) for seed in SEEDS])
        places = start + minutes[arm] * np.linspace(0, 1, values.shape[1])
        left.plot(places, values.mean(0), color=colour, label=label)
        left.fill_between(places, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
        points = {1.0: accuracies[arm]}
        if arm in FOLLOWED:
            points[0.5] = halfway_of(arm, given)
        for share, found in points.items():
            place = start + share * minutes[arm]
            right.errorbar(
                place, 100 * statistics.mean(found), 100 * half_width(found),
                color=colour, marker="o", capsize=3, label=label if share == 1 else None,
            )  # fmt: skip
    if "scratch" in accuracies:
        right.axhline(100 * statistics.mean(accuracies["scratch"]), color=FAINT, label="from scratch")
    left.set(title="k-NN, range over five seeds", ylabel="top-1 in %")
    right.set(title="fine-tuned, 95 % interval of the mean", ylabel="top-1 in %")
    for panel in (left, right):
        panel.set_xlabel("minutes of pre-training on one core, the teacher's included")
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(*right.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    with writing(given.picture, "--picture") as file:
        figure.savefig(file, dpi=150)
    print(given.picture)


def halfway_of(arm: str, given: Arguments) -> list[float]:
    """Accuracies once fine-tuned from the weights after half of the epochs, by seed."""
    rate = best_rate(arm, given)
    return [top1(fine_tuning(arm, seed, rate, given, epoch=EPOCHS[arm] // 2)) for seed in SEEDS]


def difference(values: Sequence[float], others: Sequence[float]) -> str:
    """Mean of the seeds' differences, in points, with its 95 % interval."""
    pairs = [100 * (value - other) for value, other in zip(values, others, strict=True)]
    mean = statistics.mean(pairs)
    return f"{mean:+.1f} ± {half_width(pairs):.1f}"


def half_width(values: Sequence[float]) -> float:
    """Half of the 95 % interval of a mean of five."""
    return T_95 * statistics.stdev(values) / math.sqrt(len(values))


STAGES: dict[str, Callable[[Arguments], None]] = {
    "data": write_data,
    "teacher": train_teachers,
    "pretrain": pretrain_all,
    "finetune": finetune_all,
    "speed": measure_speed,
    "report": report,
}


def run_stages(
    arguments: type[A], stages: Mapping[str, Callable[[A], None]], description: str | None
) -> None:
    """The stages that the command line names, in its order."""
    given = tyro.cli(arguments, description=description)
    if unknown := [stage for stage in given.stages if stage not in stages]:
        raise SystemExit(f"no stage {', '.join(unknown)}; choose of {', '.join(stages)}")
    for stage in given.stages:
        stages[stage](given)


if __name__ == "__main__":
    run_stages(Arguments, STAGES, __doc__)
