"""`itpn replay RUN`: takes the step again at which a run's loss or gradient was not finite."""

from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from itpn.commands.arguments import parse
from itpn.engine.distributed import DeviceName
from itpn.engine.replay import BadStep
from itpn.errors import printable
from itpn.tasks.replay import replay_step

NUM_NAMED = 8


@dataclass(frozen=True)
class Replay:
    """Repeat the step at which a run's loss or gradient was not finite, from the weights before it."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory, or its replay/ folder."""
    root: Path | None = None
    """Folder of the images, if they have moved since."""
    device: DeviceName = "auto"
    """Device to run on. Values repeat exactly on the kind of device that trained."""


def run(arguments: list[str]) -> None:
    options = parse(Replay, arguments, "itpn replay")
    before, now, images = replay_step(options.run, options.device, options.root)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{before}. Repeated in {before.precision}, {before.micro_batch} images at once:")
    console.print(_table(before, now))
    if before.samples[0][0] and before.samples != now.samples:
        console.print("The list of images has changed since the run.")
    rank, i = _worst(before)
    samples = before.samples[rank][i][:NUM_NAMED] if before.samples == now.samples else []
    names = [printable(images.name(index)) for _, index in samples]
    if names:
        console.print(f"Images of rank {rank}, micro-step {i}: {', '.join(names)}, …", markup=False)
    if repr(before.losses) != repr(now.losses) or isfinite(before.grad_norm) != isfinite(now.grad_norm):
        console.print("These values differ from the run's: the kind of device, images or ranks differ.")
        raise SystemExit(1)


def _table(before: BadStep, now: BadStep) -> Table:
    table = Table("rank", "micro-step", "loss then", "loss now", "images")
    for rank, losses in enumerate(before.losses):
        for i, loss in enumerate(losses):
            count = len(before.samples[rank][i])
            table.add_row(str(rank), str(i), repr(loss), repr(now.losses[rank][i]), str(count))
    table.add_section()
    table.add_row("gradient", "norm", repr(before.grad_norm), repr(now.grad_norm))
    return table


def _worst(bad: BadStep) -> tuple[int, int]:
    """Rank and micro-step of the first loss that is not finite, or of the largest."""
    places = [(rank, i) for rank, losses in enumerate(bad.losses) for i in range(len(losses))]
    return max(places, key=lambda place: _badness(bad.losses[place[0]][place[1]]))


def _badness(loss: float) -> float:
    return loss if loss == loss else float("inf")
