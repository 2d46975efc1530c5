"""Results of the benches of models, and how they are shown."""

from collections.abc import Callable
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Figures:
    config: str
    device: str
    precision: str
    device_batch: int
    image_size: tuple[int, int]
    """Height and width."""
    compiled: bool
    torch: str
    threads: int
    flops_per_image: float
    ceiling: float
    """FLOP/s of 4096-cubed products."""
    ratio: float
    """Share of the ceiling: the median over the steps, each beside the products on either side of it."""
    parts: dict[str, float]
    losses: list[float]
    peak_memory: int | None
    """Bytes after the warm-up, before any baseline; the process's on a CPU, where it is known."""
    baseline_parts: dict[str, float] | None
    baseline_losses: list[float] | None
    speedup: float | None
    """How many times as long the baseline takes: the median over pairs of steps that follow each other."""
    kinds: dict[str, float] | None
    """Seconds by kind of work."""
    baseline: str = "written plainly"
    """Name of the baseline model."""
    notes: list[str] = field(default_factory=list)
    """Further remarks on the step."""

    @property
    def images_per_s(self) -> float:
        return self.device_batch / self.parts["step"]

    @property
    def flops(self) -> float:
        return self.flops_per_image * self.images_per_s

    def as_dict(self) -> dict[str, object]:
        return vars(self) | {"images_per_s": self.images_per_s, "flops": self.flops}


def show(figures: Figures, console: Console) -> None:
    say: Callable[[str], None] = console.print
    say(
        f"{figures.config}: {figures.device_batch} images of {' x '.join(map(str, figures.image_size))}, "
        f"{figures.precision}"
        f"{', compiled' if figures.compiled else ''}, on {figures.device} ({figures.threads} threads), "
        f"torch {figures.torch}"
    )
    columns: list[tuple[str, dict[str, float]]] = [("itpn", figures.parts)]
    if figures.baseline_parts:
        columns.append((figures.baseline, figures.baseline_parts))
    console.print(table("a step, median", columns))
    if figures.kinds:
        console.print(table("one step under the profiler", [("itpn", figures.kinds)]))
    say(
        f"{figures.images_per_s:,.2f} images/s; {figures.flops_per_image / 1e9:.2f} GFLOP per image: "
        f"{figures.flops / 1e12:.3f} TFLOP/s\n"
        f"{figures.ratio:.3f} of the ceiling, {figures.ceiling / 1e12:.3f} TFLOP/s in "
        "4096-cubed matrix products"
    )
    for note in figures.notes:
        say(note)
    if figures.peak_memory:
        say(f"peak memory {figures.peak_memory / 1e9:.2f} GB")
    if figures.baseline_losses and figures.speedup:
        ours, plain = figures.losses[0], figures.baseline_losses[0]
        say(
            f"{figures.speedup:.2f} x the speed of the same model {figures.baseline}, "
            f"whose first loss is {plain:.6f}; ours is {ours:.6f}"
        )


def table(title: str, columns: list[tuple[str, dict[str, float]]]) -> Table:
    """Milliseconds of each part and its share of the column's step."""
    result = Table("part", title=title, title_justify="left")
    for name, _ in columns:
        result.add_column(f"{name}, ms", justify="right")
        result.add_column("share", justify="right")
    for part in columns[0][1]:
        cells = [(1000 * seconds[part], seconds[part] / seconds["step"]) for _, seconds in columns]
        result.add_row(part, *(text for ms, share in cells for text in (f"{ms:,.1f}", f"{share:.1%}")))
    return result
