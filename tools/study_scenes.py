"""What a pre-trained backbone and pyramid are worth for detection and segmentation, on the bundled scenes.

`python tools/study_scenes.py [STAGE …] [--tasks detect segment]`, after `tools/study_sample.py`, whose
pre-trained weights it starts from. Stages, each of which goes on where it stopped: `data`, `sweep`,
`finetune`, `report`, `maps`; all of them without a name. The arms are the paper's ablation in small: nothing
pre-trained; MAE on the backbone alone; backbone and pyramid pre-trained together, with the pyramid thrown
away, or kept; the same with masked feature modeling. Each arm's learning rate is chosen with seed 0 on a
fifth of the training scenes; everything that is reported is measured on the validation scenes. Detection
finds objects of any class: to tell the 18 classes of the drawings apart takes longer (2.3 % box AP after 16
epochs of one run from `pixel`), and arms could not be told apart by it.
"""

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, get_args

import torch
import tyro
from matplotlib.figure import Figure
from PIL import Image
from study_sample import SEEDS, difference, run_all, run_stages
from torchvision.transforms.functional import pil_to_tensor

import itpn
from itpn.data.sample_data import write_sample
from itpn.models import MEAN, STD, FeatureModel
from itpn.outputs import writing
from itpn.recipes import detect, segment
from itpn.recipes.detect import Detect
from itpn.recipes.segment import Segment
from itpn.show.curves import COLOURS, read_metrics

Task = Literal["detect", "segment"]
Arm = Literal["scratch", "mae", "backbone", "pixel", "mfm"]
ARMS: dict[Arm, tuple[str | None, bool]] = {
    "scratch": (None, False),
    "mae": ("mae", False),
    "backbone": ("pixel", False),
    "pixel": ("pixel", True),
    "mfm": ("mfm", True),
}
"""What each starts from: an arm of `study_sample.py`, and whether its pyramid is loaded."""
RATES = {"detect": (3e-4, 1e-3, 3e-3), "segment": (1e-3, 3e-3, 1e-2)}
EPOCHS = {"detect": 8, "segment": 10}
SWEEP_EPOCHS = {"detect": 8, "segment": 5}
"""Half as many tell the rates apart in segmentation, where all arms agree, and do not in detection."""
MEASURES = {"detect": ("box_AP", "mask_AP"), "segment": ("miou", "pixel_accuracy")}
"""Numbers that are reported; the first one chooses the learning rate."""
TITLES = {"detect": "box AP", "segment": "mIoU"}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    stages: Annotated[tuple[str, ...], tyro.conf.Positional] = ("data", "sweep", "finetune", "report", "maps")
    tasks: tuple[Task, ...] = ("detect", "segment")
    arms: tuple[Arm, ...] = get_args(Arm)
    pretrained: Path = Path("runs/study")
    """What `study_sample.py` left."""
    out: Path = Path("runs/study-scenes")
    lr: float | None = None
    """Learning rate of every arm, instead of the best of each one's sweep."""
    processes: int = 2
    """Runs at a time."""
    pictures: Path = Path("docs/pictures")

    @property
    def scenes(self) -> Path:
        return self.out / "data"


def write_data(given: Arguments) -> None:
    """The scenes, and their training part once more, without a validation part, for the sweep."""
    if not given.scenes.is_dir():
        write_sample(given.scenes)
    ade20k = Path("ade20k") / "ADEChallengeData2016"
    for part in (
        Path("coco", "train2017"),
        Path("coco", "annotations", "instances_train2017.json"),
        ade20k / "images" / "training",
        ade20k / "annotations" / "training",
        ade20k / "objectInfo150.txt",
    ):
        link = given.out / "sweep" / part
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to((given.scenes / part).resolve())


def fine_tuning(
    task: Task, arm: Arm, seed: int, lr: float, given: Arguments, *, sweep: bool = False
) -> Detect | Segment:
    epochs = (SWEEP_EPOCHS if sweep else EPOCHS)[task]
    recipe = detect.demo(epochs=epochs) if task == "detect" else segment.demo(epochs=epochs)
    source, pyramid = ARMS[arm]
    name = f"{task}-{arm}-s{seed}"
    root = given.out / "sweep" if sweep else given.scenes
    loop = replace(
        recipe.loop, seed=seed, device="cpu", precision="bf16", keep_last=1, checkpoint_minutes=60,
        picture_every=0 if sweep else epochs,
        run_dir=given.out / ("sweep-runs" if sweep else "runs") / f"{name}-{lr:g}",
    )  # fmt: skip
    return replace(
        recipe,
        name=name,
        loop=loop,
        optim=replace(recipe.optim, lr=lr),
        data=replace(recipe.data, root=root / ("coco" if task == "detect" else "ade20k"), workers=0),
        val_share=0.2,
        eval_every=0 if sweep else 2,
        init=None if source is None else given.pretrained / f"{source}-s{seed}" / "pretrained.safetensors",
        init_pyramid=pyramid,
    )


def sweep_all(given: Arguments) -> None:
    runs = [
        fine_tuning(task, arm, 0, lr, given, sweep=True)
        for task in given.tasks for arm in given.arms for lr in RATES[task]
    ]  # fmt: skip
    run_all(runs, given.processes)


def finetune_all(given: Arguments) -> None:
    run_all(
        [final(task, arm, seed, given) for seed in SEEDS for task in given.tasks for arm in given.arms],
        given.processes,
    )


def final(task: Task, arm: Arm, seed: int, given: Arguments) -> Detect | Segment:
    return fine_tuning(task, arm, seed, best_rate(task, arm, given), given)


