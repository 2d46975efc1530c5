"""A small teacher for the bundled sample: a timm vision transformer, trained on its labels.

`python tools/train_teacher.py --root data/sample/imagefolder --out teacher.safetensors`, then
`--objective.teacher vit_tiny_patch16_224 --objective.teacher-weights teacher.safetensors`. CLIP's stand-in
where no weights can be downloaded: like CLIP it has seen what the images are called.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
import tyro
from rich.progress import track
from safetensors.torch import save_file

from itpn.data.images import find_images
from itpn.data.loader import DataConfig, eval_loader, steps_per_epoch, train_loader
from itpn.engine.schedule import ScheduleConfig, lr_at
from itpn.nn.normalise import Normalise
from itpn.outputs import claim, writing


@dataclass(frozen=True, kw_only=True)
class Arguments:
    root: Path
    """Image folder with train and val, in class folders."""
    out: Path
    """Where the weights go."""
    name: str = "vit_tiny_patch16_224"
    """As timm calls it; it is built for image_size, and its head keeps its 1000 outputs."""
    image_size: int = 96
    seed: int = 0
    epochs: int = 60
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.05


def main() -> None:
    arguments = tyro.cli(Arguments)
    claim(("--out", arguments.out))
    torch.manual_seed(arguments.seed)
    images, val = find_images(arguments.root, "train"), find_images(arguments.root, "val")
    assert images.labels is not None
    model = timm.create_model(arguments.name, img_size=arguments.image_size, drop_path_rate=0.1)
    normalise = Normalise((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 3)  # timm's for this model
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=arguments.weight_decay, fused=True)
    steps = steps_per_epoch(len(images), arguments.batch_size)
    batches = train_loader(
        images,
        DataConfig(min_scale=0.2, colour_jitter=0.4, workers=0),
        image_size=(arguments.image_size,) * 2, draw=lambda generator: {}, seed=arguments.seed,
        batch_size=arguments.batch_size, micro_batch=arguments.batch_size,
    )  # fmt: skip
    begun = time.perf_counter()
    for step in track(range(arguments.epochs * steps), description="training the teacher"):
        lr = lr_at(step, ScheduleConfig(), peak=arguments.lr, epochs=arguments.epochs, steps_per_epoch=steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = next(batches)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(normalise(batch["images"]))
        F.cross_entropy(logits.float(), images.labels[batch["index"]], label_smoothing=0.1).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - begun

    model.eval()
    right = 0
    with torch.no_grad():
        for batch in eval_loader(val, image_size=(arguments.image_size,) * 2, batch_size=64, workers=0):
            right += int((model(normalise(batch["images"])).argmax(1) == batch["labels"]).sum())
    with writing(arguments.out) as file:
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, file)
    print(json.dumps({"top1": right / len(val), "epochs": arguments.epochs, "minutes": seconds / 60}))


if __name__ == "__main__":
    main()
