"""A short fine-tuning on an image folder, to compare pre-trainings: `--init FILE`, or from scratch.

Every run prints a line of JSON: arm, seed, and top-1 on the validation split after the last epoch.
The recipe is the same for every arm, tuned for none: AdamW, cosine, label smoothing, crops, flips.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

from itpn.data.images import find_images
from itpn.data.loader import DataConfig, eval_loader, steps_per_epoch, train_loader
from itpn.engine.schedule import ScheduleConfig, lr_at
from itpn.heads.classify import Classifier, ClassifierConfig, smoothed_cross_entropy
from itpn.nn.pyramid import ModelConfig
from itpn.objectives.pixel import PixelConfig, PixelObjective
from itpn.recipes.pretrain import demo
from itpn.weights import files, loading


@dataclass(frozen=True, kw_only=True)
class Arguments:
    root: Path
    """Image folder with train and val, in class folders."""
    init: Path | None = None
    """Weights to start from; from scratch without."""
    seed: int = 0
    epochs: int = 12
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.05
    min_scale: float = 0.35


def starting_point(init: Path | None) -> PixelObjective:
    if init is None:
        recipe = demo()
        return PixelObjective(recipe.model, replace(recipe.objective, features=PixelConfig().features))
    weights = files.read(init)
    plain = replace(weights.part("objective", PixelConfig), features=PixelConfig().features)
    objective = PixelObjective(weights.part("model", ModelConfig), plain)
    loading.load_into(objective, weights)
    return objective


def main() -> None:
    arguments = tyro.cli(Arguments)
    torch.manual_seed(arguments.seed)
    images, val = find_images(arguments.root, "train"), find_images(arguments.root, "val")
    if images.labels is None or images.class_names != val.class_names:
        raise SystemExit("train and val need the same class folders")
    start = starting_point(arguments.init)
    size = (start.model.backbone.config.image_size,) * 2
    model = Classifier(start.model.backbone, ClassifierConfig(num_classes=len(images.class_names or ())))
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        betas=(0.9, 0.999), weight_decay=arguments.weight_decay, fused=True,
    )  # fmt: skip
    steps = steps_per_epoch(len(images), arguments.batch_size)
    batches = train_loader(
        images,
        DataConfig(min_scale=arguments.min_scale, workers=0),
        image_size=size, draw=lambda generator: {}, seed=arguments.seed,
        batch_size=arguments.batch_size, micro_batch=arguments.batch_size,
    )  # fmt: skip
    for step in range(arguments.epochs * steps):
        lr = lr_at(
            step,
            ScheduleConfig(warmup_epochs=2),
            peak=arguments.lr,
            epochs=arguments.epochs,
            steps_per_epoch=steps,
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = next(batches)
        losses = smoothed_cross_entropy(
            model(start.normalise(batch["images"])), images.labels[batch["index"]]
        )
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    model.eval()
    right = 0
    with torch.no_grad():
        for batch in eval_loader(val, image_size=size, batch_size=64, workers=0):
            right += int((model(start.normalise(batch["images"])).argmax(1) == batch["labels"]).sum())
    arm = str(arguments.init.parent.name) if arguments.init else "from scratch"
    print(
        json.dumps({"arm": arm, "seed": arguments.seed, "epochs": arguments.epochs, "top1": right / len(val)})
    )


if __name__ == "__main__":
    main()
