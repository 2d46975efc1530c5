"""Work on many files in processes that may die of one of them."""

import os
import signal
from collections.abc import Callable, Iterator
from itertools import islice
from multiprocessing import Pipe, Process
from multiprocessing.connection import Connection, wait
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Death(NamedTuple):
    """What became of a process that worked on an item."""

    exit_code: int | None

    def __str__(self) -> str:
        if self.exit_code is None or self.exit_code >= 0:
            return f"the process that read it ended with status {self.exit_code}"
        name = signal.Signals(-self.exit_code).name
        hint = ", perhaps for lack of memory" if name == "SIGKILL" else ""
        return f"the process that read it was killed by {name}{hint}"


def each(work: Callable[[int], T], num_items: int, num_workers: int) -> Iterator[tuple[int, T | Death]]:
    """`work(i)` for every i, several at a time, in the order in which they are done.

    Args:
        work: Picklable. What it raises or prints on stderr is lost, and its process with it.

    Yields:
        i and its result, or the death of the process that had it. Another process then goes on.
    """
    todo = iter(range(num_items))
    busy: list[_Worker[T]] = []
    try:
        busy += [_Worker(work, index) for index in islice(todo, num_workers)]
        while busy:
            ready = wait([worker.connection for worker in busy])
            for worker in [worker for worker in busy if worker.connection in ready]:
                index, result = worker.index, worker.result()
                following = next(todo, None)
                if following is None or isinstance(result, Death) or not worker.give(following):
                    busy.remove(worker)
                    worker.end()
                    busy += [] if following is None else [_Worker(work, following)]
                yield index, result
    finally:
        for worker in busy:
            worker.end()


class _Worker(Generic[T]):
    def __init__(self, work: Callable[[int], T], index: int) -> None:
        self.connection, theirs = Pipe()
        self.process = Process(target=_serve, args=(work, theirs, self.connection), daemon=True)
        self.process.start()
        theirs.close()  # the worker's is then the only one, and its death the end of the pipe
        self.give(index)

    def give(self, index: int) -> bool:
        """False if the process is dead already, of which the item is innocent."""
        self.index = index
        try:
            self.connection.send(index)
        except BrokenPipeError:
            return False
        return True

    def result(self) -> T | Death:
        try:
            result: T = self.connection.recv()
            return result
        except (EOFError, ConnectionResetError):
            self.process.join()
            return Death(self.process.exitcode)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(work: Callable[[int], T], connection: Connection, parents_end: Connection) -> None:
    # Forked workers hold the parent's ends of those started before. When the parent is killed, the last one
    # started notices, then the one before it, and so on; if each closes the copy of its own.
    parents_end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff's remarks would go through the progress bar
    try:
        while True:
            connection.send(work(connection.recv()))
    except (EOFError, BrokenPipeError):
        return
