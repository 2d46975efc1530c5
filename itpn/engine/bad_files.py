"""Files that cannot be read: counted over all ranks and in checkpoints, named once in bad_images.jsonl."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from itpn.engine.journal import Journal
from itpn.engine.run import Run
from itpn.errors import UserError, printable

MIN_SEEN = 1000


class BadFiles:
    """What the loaders of this rank could not read, until `share` tells all ranks.

    Args:
        num_files: how many there are; the share of bad ones is taken over no fewer, up to MIN_SEEN.
        max_share: of the training samples so far; more stop the run.
    """

    def __init__(self, run: Run, num_files: int = 0, max_share: float = 1.0) -> None:
        self.run, self.max_share = run, max_share
        self.min_seen = min(num_files, MIN_SEEN)
        self.journal = Journal(run.directory / "bad_images.jsonl", run.say)
        self.named: set[str] = set()
        self.num_replaced = 0
        self.fresh: list[tuple[str, str, bool]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"num_replaced": self.num_replaced, "journal": self.journal.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.num_replaced = state["num_replaced"]
        self.journal.load_state_dict(state["journal"])

    def begin(self) -> None:
        self.fresh.clear()  # what the search for the device batch met will be met again
        if self.run.world.is_main:
            self.journal.begin()
            written = self.journal.path.read_bytes() if self.journal.path.exists() else b""
            *lines, _ = (written + self.journal.waiting).split(b"\n")  # a name may hold other ends of lines
            self.named = {json.loads(line)["file"] for line in lines}

    def met(self, path: Path, reason: str, *, replaced: bool) -> None:
        """By a loader of this rank, for a training sample that was replaced, or in an evaluation."""
        name = str(path).encode(errors="backslashreplace").decode()  # a name need not be valid UTF-8
        self.fresh.append((name, reason, replaced))

    def share(self, step: int, num_seen: int) -> None:
        """On every rank: counts and names what any of them met; UserError if it is too much.

        Args:
            num_seen: training samples so far, over all ranks.
        """
        met = [file for rank in self.run.world.gather_json(self.fresh) for file in rank]
        self.fresh = []
        for name, reason, replaced in met:
            self.num_replaced += replaced
            if self.run.world.is_main and name not in self.named:
                self.named.add(name)
                self.journal.add({"step": step, "file": name, "reason": reason})
                self.run.say(printable(f"unreadable image left out: {name}: {reason}"))
        limit = self.max_share * max(num_seen, self.min_seen)
        if any(replaced for *_, replaced in met) and self.num_replaced > limit:
            raise UserError(
                f"{self.num_replaced:,} of {num_seen:,} images so far cannot be read, more than the "
                f"{self.max_share:.0%} of --data.max-bad-share: {self.journal.path} lists them, "
                "`itpn check-data` finds them all"
            )
