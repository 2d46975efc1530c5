"""Python modules run in processes of their own, on one rank or on several by torchrun."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def python(arguments: Sequence[str], **streams: Any) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(arguments, cwd=ROOT, env=environment, start_new_session=True, **streams)


@cache
def warm() -> subprocess.Popen[bytes]:
    """The process of `warm.py`, which ends with this one; without buffers, so that it can be polled."""
    start = [sys.executable, "-m", "tests.warm"]
    return python(start, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)


class Forked:
    """`python -m MODULE …`, forked, which spares seconds of imports; with what is needed of Popen."""

    def __init__(self, module: str, *arguments: str, output: Path, directory: Path = ROOT) -> None:
        order = [module, arguments, str(directory), str(output)]
        warm().stdin.write(json.dumps(order).encode() + b"\n")
        self.pid = int(warm().stdout.readline())

    def wait(self, timeout: float) -> int:
        if not select.select([warm().stdout], [], [], timeout)[0]:
            os.killpg(self.pid, signal.SIGKILL)
            warm().stdout.readline()
            raise subprocess.TimeoutExpired("a fork", timeout)
        return int(warm().stdout.readline())


def torchrun(module: str, *arguments: object, ranks: int = 2, directory: Path, timeout: float = 600) -> str:
    """Runs a module on several ranks, in a directory; returns what it printed."""
    start = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", module]
    output = directory / "torchrun-output"
    process = Forked(*start, *map(str, arguments), output=output, directory=directory)
    try:
        status = process.wait(timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    said = output.read_text(errors="replace")
    assert status == 0, said[-5000:]
    return said
