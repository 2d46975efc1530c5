"""Started by torchrun in test_fsdp.py: trains toy objectives on two ranks, under DDP and FSDP."""

import json
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch

from itpn import cli
from itpn.engine.distributed import World, join_world
from itpn.engine.loop import Interlude, LoopConfig, train
from itpn.engine.optim import AdamWConfig
from itpn.engine.run import Run
from itpn.engine.schedule import ScheduleConfig
from tests.toys import STEADY, toy_batch, toy_objective

BATCH_SIZE, STEPS_PER_EPOCH, STOP = 8, 4, 7
COMMAND = (
    "train pretrain_demo --data.root images --run-dir run --device cpu --epochs 3 --batch-size 8 "
    "--device-batch 2 --log-every 1 --data.workers 0 --picture-every 1 --knn.every 1 --knn.batch-size 3 "
    "--model.backbone.size itpn_pico --model.backbone.image-size 32 --objective.decoder.depth 1"
)


def objective(**fields):
    """Masked feature modeling, drop path, and a table of 49 rows, which two ranks cannot halve."""
    given = {"features": {"normalisation": "standardise"}, "drop_path": 0.2, "relative_position_bias": True}
    return toy_objective(**given | fields)


def batches_of(model, world: World):
    """Sample `n` is the same wherever it is drawn."""

    def batches(start_step: int, micro_batch: int):
        step = start_step
        while True:
            for offset in range(world.rank * micro_batch, BATCH_SIZE, world.size * micro_batch):
                ids = range(step * BATCH_SIZE + offset, step * BATCH_SIZE + offset + micro_batch)
                samples = [toy_batch(model, 1, seed=n) for n in ids]
                yield {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}
            step += 1

    return batches


def pretrain(directory: Path, world: World, model=None, **fields):
    """Three epochs of four steps, of two micro-steps each on two ranks, and evaluations that are uneven."""
    model = model or objective()
    loop = LoopConfig(
        **{"epochs": 3, "batch_size": BATCH_SIZE, "device_batch": 2, "device": "cpu", "log_every": 1}
        | {"checkpoint_every": 1, "clip_grad": 0.04}
        | fields
    )

    @torch.no_grad()
    def evaluate(epoch: int, step: int) -> dict[str, float]:
        images = toy_batch(model, 2, seed=1000)["images"]
        scores = [model.model.backbone(model.normalise(images)).c16.std() for _ in range(3 * world.rank + 1)]
        return {"score": scores[0].item()}

    train(
        model,
        batches_of(model, world),
        steps_per_epoch=STEPS_PER_EPOCH,
        loop=loop,
        optim=AdamWConfig(lr=3e-3, eps=STEADY),
        schedule=ScheduleConfig(warmup_epochs=1),
        run=Run(directory, {}, world),
        interludes=[Interlude(1, evaluate)],
    )
    return model


def share_of(model) -> float:
    """Of the parameters, how many this rank holds."""
    parameters = list(model.parameters())
    return sum(p.to_local().numel() for p in parameters) / sum(p.numel() for p in parameters)


def diverging():
    """The loss of step 2 is not finite."""
    model = objective()
    forward, begin_step = model.forward, model.begin_step

    def begin(step: int, num_steps: int) -> None:
        model.factor = float("nan") if step == 2 else 1.0
        begin_step(step, num_steps)

    def run(batch):
        outputs = forward(batch)
        return {**outputs, "loss": outputs["loss"] * model.factor}

    model.begin_step, model.forward = begin, run
    return model


def main(directory: Path) -> None:
    with join_world("cpu") as world:
        pretrain(directory / "ddp", world)
        model = pretrain(directory / "fsdp", world, strategy="fsdp")
        (directory / f"share{world.rank}.json").write_text(json.dumps(share_of(model)))

        pretrain(directory / "parts", world, strategy="fsdp", max_steps=STOP)
        pretrain(directory / "from_ddp", world, strategy="ddp", max_steps=STOP)
        if world.is_main:
            for name in ("from_fsdp", "to_one"):
                shutil.copytree(directory / "parts", directory / name)
        world.wait()
        pretrain(directory / "parts", world, strategy="fsdp")
        pretrain(directory / "from_ddp", world, strategy="fsdp")
        pretrain(directory / "from_fsdp", world, strategy="ddp")

        for strategy in ("ddp", "fsdp"):
            pretrain(directory / f"fp16_{strategy}", world, strategy=strategy, precision="fp16", max_steps=3)
        recomputing = objective(checkpointing=True)
        pretrain(directory / "recomputing", world, recomputing, strategy="fsdp", max_steps=3)
        pretrain(directory / "nan", world, diverging(), strategy="fsdp", max_steps=4, skip_bad_steps=1)

        with patch(
            "itpn.tasks.pretrain.join_world", lambda device: nullcontext(world)
        ):  # there is one already
            for strategy in ("--strategy ddp --max-steps 1", "--strategy fsdp"):
                assert cli.main([*COMMAND.split(), *strategy.split()]) == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
