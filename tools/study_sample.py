"""What pre-training is worth on the bundled sample."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from itpn.evaluate.knn import KnnConfig
from itpn.objectives.distill import DistillConfig
from itpn.recipes.pretrain import Pretrain, demo

EPOCHS = {"pixel": 80, "mae": 80, "mfm": 48, "noise": 80, "distilled": 40}
ORDER = [
    *(("pixel", 0), ("distilled", 0), ("mfm", 0), ("mae", 0), ("noise", 0)),
    *((arm, seed) for seed in range(1, 5) for arm in ("pixel", "distilled")),
    *((arm, seed) for seed in range(1, 5) for arm in ("mfm", "mae")),
    *(("noise", seed) for seed in range(1, 5)),
]


@dataclass(frozen=True, kw_only=True)
class Arguments:
    root: Path = Path("data/sample/imagefolder")
    out: Path = Path("runs/study")
    processes: int = 2


def recipe_of(arm: str, seed: int, root: Path, out: Path) -> Pretrain:
    epochs = EPOCHS[arm]
    base = demo(epochs=epochs, feature_weight=0.3 if arm == "mfm" else 0)
    keep = epochs // 4 if arm in ("pixel", "distilled") else None
    loop = replace(
        base.loop, seed=seed, run_dir=out / f"{arm}-s{seed}", device="cpu", device_batch=64,
        precision="bf16", picture_every=epochs, keep_last=1, keep_every=keep, checkpoint_minutes=60,
        checkpoint_every=keep,
    )  # fmt: skip
    recipe = replace(
        base,
        name=arm,
        data=replace(base.data, root=out / "noise-images" if arm == "noise" else root, workers=0),
        loop=loop,
        knn=KnnConfig(every=epochs // 8, root=root),
    )
    if arm == "mae":
        recipe = replace(recipe, model=replace(recipe.model, pyramid=None))
    if arm == "distilled":
        objective = DistillConfig(
            teacher="vit_tiny_patch16_224", teacher_weights=out / "teacher.safetensors", target="tokens",
            target_width=192, num_hidden=14, min_block=4, positions="all",
        )  # fmt: skip
        recipe = replace(recipe, objective=objective)
    return recipe


def run(arm: str, seed: int, arguments: Arguments) -> None:
    import torch

    from itpn.tasks import pretrain

    torch.set_num_threads(1)
    log = (arguments.out / f"{arm}-s{seed}.log").open("w")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    pretrain(recipe_of(arm, seed, arguments.root, arguments.out))


def main() -> None:
    arguments = tyro.cli(Arguments)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.processes, mp_context=context, max_tasks_per_child=1) as pool:
        for job in [pool.submit(run, arm, seed, arguments) for arm, seed in ORDER]:
            job.result()


if __name__ == "__main__":
    main()
