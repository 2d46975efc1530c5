"""What a classifier says of images, and how far it is to be believed."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import max_pool2d

from itpn.errors import printable
from itpn.show.curves import COLOURS
from itpn.show.sheet import FAINT, INK, PAPER, fit, grid, image_of, write

MOST_NAMED = 40
"""Classes that have room for their names beside the matrix."""
MOST_WRITTEN = 20
"""Classes that have room for numbers in the matrix."""
NUM_PAIRS = 12
"""Pairs of classes listed as confused."""
LINE, EMPTY, BEST, OTHER = "#afb8c1", "#eff2f5", "#a9d1ff", "#d8e0e8"
SHARES = LinearSegmentedColormap.from_list("shares", [PAPER, "#a9d1ff", COLOURS[0], "#0a3069"])
MOST_CELLS = 250
"""Cells per side of the matrix; of more classes, neighbours share one."""
LONGEST = 24
"""Characters of a class name that are shown in the matrix."""
ROW, BAR, PERCENT = 24, 20, 52
"""Pixels from one bar below an image to the next, of the bar, and of the number in it."""


def confusion_picture(confusion: Tensor, reliability: Tensor, class_names: Sequence[str], out: Path) -> None:
    """Draws the confusion matrix, the classes' accuracies, the calibration, and the pairs most confused.

    Args:
        confusion: images by true (rows) and predicted class: long `[classes, classes]`.
        reliability: per bin of confidence, number of images, mean confidence and accuracy: `[bins, 3]`.
        out: picture to write; its ending chooses the format.
    """
    num_classes = len(class_names)
    if not num_classes or confusion.shape != (num_classes, num_classes):
        raise ValueError(f"a confusion matrix {list(confusion.shape)} for {num_classes} classes")
    names = [_short(name) for name in class_names]
    side = max(3.2, 0.32 * min(num_classes, 22)) if num_classes <= MOST_NAMED else 7.5
    figure = Figure(dpi=150)

    def panel(left: float, top: float, width: float, height: float) -> Axes:
        """In inches. What is written around the panels makes the paper larger."""
        W, H = figure.get_size_inches()
        return figure.add_axes((left / W, -(top + height) / H, width / W, height / H))

    matrix, bars = panel(0, 0, side, side), panel(side + 0.2, 0, 1.4, side)
    right = side + 2.6
    _draw_matrix(matrix, bars, confusion, names)
    _draw_calibration(panel(right, 0, 3, 3), reliability)
    pairs = _confused(confusion, names)
    _list_pairs(panel(right, 3.9, 3, 0.21 * max(1, len(pairs))), pairs)
    if num_classes > MOST_WRITTEN:
        scale = panel(right, 6.9, 3, 0.15)
        ticks = [0, 0.05, 0.2, 0.5, 1]
        bar = figure.colorbar(matrix.images[0], scale, orientation="horizontal", ticks=ticks)
        bar.outline.set_edgecolor(LINE)
        scale.xaxis.set_major_formatter(PercentFormatter(1))
        _dress(scale, "", "colours of the matrix", "")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, bbox_inches="tight", pad_inches=0.2)


def prediction_picture(
    images: Tensor,
    labels: Sequence[Sequence[str]],
    scores: Sequence[Sequence[float]],
    captions: Sequence[str] = (),
    *,
    columns: int = 6,
    cell: int = 224,
) -> Image.Image:
    """Each image above bars of its best classes.

    Args:
        images: float `[B, C, H, W]` in 0..1.
        labels, scores: per image the names of its best classes and their probabilities, the best first.
        captions: one per image, written below.

    Raises:
        ValueError: there are no images, or not as many labels, scores and captions.
    """
    if not len(images) or {len(labels), len(scores), len(captions or images)} != {len(images)}:
        raise ValueError(f"{len(images)} images, {len(labels)} labels, {len(scores)} scores")
    cards = [
        _card(fit(image_of(pixels), cell), names, shares)
        for pixels, names, shares in zip(images, labels, scores, strict=True)
    ]
    starts = range(0, len(cards), columns)
    rows = [cards[start : start + columns] for start in starts]
    slots = len(rows[0])
    texts = [*captions, *[""] * (-len(captions) % slots)]  # a last row that is not full keeps its slots
    return grid(rows, captions=[texts[start : start + slots] for start in starts] if captions else ())


def _card(image: Image.Image, names: Sequence[str], shares: Sequence[float]) -> Image.Image:
    width = max(image.size)  # of a narrow image too: its bars need room
    card = Image.new("RGB", (width, image.height + ROW * len(names)), PAPER)
    card.paste(image, ((width - image.width) // 2, 0))
    draw = ImageDraw.Draw(card)
    for i, (name, share) in enumerate(zip(names, shares, strict=True)):
        top = image.height + ROW * (i + 1) - BAR
        for length, colour in ((width, EMPTY), (round(width * share), OTHER if i else BEST)):
            if length:
                draw.rectangle((0, top, length - 1, top + BAR - 1), fill=colour)
        write(draw, (6, top + 3), name, width - PERCENT - 12, colour=INK)
        write(draw, (width - 6, top + 3), f"{100 * share:.1f} %", PERCENT, colour=INK, anchor="ra")
    return card


def _draw_matrix(matrix: Axes, bars: Axes, confusion: Tensor, names: Sequence[str]) -> None:
    """Rows in shares of their images; beside each a bar for the share that is right."""
    num_classes, totals = len(names), confusion.sum(1)
    shares = confusion.double() / totals.clamp(min=1)[:, None]
    block = -(-num_classes // MOST_CELLS)
    shown = max_pool2d(shares[None], block, ceil_mode=True)[0]
    end = block * len(shown) - 0.5
    extent = (-0.5, end, end, -0.5)
    matrix.imshow(shown.numpy(), SHARES, norm=PowerNorm(0.5, 0, 1), interpolation="none", extent=extent)
    matrix.set(xlim=(-0.5, num_classes - 0.5), ylim=(num_classes - 0.5, -0.5))
    accuracies = 100 * shares.diagonal().numpy()
    bars.set(xlim=(0, 100), xticks=(0, 50, 100), ylim=matrix.get_ylim(), yticks=())
    bars.xaxis.set_major_formatter("{x:g}%")
    if num_classes <= MOST_NAMED:
        bars.barh(range(num_classes), accuracies, color=COLOURS[0])
        matrix.set_xticks(range(num_classes), names, rotation=90)
        matrix.set_yticks(range(num_classes), names)
        for row in (totals == 0).nonzero().flatten().tolist():
            bars.text(3, row, "no image", color=FAINT, size=8, va="center")
    else:
        edges = np.arange(num_classes + 1) - 0.5
        bars.stairs(accuracies, edges, orientation="horizontal", fill=True, color=COLOURS[0])
    if num_classes <= MOST_WRITTEN:
        for row, column in shares.round(decimals=2).nonzero().tolist():
            share = float(shares[row, column])
            colour = PAPER if share > 0.25 else INK
            matrix.text(column, row, f"{100 * share:.0f}", color=colour, size=8, ha="center", va="center")
    of_blocks = f"; of {block} x {block} classes the largest" if block > 1 else ""
    _dress(matrix, f"confusion, in % of the true class{of_blocks}", "predicted class", "true class")
    _dress(bars, "accuracy", "", "")


def _draw_calibration(panel: Axes, reliability: Tensor) -> None:
    """Accuracy against confidence; a bar's strength is its share of the images."""
    counts, confidence, accuracy = reliability.double().unbind(1)
    shares = counts / counts.sum().clamp(min=1)
    error = float((shares * (confidence - accuracy).abs()).sum())
    width = 1 / len(counts)
    for i, share in enumerate(shares.tolist()):
        if share:
            alpha = 0.25 + 0.75 * share / float(shares.max())
            panel.bar(i * width, float(accuracy[i]), width, align="edge", color=COLOURS[0], alpha=alpha)
    panel.plot([0, 1], [0, 1], color=COLOURS[1], linewidth=1.2, linestyle=(0, (5, 2)))
    panel.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    panel.xaxis.set_major_formatter(PercentFormatter(1))
    panel.yaxis.set_major_formatter(PercentFormatter(1))
    _dress(panel, f"calibration error {error:.1%}", "confidence (darker: more images)", "accuracy")


