"""A small objective and a small data set for the engine's tests."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from itpn.engine.distributed import World
from itpn.engine.loop import Interlude, LoopConfig, train
from itpn.engine.optim import AdamWConfig
from itpn.engine.run import Run
from itpn.engine.schedule import ScheduleConfig

NUM_IMAGES, STEPS_PER_EPOCH = 48, 4
OPTIM = AdamWConfig(lr=0.01)
SCHEDULE = ScheduleConfig(warmup_epochs=1)


class Toy(nn.Module):
    """Regression by a Linear, a LayerNorm, a Dropout, with a teacher (frozen copy) and a counter (buffer)."""

    def __init__(self, width: int = 5, dropout: float = 0.2) -> None:
        super().__init__()
        self.dropout = dropout
        generator = torch.Generator().manual_seed(0)
        self.head = nn.Linear(4, width)
        self.head.weight.data.normal_(generator=generator)
        self.head.bias.data.zero_()
        self.norm = nn.LayerNorm(width)
        self.teacher = nn.Linear(4, width).requires_grad_(False)
        self.teacher.load_state_dict(self.head.state_dict())
        self.register_buffer("steps_seen", torch.zeros(()))

    def begin_step(self, step: int, num_steps: int) -> None:
        self.share = step / num_steps

    @torch.no_grad()
    def end_step(self, step: int, num_steps: int) -> None:
        self.steps_seen += 1
        self.teacher.weight.lerp_(self.head.weight, 0.1)

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        x = nn.functional.dropout(batch["images"], self.dropout, self.training)
        prediction = self.norm(self.head(x)).mean(-1) + self.head(x).mean(-1)
        fit = (prediction - batch["target"]).square().mean()
        gap = (self.head(x) - self.teacher(x)).square().mean()
        return {"loss": fit + self.share * gap, "fit": fit.detach(), "gap": gap.detach()}


def toy_batches(world: World, batch_size: int):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(NUM_IMAGES, 4, generator=generator)
    target = images.sum(-1)

    def batches(start_step: int, micro_batch: int) -> Iterator[dict[str, torch.Tensor]]:
        step = start_step
        while True:
            for offset in range(world.rank * micro_batch, batch_size, world.size * micro_batch):
                ids = (step * batch_size + offset + torch.arange(micro_batch)) % NUM_IMAGES
                yield {"images": images[ids], "target": target[ids]}
            step += 1

    return batches


def toy_train(
    directory: Path,
    *,
    world: World | None = None,
    toy: Toy | None = None,
    interludes=(),
    every: int = 1,
    **fields,
) -> Toy:
    """Two epochs of four steps, two micro-steps each, unless `fields` of LoopConfig say otherwise."""
    world = world or World(0, 1, torch.device("cpu"))
    loop = LoopConfig(
        **{"epochs": 2, "batch_size": 12, "device_batch": 6, "log_every": 1, "checkpoint_every": 1, **fields}
    )
    toy = toy or Toy()
    train(
        toy,
        toy_batches(world, loop.batch_size),
        steps_per_epoch=STEPS_PER_EPOCH,
        loop=loop,
        optim=OPTIM,
        schedule=SCHEDULE,
        run=Run(directory, {"loop": {"epochs": loop.epochs}}, world),
        interludes=[Interlude(every, call) for call in interludes],
    )
    return toy
