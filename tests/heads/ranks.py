"""Started by torchrun in test_detect.py: trains a toy detector on as many ranks as there are."""

import sys
from pathlib import Path

import torch

from itpn.engine.distributed import World, join_world
from itpn.engine.loop import LoopConfig, train
from itpn.engine.optim import AdamWConfig
from itpn.engine.run import Run
from itpn.engine.schedule import ScheduleConfig
from tests.toys import STEADY, toy_detector, toy_scenes

BATCH_SIZE = 4


def fine_tune(directory: Path, world: World, **fields) -> None:
    """Four steps of a cascade; on one rank a batch is two micro-steps if `fields` say so."""
    model = toy_detector(cascade=True, drop_path=0.2)
    drops = torch.rand(100, model.model.backbone.num_drops, generator=torch.Generator().manual_seed(0))

    def batches(start_step: int, micro_batch: int):
        step = start_step
        while True:
            for offset in range(world.rank * micro_batch, BATCH_SIZE, world.size * micro_batch):
                ids = range(step * BATCH_SIZE + offset, step * BATCH_SIZE + offset + micro_batch)
                samples = [toy_scenes(1, seed=n) for n in ids]
                batch = {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}
                yield {**batch, "drop": drops[list(ids)]}
            step += 1

    loop = LoopConfig(
        **{"epochs": 1, "batch_size": BATCH_SIZE, "device_batch": 2, "device": "cpu", "log_every": 1} | fields
    )
    train(
        model,
        batches,
        steps_per_epoch=4,
        loop=loop,
        optim=AdamWConfig(lr=1e-4, eps=STEADY),
        schedule=ScheduleConfig(warmup_epochs=0),
        run=Run(directory, {}, world),
    )


if __name__ == "__main__":
    with join_world("cpu") as world:
        fine_tune(Path(sys.argv[1]), world)
