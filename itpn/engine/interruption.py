"""Ctrl-C and SIGTERM, noted so that the loop can end its micro-step and save."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self


class Interrupted(KeyboardInterrupt):
    """A signal came where nothing needs to be brought to an end. No Exception: decoders swallow those."""


class Interruption:
    """`signal` is 0 until one arrives. More change nothing: torchrun repeats what a terminal sent.

    Args:
        notice: printed at once, when the first arrives; "": nothing.
    """

    def __init__(self, notice: str = "") -> None:
        self.signal, self.notice, self.raising = 0, notice, False

    def __enter__(self) -> Self:
        self.before = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal raises Interrupted; also one that came before."""
        self.raising = True
        try:
            if self.signal:
                raise Interrupted
            yield
        finally:
            self.raising = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.signal and self.notice:
            # Not by print: a signal may interrupt another print, whose lock is then taken.
            os.write(2, f"\n{signal.Signals(number).name}: {self.notice}\n".encode())
        self.signal = self.signal or number
        if self.raising:
            self.raising = False  # another signal must not cut the way out short
            raise Interrupted
