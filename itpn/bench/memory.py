"""`itpn bench memory`: whether training keeps its memory, over thousands of steps of the real command."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from numpy.typing import NDArray

from itpn.commands.arguments import parse
from itpn.data.sample_data import write_imagefolder
from itpn.errors import UserError
from itpn.outputs import claim, writing
from itpn.show.curves import COLOURS
from itpn.show.sheet import FAINT, INK

SETTLING = 200
"""Steps in which the allocator and the caches fill up; the slope is taken after them."""
SETTINGS = "--knn.every 0 --picture-every 0 --checkpoint-minutes 0.5 --data.workers 2 --log-every 10"
Series = NDArray[np.float64]


@dataclass(frozen=True)
class Memory:
    """Train the demo's nano model on the bundled sample and check whether its resident memory grows."""

    steps: int = 2000
    """Optimiser steps."""
    batch_size: int = 16
    """Images per step."""
    out: Path = Path("memory.png")
    """Picture to write. Its extension selects the format."""


def run(arguments: list[str]) -> None:
    options = parse(Memory, arguments, "itpn bench memory")
    if options.steps < 2 * SETTLING:
        raise UserError(
            f"--steps {options.steps}: take at least {2 * SETTLING}; the first {SETTLING} are warm-up"
        )
    claim(("--out", options.out))
    with TemporaryDirectory() as directory:
        counts = write_imagefolder(Path(directory) / "images")
        epochs = options.steps // (counts["train"] // options.batch_size) + 1
        _train(Path(directory), options, epochs)
        steps, resident = _read(Path(directory) / "run" / "speed.jsonl")
    settled = steps > SETTLING
    slope, start = np.polyfit(steps[settled], resident[settled], 1)
    _draw(options.out, steps, resident, slope * steps + start)
    print(
        f"resident memory over {options.steps:,} steps: {resident[settled][0]:.0f} MB after {SETTLING}, "
        f"{resident[-1]:.0f} MB at the end, at most {resident.max():.0f} MB; slope after the first "
        f"{SETTLING} {1000 * slope:+.2f} MB per 1,000 steps; picture: {options.out}"
    )


def _train(directory: Path, options: Memory, epochs: int) -> None:
    """In a process of its own, whose memory holds nothing but the training."""
    command = [sys.executable, "-m", "itpn", "train", "pretrain_demo", *SETTINGS.split()]
    fields = {
        "--data.root": directory / "images",
        "--run-dir": directory / "run",
        "--batch-size": options.batch_size,
        "--epochs": epochs,
        "--max-steps": options.steps,
    }
    done = subprocess.run([*command, *(str(word) for field in fields.items() for word in field)])
    if done.returncode:
        raise SystemExit(done.returncode)


def _read(path: Path) -> tuple[Series, Series]:
    """Steps, and the training process's resident memory in MB."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    if "memory_gb" not in lines[-1]:
        raise UserError("resident memory can only be measured on Linux")
    points = np.array([(line["step"], 1000 * line["memory_gb"]) for line in lines])
    return points[:, 0], points[:, 1]


def _draw(out: Path, steps: Series, resident: Series, trend: Series) -> None:
    figure = Figure(figsize=(6.4, 3.2), dpi=150, layout="constrained")
    panel = figure.subplots()
    panel.plot(steps, resident, color=COLOURS[0], label="training process")
    settled = steps > SETTLING
    panel.plot(steps[settled], trend[settled], color=COLOURS[1], linestyle=(0, (5, 2)), label="straight line")
    panel.set_ylim(0, 1.15 * resident.max())
    panel.set_title("resident memory", loc="left", fontsize=11, fontweight="bold", color=INK)
    panel.set_xlabel("optimiser step", color=FAINT)
    panel.set_ylabel("MB", color=FAINT)
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panel.tick_params(colors=FAINT, labelsize=9)
    panel.grid(color="#d8dee4", linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color("#afb8c1")
    panel.legend(frameon=False, labelcolor=INK, loc="lower right")
    with writing(out) as file:
        figure.savefig(file)