def _confused(confusion: Tensor, names: Sequence[str]) -> list[tuple[int, str]]:
    """The pairs of classes most often confused: how many images, and what for what."""
    wrong = confusion - confusion.diagonal().diag()
    counts, places = wrong.flatten().topk(min(NUM_PAIRS, wrong.numel()))
    found = zip(counts.tolist(), places.tolist(), strict=True)
    pairs = [(count, *divmod(place, len(names))) for count, place in found if count]
    return [(count, f"{names[true]} → {names[predicted]}") for count, true, predicted in pairs]


def _list_pairs(panel: Axes, pairs: Sequence[tuple[int, str]]) -> None:
    panel.set_axis_off()
    panel.set(ylim=(max(1, len(pairs)), 0))
    for line, (count, text) in enumerate(pairs):
        panel.text(0, line + 0.5, f"{count:,}", color=FAINT, size=9, va="center")
        panel.text(0.12, line + 0.5, text, color=INK, size=9, va="center")
    if not pairs:
        panel.text(0, 0.5, "no image is taken for another class", color=FAINT, size=9, va="center")
    _dress(panel, "most often confused, true → predicted", "", "")


def _dress(panel: Axes, title: str, x: str, y: str) -> None:
    """The look of the curves."""
    panel.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    panel.set_xlabel(x, color=FAINT)
    panel.set_ylabel(y, color=FAINT)
    panel.tick_params(colors=FAINT, labelsize=9)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(LINE)


def _short(name: str) -> str:
    """On one line, at most `LONGEST` characters, and no formula to matplotlib."""
    text = " ".join(printable(name).split())
    return (text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…").replace("$", r"\$")
