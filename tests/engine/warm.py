"""Forks a process for each module that it is told to run: the process has imported torch and itpn already.

python -m tests.engine.warm

A line of its input is [module, arguments, output]. It answers with two lines: the number of the process, and
the exit status once it has ended. `processes.py` starts it.
"""

import gc
import importlib
import json
import os
import runpy
import sys
from collections.abc import Sequence

PRELOADED = ("torch.distributed.run", "itpn.cli", "itpn.commands.train")


def become(module: str, arguments: Sequence[str], output: str) -> None:
    """Runs a module as `python -m` does, in a session of its own."""
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(1, 2)
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def main() -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # so that a collection in a fork does not copy what it shares
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            return become(*json.loads(line))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
