"""Losses that stand out, and steps in a row that had to be skipped."""

from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

WINDOW = 101
"""Steps that the running median is over."""
MIN_LOSSES = 20
FAR = 10.0
"""Median absolute deviations above the median that count as far; also at least a tenth of the median."""


class Watch:
    """A loss is held against the median of the last WINDOW; both are the same after a restart."""

    def __init__(self) -> None:
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.num_skipped = 0

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "num_skipped": self.num_skipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.losses.extend(state["losses"])
        self.num_skipped = state["num_skipped"]

    def outlier(self, loss: float) -> dict[str, float]:
        """Notes a step's loss; the numbers to log if it exceeds the median by far, else nothing."""
        found: dict[str, float] = {}
        if len(self.losses) >= MIN_LOSSES:
            middle = median(self.losses)
            spread = median(abs(other - middle) for other in self.losses)
            if loss - middle > max(FAR * spread, abs(middle) / 10):
                found = {"loss_outlier": loss, "loss_median": middle}
        self.losses.append(loss)
        return found
