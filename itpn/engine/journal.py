"""Files of JSON lines that grow with a run: metrics.jsonl, speed.jsonl, bad_images.jsonl."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from itpn.engine.checkpoint import sync


class Journal:
    """Appends lines. A checkpoint keeps the size, and a resumed run drops what was written after it.

    Lines that cannot be written, on a full disk, are kept, by checkpoints too, and tried again with the next.
    """

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self.path, self.say = path, say
        self.size, self.waiting = 0, b""

    def state_dict(self) -> dict[str, Any]:
        return {"size": self.size, "waiting": self.waiting.decode(errors="surrogateescape")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.size = state["size"]
        self.waiting = state.get("waiting", "").encode(errors="surrogateescape")

    def begin(self) -> None:
        """Drops the lines of steps that will be taken again."""
        self.size = min(self.size, self.path.stat().st_size) if self.path.exists() else 0
        if self.path.exists():
            os.truncate(self.path, self.size)

    def add(self, values: Mapping[str, Any]) -> None:
        """One line; numbers that are not finite, which JSON does not know, become null."""
        plain = {name: None if _not_finite(value) else value for name, value in values.items()}
        line = json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n"
        had_waiting = bool(self.waiting)
        self.waiting += line.encode(errors="backslashreplace")
        try:
            self._write()
        except OSError as error:
            if not had_waiting:
                self.say(f"cannot write {self.path} ({error.strerror}): keeping its lines, training goes on")

    def sync(self) -> None:
        """What can be written is on the disk."""
        with contextlib.suppress(OSError):
            self._write()
        if self.path.exists():
            sync(self.path)

    def _write(self) -> None:
        if not self.waiting:
            return
        with self.path.open("ab", buffering=0) as file:
            while self.waiting:
                written = file.write(self.waiting)
                self.size += written
                self.waiting = self.waiting[written:]


def _not_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
