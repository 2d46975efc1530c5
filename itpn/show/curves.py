"""Training curves from the `metrics.jsonl` of one or several runs."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter
from numpy.typing import NDArray

from itpn.errors import UserError
from itpn.show.sheet import FAINT, INK

Series = NDArray[np.float64]
Metrics = dict[int, dict[str, float]]
"""Step -> everything finite that was logged at it."""

COLOURS = ("#0969da", "#d1570c", "#1a8a5a", "#a8409f", "#c69214", "#4f5b66")
LINE_STYLES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """How a logged number is called and drawn."""

    title: str
    axis: str
    scale: float = 1
    noisy: bool = True
    """Drawn as a running mean over a faint curve of the values themselves."""


USUAL = {
    "loss": Quantity(title="loss, training", axis="loss"),
    "pixel": Quantity(title="pixel loss", axis="mean square error"),
    "feature": Quantity(title="feature loss", axis="smooth L1, mean over stages"),
    "accuracy": Quantity(title="accuracy, training", axis="accuracy in %", scale=100),
    "val_top1": Quantity(title="top-1, validation", axis="accuracy in %", scale=100, noisy=False),
    "val_loss": Quantity(title="loss, validation", axis="loss", noisy=False),
    "lr": Quantity(title="learning rate", axis="learning rate", noisy=False),
    "box_AP": Quantity(title="box AP, validation", axis="AP in %", scale=100, noisy=False),
    "mask_AP": Quantity(title="mask AP, validation", axis="AP in %", scale=100, noisy=False),
    "miou": Quantity(title="mIoU, validation", axis="mean over classes in %", scale=100, noisy=False),
    "pixel_accuracy": Quantity(
        title="pixel accuracy, validation", axis="accuracy in %", scale=100, noisy=False
    ),
    "knn_top1": Quantity(title="k-NN top-1", axis="accuracy in %", scale=100, noisy=False),
}
AXES = {"step": "optimiser step", "epoch": "epoch"}


def loss_curves(
    runs: Mapping[str, Sequence[Path]], out: Path, keys: Sequence[str] = (), *, against: str = "step"
) -> None:
    """Draws one panel per key, with all runs in each.

    Args:
        runs: name -> metrics files. Those of one name (seeds) share a colour and differ in their line style.
        out: picture to write; its ending chooses the format.
        keys: what to draw; by default all of ``USUAL`` that was logged.
        against: key on the horizontal axis; where a line lacks it, it is interpolated from the lines around.

    Raises:
        UserError: a file that cannot be read, is damaged, or lacks what was asked for.
    """
    metrics = {name: [read_metrics(path) for path in paths] for name, paths in runs.items()}
    logged = {key for arm in metrics.values() for run in arm for values in run.values() for key in values}
    usual = [key for key in USUAL if key in logged and (key != "pixel" or "feature" in logged)]
    keys = keys or usual or ["loss"]
    if missing := {*keys, against} - logged:
        files = ", ".join(str(path) for paths in runs.values() for path in paths)
        found = ", ".join(sorted(logged)) or "nothing"
        raise UserError(f"no line of {files} has {', '.join(sorted(missing))}; found {found}")

    columns = min(3, len(keys))
    rows = math.ceil(len(keys) / columns)
    figure = Figure(figsize=(4.4 * columns, 3.1 * rows + 0.4), dpi=150, layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel, key in zip(panels[: len(keys)], keys, strict=True):
        _draw_panel(panel, metrics, key, against)
    for panel in panels[len(keys) :]:
        panel.remove()
    names = [f"{name} ({len(paths)} runs)" if len(paths) > 1 else name for name, paths in runs.items()]
    strokes = [Line2D([], [], color=COLOURS[i % len(COLOURS)], linewidth=2) for i in range(len(names))]
    figure.legend(strokes, names, loc="outside upper center", ncols=4, frameon=False, labelcolor=INK)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)


def read_metrics(path: Path) -> Metrics:
    """Reads a metrics file: one JSON object with an integer "step" per line.

    Lines of one step are merged, the later one winning: a resumed run repeats what it had lost. Text and
    values that are not finite are left out.

    Raises:
        UserError: unreadable, or a line that is no such object. Only an unfinished last line is passed over:
            the run may be writing it.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read the metrics {path}: {error.strerror}") from error
    metrics: Metrics = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line, parse_int=float)  # float, because an int may be too large for one
            step = record["step"]
            if not (type(step) is float and step.is_integer() and step >= 0):
                raise ValueError("step is not a whole number")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            if number == len(lines):
                break
            raise UserError(
                f'{path}, line {number}: not a JSON object with an integer "step"; delete it'
            ) from error
        metrics.setdefault(int(step), {}).update(
            (key, value) for key, value in record.items() if type(value) is float and math.isfinite(value)
        )
    return dict(sorted(metrics.items()))


def _draw_panel(panel: Axes, metrics: Mapping[str, Sequence[Metrics]], key: str, against: str) -> None:
    quantity = USUAL.get(key, Quantity(title=key.replace("_", " "), axis=key))
    curves = [
        (*_series(run, key, against), colour, style)
        for arm, colour in zip(metrics.values(), cycle(COLOURS), strict=False)  # a cycle has no end
        for run, style in zip(arm, cycle(LINE_STYLES), strict=False)  # nor has this one
    ]
    for x, y, colour, style in curves:
        shown = _running_mean(y) if quantity.noisy else y
        marker = "o" if len(x) <= 20 else ""
        panel.plot(x, quantity.scale * shown, color=colour, linestyle=style, marker=marker, markersize=3.5)
    if quantity.noisy:
        limits = panel.get_ylim()  # the running means set the scale, single outliers do not
        for x, y, colour, _ in curves:
            panel.plot(x, quantity.scale * y, color=colour, linewidth=0.6, alpha=0.25, zorder=1)
        panel.set_ylim(limits)

    panel.set_title(quantity.title, loc="left", fontsize=11, fontweight="bold", color=INK)
    panel.set_xlabel(AXES.get(against, against), color=FAINT)
    panel.set_ylabel(quantity.axis, color=FAINT)
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panel.yaxis.set_major_formatter("{x:.4g}")
    panel.tick_params(colors=FAINT, labelsize=9)
    panel.grid(color="#d8dee4", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color("#afb8c1")


def _series(run: Metrics, key: str, against: str) -> tuple[Series, Series]:
    known = [(step, values[against]) for step, values in run.items() if against in values]
    points = [(step, values[key]) for step, values in run.items() if key in values]
    if not known or not points:
        return np.empty(0), np.empty(0)
    steps, y = np.array(points, dtype=np.float64).T
    return np.interp(steps, *np.array(known, dtype=np.float64).T), y


def _running_mean(values: Series) -> Series:
    """Mean over a fiftieth of the curve around each point, over fewer where the curve ends."""
    reach = len(values) // 100
    sums = np.concatenate([[0.0], np.cumsum(values)])
    start = np.maximum(np.arange(len(values)) - reach, 0)
    stop = np.minimum(np.arange(len(values)) + reach + 1, len(values))
    means: Series = (sums[stop] - sums[start]) / (stop - start)
    return means
