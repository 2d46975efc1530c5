"""Pictures in rows and columns on white paper, with headings above and captions below."""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Literal

import matplotlib
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

PAPER, INK, FAINT = "#ffffff", "#1f2328", "#6e7781"
MARGIN, GAP = 20, 10
TITLE_SIZE, TEXT_SIZE = 15, 12


def image_of(pixels: Tensor) -> Image.Image:
    """An 8-bit RGB image of float `[C, H, W]` in 0..1 (clipped; NaN is black).

    Of one or two channels the first is shown as grey, of more than three the first three are shown as colour.
    """
    channels = pixels[:3] if len(pixels) >= 3 else pixels[:1].expand(3, -1, -1)
    scaled = channels.detach().float().cpu().nan_to_num(0).clamp(0, 1) * 255
    return Image.fromarray(scaled.round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


def contact_sheet(
    images: Sequence[Image.Image], captions: Sequence[str] = (), *, columns: int = 8, cell: int = 128
) -> Image.Image:
    """Lays images out in reading order, each fitted into `cell` x `cell` pixels with its caption below."""
    if captions and len(captions) != len(images):
        raise ValueError(f"{len(images)} images but {len(captions)} captions")
    if not images or columns < 1:
        raise ValueError(f"a contact sheet needs images and columns, got {len(images)} and {columns}")
    columns = min(columns, len(images))
    starts = range(0, len(images), columns)
    rows = [[fit(image, cell) for image in images[start : start + columns]] for start in starts]
    texts = [*captions, *[""] * (-len(captions) % columns)]  # a last row that is not full keeps its slots
    return grid(rows, captions=[texts[start : start + columns] for start in starts] if captions else ())


def grid(
    rows: Sequence[Sequence[Image.Image]],
    *,
    headings: Sequence[tuple[str, str]] = (),
    captions: Sequence[Sequence[str]] = (),
) -> Image.Image:
    """Pastes rows of images in cells as wide as the widest of them, each just above its caption.

    Args:
        rows: images as they shall appear; nothing is scaled.
        headings: per column, a name and a fainter note below it.
        captions: per row, texts that share the row's width equally. A text that does not fit ends in "…".
    """
    cell_width = max(image.width for row in rows for image in row)
    heights = [max(image.height for image in row) for row in rows]
    columns = max(len(row) for row in rows)
    width = columns * (cell_width + GAP) - GAP
    top = MARGIN + (TITLE_SIZE + TEXT_SIZE + 16 if headings else 0)
    space = GAP + (TEXT_SIZE + 10 if captions else 0)
    bottoms = [top + end + index * space for index, end in enumerate(accumulate(heights))]
    paper = Image.new("RGB", (width + 2 * MARGIN, bottoms[-1] + space - GAP + MARGIN), PAPER)
    draw = ImageDraw.Draw(paper)

    for column, (name, note) in enumerate(headings):
        x = MARGIN + column * (cell_width + GAP)
        write(draw, (x, MARGIN), name, cell_width, bold=True)
        write(draw, (x, MARGIN + TITLE_SIZE + 5), note, cell_width)
    for index, (row, bottom) in enumerate(zip(rows, bottoms, strict=True)):
        for column, image in enumerate(row):
            x = MARGIN + column * (cell_width + GAP)
            paper.paste(image, (x, bottom - image.height))
        texts = captions[index] if captions else ()
        for slot, text in enumerate(texts):
            share = (width + GAP) // len(texts)
            write(draw, (MARGIN + slot * share, bottom + 4), text, share - GAP)
    return paper


def fit(image: Image.Image, cell: int) -> Image.Image:
    """The image as RGB, as large as fits into a square."""
    scale = cell / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def write(
    draw: ImageDraw.ImageDraw,
    at: tuple[int, int],
    text: str,
    width: int,
    *,
    bold: bool = False,
    colour: str | None = None,
    anchor: Literal["la", "ra"] = "la",
) -> None:
    """Writes text that begins, or with `anchor` "ra" ends, at a point of its upper edge.

    What is wider than `width` ends in "…".
    """
    face = font(bold)
    # File names may hold line breaks and bytes that are no text.
    text = " ".join(text.encode(errors="replace").decode().split())
    shown = shortened(text, face, width)
    draw.text(at, shown, fill=colour or (INK if bold else FAINT), font=face, anchor=anchor)


def shortened(text: str, face: ImageFont.FreeTypeFont, width: float) -> str:
    """The text, or as much of it as fits and "…"."""
    if face.getlength(text) <= width:
        return text
    cuts = (text[:length] + "…" for length in range(min(len(text), int(width))))
    return max((cut for cut in cuts if face.getlength(cut) <= width), key=len, default="")


@cache
def font(bold: bool, size: int | None = None) -> ImageFont.FreeTypeFont:
    """The font that the curves have as well; it ships with matplotlib."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", name)
    return ImageFont.truetype(str(path), size or (TITLE_SIZE if bold else TEXT_SIZE))
