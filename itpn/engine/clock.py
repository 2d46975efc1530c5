"""Time, by a device's own clock."""

import itertools
import time
from typing import Any

import torch


class Clock:
    """Seconds between marks, on the device's own clock: a GPU need not wait for the marks to be set."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[tuple[str, Any]] = []

    def mark(self, name: str) -> None:
        """Ends a part of that name, which began at the mark before."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self.marks.append((name, event))
        else:
            self.marks.append((name, time.perf_counter()))

    def read(self) -> dict[str, float]:
        """Seconds of each part, summed where one came several times; forgets the marks."""
        marks, self.marks = self.marks, []
        parts: dict[str, float] = {}
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        for (_, begun), (name, ended) in itertools.pairwise(marks):
            taken = begun.elapsed_time(ended) / 1000 if self.device.type == "cuda" else ended - begun
            parts[name] = parts.get(name, 0.0) + taken
        return parts
