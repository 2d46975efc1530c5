"""Ctrl-C and SIGTERM, noted so that the loop can finish its step and save."""

import signal
from types import FrameType
from typing import Self


class Interruption:
    """`signal` is 0 until one arrives. More change nothing: torchrun repeats what a terminal sent."""

    def __init__(self) -> None:
        self.signal = 0

    def __enter__(self) -> Self:
        self.before = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