def best_rate(task: Task, arm: Arm, given: Arguments) -> float:
    if given.lr is not None:
        return given.lr
    key = MEASURES[task][0]
    return max(RATES[task], key=lambda lr: measured(fine_tuning(task, arm, 0, lr, given, sweep=True), key))


def measured(recipe: Detect | Segment, key: str) -> float:
    assert recipe.loop.run_dir is not None
    return float(json.loads((recipe.loop.run_dir / "report.json").read_text())[key])


COMPARED: tuple[Arm, ...] = ("scratch", "backbone", "pixel")
"""Arms that every other one is measured against."""


def report(given: Arguments) -> None:
    """The tables of docs/results.md, and their pictures."""
    for task in given.tasks:
        key, other_key = MEASURES[task]
        found = {arm: [measured(final(task, arm, seed, given), key) for seed in SEEDS] for arm in given.arms}
        compared = [arm for arm in COMPARED if arm in given.arms]
        against = " | ".join(f"against {arm}" for arm in compared)
        print(f"| {task} | learning rate | {key}, seeds 0 to 4 | mean | {against} | {other_key} |")
        print("|---" * (5 + len(compared)) + "|")
        for arm, values in found.items():
            others = [measured(final(task, arm, seed, given), other_key) for seed in SEEDS]
            cells = [
                arm,
                f"{best_rate(task, arm, given):g}",
                ", ".join(f"{100 * value:.1f}" for value in values),
                f"{100 * statistics.mean(values):.1f}",
                *("" if other == arm else difference(values, found[other]) for other in compared),
                f"{100 * statistics.mean(others):.1f}",
            ]
            print(f"| {' | '.join(cells)} |")
        print(f"A run trains for {minutes(task, given):.1f} minutes at the median speed.")
        draw(task, given)


def minutes(task: Task, given: Arguments) -> float:
    """Of a final run, from the median of all runs' speeds."""
    runs = [
        read_metrics(directory_of(task, arm, seed, given) / "speed.jsonl")
        for arm in given.arms
        for seed in SEEDS
    ]
    speeds = [line["images_per_s"] for run in runs for line in run.values()]
    images = max(runs[0]) * final(task, given.arms[0], 0, given).loop.batch_size
    return float(images / statistics.median(speeds) / 60)


def draw(task: Task, given: Arguments) -> None:
    """The first measure on the validation scenes against epochs and at the end; says where it is, and where
    what the last arm's model says of some scenes."""
    key = MEASURES[task][0]
    figure = Figure(figsize=(9, 4), layout="constrained")
    course, end = figure.subplots(1, 2, sharey=True)
    for place, arm in enumerate(given.arms):
        colour = COLOURS[list(ARMS).index(arm)]
        runs = [
            {
                line["epoch"]: 100 * line[key]
                for line in read_metrics(directory_of(task, arm, seed, given) / "metrics.jsonl").values()
                if key in line
            }
            for seed in SEEDS
        ]
        epochs = sorted(runs[0])
        means = [statistics.mean(run[epoch] for run in runs) for epoch in epochs]
        course.plot(epochs, means, color=colour, marker="o", label=arm)
        end.plot([place] * len(runs), [run[epochs[-1]] for run in runs], "o", color=colour, alpha=0.6)
        end.hlines(means[-1], place - 0.3, place + 0.3, color=colour, linewidth=2)
    course.set(title=f"{TITLES[task]} in %, mean over five seeds", xlabel="epochs")
    course.legend(frameon=False)
    end.set(title="every seed at the end", xticks=range(len(given.arms)), xticklabels=given.arms)
    for panel in (course, end):
        panel.spines[["top", "right"]].set_visible(False)
    with writing(given.pictures / f"study-{task}.png", "--pictures") as file:
        figure.savefig(file, dpi=150)
    newest = sorted((directory_of(task, given.arms[-1], 0, given) / "pictures").glob(f"{task}*.png"))
    print(given.pictures / f"study-{task}.png", *newest[-1:])


def directory_of(task: Task, arm: Arm, seed: int, given: Arguments) -> Path:
    directory = final(task, arm, seed, given).loop.run_dir
    assert directory is not None
    return directory


def show_maps(given: Arguments) -> None:
    """How the maps of 16 scenes are scaled, with seed 0: all channels' root mean square, and how many times
    that of the median channel the largest has."""
    paths = sorted((given.scenes / "coco" / "val2017").glob("*.jpg"))[:16]
    scenes = [pil_to_tensor(Image.open(path).convert("RGB").resize((128, 128))) for path in paths]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    images = (torch.stack(scenes) / 255 - mean) / std
    print("| arm | p4 | p8 | p16 |\n|---|---|---|---|")
    for arm, (source, pyramid) in ARMS.items():
        if source in ("pixel", "mfm"):
            model = itpn.load(given.pretrained / f"{source}-s0" / "pretrained.safetensors")
            if not pyramid:
                torch.manual_seed(0)
                model.pyramid = FeatureModel(model.config).pyramid
            with torch.inference_mode():
                maps = model.eval()(images).values()
            channels = [features.square().mean((0, 2, 3)).sqrt() for features in maps]
            cells = [
                f"{rms.square().mean().sqrt():.2f}, {rms.max() / rms.median():.1f} x" for rms in channels
            ]
            print(f"| {' | '.join([arm, *cells])} |")


STAGES: dict[str, Callable[[Arguments], None]] = {
    "data": write_data,
    "sweep": sweep_all,
    "finetune": finetune_all,
    "report": report,
    "maps": show_maps,
}


if __name__ == "__main__":
    run_stages(Arguments, STAGES, __doc__)
