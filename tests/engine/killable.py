"""An `itpn` command to which things happen at chosen moments; `processes.py` starts it.

python -m tests.engine.killable DIRECTORY train …

DIRECTORY/traps.json holds [rank, event, number, action, argument] …, where the event is one of
    step      the loop begins the step of that number (from 0)
    start     the n-th (from 1) fsync or rename before the first step
    save      the n-th fsync or rename after it
    forward   the n-th forward pass, of a micro-step
    knn       the n-th batch of a k-NN evaluation
and the action a method of Traps. They hold for the first attempt of torchrun only. What each rank is fed is
noted in DIRECTORY/fed-RANK.jsonl.
"""

import contextlib
import errno
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

RANK = os.environ.get("RANK", "0")
FIRST_ATTEMPT = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"


class Traps:
    def __init__(self, directory: Path) -> None:
        self.directory, self.seen, self.step = directory, Counter(), None
        traps = json.loads((directory / "traps.json").read_text()) if FIRST_ATTEMPT else []
        self.traps = [trap[1:] for trap in traps if str(trap[0]) == RANK]
        (directory / f"pid-{RANK}").write_text(str(os.getpid()))

    def happened(self, event: str, number: int | None = None) -> None:
        if number is None:
            self.seen[event] += 1
            number = self.seen[event]
        for awaited, when, action, argument in self.traps:
            if (awaited, when) == (event, number):
                getattr(self, action)(argument)

    def kill_all(self, seconds: float) -> None:
        """Like a power cut: all ranks with their data workers, and torchrun; itself last."""
        pids = {int(path.read_text()) for path in self.directory.glob("pid-*")} - {os.getpid()}
        doomed = [*pids, os.getpid()]
        threading.Timer(seconds, lambda: [os.killpg(pid, signal.SIGKILL) for pid in doomed]).start()
        if not seconds:
            time.sleep(60)

    def kill_rank(self, _: None) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def interrupt(self, number: int) -> None:
        """As a terminal or a scheduler signals one process."""
        self._signal(os.kill, os.getpid(), number)

    def interrupt_group(self, number: int) -> None:
        """With its data workers."""
        self._signal(os.killpg, os.getpgid(0), number)

    def interrupt_torchrun(self, number: int) -> None:
        self._signal(os.kill, os.getppid(), number)

    def interrupt_everything(self, number: int) -> None:
        """As a scheduler that signals every process of a job."""
        for path in self.directory.glob("pid-*"):
            self._signal(os.killpg, int(path.read_text()), number)
        self._signal(os.kill, os.getppid(), number)

    def limit_files(self, num_bytes: int) -> None:
        """No file may grow beyond; -1 lifts it."""
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))

    def fill_disk(self, path: str) -> None:
        with open(path, "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1024))
            except OSError as error:
                assert error.errno == errno.ENOSPC

    def free_disk(self, path: str) -> None:
        os.unlink(path)

    def list_files(self, path: str) -> None:
        (self.directory / "files").write_text(" ".join(sorted(os.listdir(path))))

    def run_beside(self, arguments: list[str]) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "itpn", *arguments], capture_output=True, text=True, timeout=100
        )
        print(done.stderr, f"beside: {done.returncode}", sep="\n", flush=True)

    def _signal(self, send, target: int, number: int) -> None:
        (self.directory / "signalled").write_text(str(time.time()))
        send(target, number)


def install(traps: Traps) -> None:
    from itpn.tasks import pretrain as tasks
    from itpn.engine import checkpoint
    from itpn.objectives.pixel import PixelObjective

    begin_step, forward, knn = PixelObjective.begin_step, PixelObjective.forward, tasks.knn
    fed = (traps.directory / f"fed-{RANK}.jsonl").open("ab", buffering=0)

    def begin_step_(objective, step, num_steps):
        traps.step, traps.micro_step = step, 0
        traps.happened("step", step)
        begin_step(objective, step, num_steps)

    def forward_(objective, batch):
        samples = [
            [
                int(batch["epoch"][i]),
                int(batch["index"][i]),
                *(
                    hashlib.sha256(batch[name][i].numpy().tobytes()).hexdigest()[:16]
                    for name in sorted(batch)
                ),
            ]
            for i in range(len(batch["index"]))
        ]
        with contextlib.suppress(OSError):  # where no file may grow, this one does not either
            fed.write(json.dumps([traps.step, traps.micro_step, samples]).encode() + b"\n")
        traps.micro_step += 1
        traps.happened("forward")
        return forward(objective, batch)

    def knn_(features_of, *arguments, **named):
        def counted(images):
            traps.happened("knn")
            return features_of(images)

        return knn(counted, *arguments, **named)

    PixelObjective.begin_step, PixelObjective.forward, tasks.knn = begin_step_, forward_, knn_
    checkpoint.passed = lambda point: traps.happened("start" if traps.step is None else "save")


if __name__ == "__main__":
    from itpn import cli

    install(Traps(Path(sys.argv[1])))
    sys.exit(cli.main(sys.argv[2:]))
