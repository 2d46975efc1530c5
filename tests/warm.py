"""Forks a process for each module that it is told to run: the process has imported torch and itpn already.

python -m tests.warm

A line of its input is [module, arguments, directory, output]. It answers with two lines: the number of the
process, and the exit status once that has ended. The ranks that torchrun starts are forks, too.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from typing import NoReturn

from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

PRELOADED = ("torch.distributed.run", "torch.utils.tensorboard", "itpn.cli", "itpn.commands.train")


def become(module: str, arguments: Sequence[str], directory: str, output: str) -> NoReturn:
    """Runs a module as `python -m` does, in a session of its own."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(1, 2)
    os.chdir(directory)
    run(module, arguments)


def run(module: str, arguments: Sequence[str]) -> NoReturn:
    """Ends the process as the interpreter would: nothing of the process that it was forked from goes on."""
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    sys.argv[1:] = arguments
    status: object = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 1)


class Rank:
    """A process of torchrun's, with the part of Popen that torchrun uses."""

    def __init__(self, module: str, arguments: Sequence[str], environment: dict[str, str]) -> None:
        self.status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.environ.clear()
            os.environ.update(environment)
            run(module, arguments)

    def poll(self) -> int | None:
        if self.status is None and (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.status = os.waitstatus_to_exitcode(ended[1])
        return self.status

    def wait(self, timeout: float) -> int:
        end = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("a rank", timeout)
            time.sleep(0.02)
        return status


def fork_rank(_: SubprocessHandler, command: Sequence[str], environment: dict[str, str]) -> Rank:
    """In place of `python -u -m MODULE …`."""
    module, *arguments = command[command.index("-m") + 1 :]
    return Rank(module, arguments, environment)


def main() -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    SubprocessHandler._popen = fork_rank
    gc.freeze()  # so that a collection in a fork does not copy what it shares
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            become(*json.loads(line))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
