"""Real training processes for the tests of kills, signals and full disks, and what they leave behind."""

import contextlib
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import load_file

from itpn.engine import checkpoint
from tests.launch import Forked, python

TIMEOUT = 150.0
NUM_IMAGES, NUM_STEPS = 43, 60
TINY = """
    pretrain_demo --model.backbone.size itpn_pico --model.backbone.image-size 32
    --model.backbone.drop-path 0.1 --model.pyramid.width 16 --objective.decoder.width 32
    --objective.decoder.depth 1 --objective.decoder.num-heads 2 --epochs 12 --batch-size 8 --device cpu
    --optim.eps 1e-4 --log-every 1 --picture-every 0 --knn.every 4 --knn.k 3 --checkpoint-minutes 0
    --keep-last 3 --data.max-bad-share 0.5
""".split()  # noqa: SIM905
"""A real config, made tiny: masked feature modeling with its teacher, drop path; k-NN; two bad images."""


Trap = tuple[object, ...]
"""Rank, event, number, action, argument, as in killable.py."""


@dataclass(frozen=True)
class Ended:
    status: int
    output: str
    directory: Path = field(repr=False)
    ended: float = field(repr=False)

    @property
    def seconds_since_signal(self) -> float:
        return self.ended - float((self.directory / "signalled").read_text())


def write_images(root: Path) -> None:
    """Two classes; in each of them a training image that cannot be read."""
    pixels = np.random.default_rng(0)
    for split, count in (("train", NUM_IMAGES), ("val", 6)):
        for i in range(count):
            path = root / split / "ab"[i % 2] / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.integers(0, 256, (36 + i % 7, 40, 3), dtype=np.uint8)).save(path)
            if split == "train" and i in (10, 25):
                path.write_bytes(path.read_bytes()[:100])


def start(arguments: Sequence[str], output: Path, before: Sequence[str]) -> Forked | subprocess.Popen[bytes]:
    """Begins `python -m …`; as a fork, which spares seconds of imports, if nothing comes before."""
    if not before:
        return Forked(*arguments, output=output)
    command = [*before, sys.executable, "-m", *arguments]
    with output.open("wb") as file:
        return python(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)


def itpn(
    directory: Path,
    arguments: Sequence[object],
    traps: Sequence[Trap] = (),
    *,
    ranks: int = 1,
    max_restarts: int = 0,
    before: Sequence[str] = (),
) -> Ended:
    """Runs a command to its end, in a session of its own, with `traps` of `killable.py`.

    Args:
        before: a command that starts the process, as `unshare …`.
    """
    directory.mkdir(exist_ok=True)
    for path in directory.glob("pid-*"):
        path.unlink()
    (directory / "traps.json").write_text(json.dumps(traps))
    torchrun = f"torch.distributed.run --standalone --nproc-per-node {ranks} --max-restarts {max_restarts} -m"
    module = [*(torchrun.split() if ranks > 1 else ()), "tests.engine.killable"]
    process = start([*module, str(directory), *map(str, arguments)], directory / "output", before)
    (directory / "pid-torchrun").write_text(str(process.pid))
    try:
        status = process.wait(TIMEOUT)
        ended = time.time()
    finally:
        for path in directory.glob("pid-*"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(path.read_text()), signal.SIGKILL)
    return Ended(status, (directory / "output").read_text(errors="replace"), directory, ended)


def train(
    images: Path,
    run: Path,
    traps: Sequence[Trap] = (),
    *fields: object,
    ranks: int = 1,
    max_restarts: int = 0,
    before: Sequence[str] = (),
    beside: Path | None = None,
) -> Ended:
    """The tiny run in directory `run`; what the processes were fed is noted beside it."""
    given = ["--data.root", images, "--run-dir", run, "--device-batch", 4 // ranks, *fields]
    return itpn(
        beside or run.with_name(f"{run.name}-process"),
        ["train", *TINY, *given],
        traps,
        ranks=ranks,
        max_restarts=max_restarts,
        before=before,
    )


def outcome(run: Path) -> dict[str, object]:
    """All that must be the same, bit by bit, however often the run was stopped."""
    last = run / "checkpoints" / (run / "checkpoints" / "last").read_text()
    tensors = {
        f"{path.name}: {name}": hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        for path in (run / "pretrained.safetensors", *sorted(last.glob("*.safetensors")))
        for name, tensor in load_file(path).items()
    }
    journals = {name: (run / name).read_bytes() for name in ("metrics.jsonl", "bad_images.jsonl")}
    return {**journals, **tensors, "progress": checkpoint.read_state(last)["progress"]}


def losses(run: Path) -> dict[int, float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def fed(run: Path, num_ranks: int = 1) -> dict[int, list[list[object]]]:
    """Each step's samples in the order of the global batch: epoch, index, hashes of all tensors.

    Of a step that was taken again, what was fed last.
    """
    parts: dict[tuple[int, int, int], list[list[object]]] = {}
    for rank in range(num_ranks):
        path = run.with_name(f"{run.name}-process") / f"fed-{rank}.jsonl"
        for line in path.read_text().splitlines():
            step, micro_step, samples = json.loads(line)
            parts[step, micro_step, rank] = samples
    steps: dict[int, list[list[object]]] = {}
    for (step, *_), samples in sorted(parts.items()):
        steps.setdefault(step, []).extend(samples)
    return steps


def once(shared: Path, name: str, make: Callable[[Path], object]) -> Path:
    """`shared`/`name`, made by whichever test process is the first to need it."""
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / f"{name}.made").exists():
            make(shared / name)
            (shared / f"{name}.made").touch()
    return shared / name
