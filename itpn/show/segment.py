"""Labels of pixels as colours over the image, with a legend, and beside the truth."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from itpn.data.labels import Labels
from itpn.show.colours import class_colour
from itpn.show.sheet import GAP, MARGIN, PAPER, TEXT_SIZE, TITLE_SIZE, grid, write

Colours = NDArray[np.uint8]
"""[classes, 3]."""

STRENGTH = 0.6
"""How much of an overlay is the class's colour."""
WRONG, RIGHT, UNLABELLED = (214, 39, 40), (205, 210, 216), (255, 255, 255)
SWATCH, LINE, LEGEND_WIDTH = 14, 22, 190
LEAST_TILE = 150
"""Pixels from one column of a picture to the next: its heading needs them."""
HEADINGS = TITLE_SIZE + TEXT_SIZE + 16
"""Height of the headings that `grid` writes."""


def class_colours(num_classes: int) -> Colours:
    return np.array([class_colour(label) for label in range(num_classes)], np.uint8)


def overlay(image: Image.Image, labels: Labels, colours: Colours, strength: float = STRENGTH) -> Image.Image:
    """An RGB image with every pixel tinted in the colour of its class, and a fine line where classes meet.

    Args:
        labels: class ids [H, W]; pixels that are of no class stay as they are.

    Raises:
        ValueError: image and labels are not of one size.
    """
    if image.size != labels.shape[::-1]:
        raise ValueError(f"labels {labels.shape} (height, width) for an image {image.size} (width, height)")
    pixels = np.asarray(image.convert("RGB")).astype(np.float32)
    labelled = labels < len(colours)
    tints = colours[np.where(labelled, labels, 0)].astype(np.float32)
    weight = np.where(labelled, strength, 0.0)[..., None]
    mixed = pixels + (tints - pixels) * weight
    mixed[_borders(labels)] *= 0.4
    return Image.fromarray(mixed.round().astype(np.uint8))


def segmentation_picture(
    image: Image.Image, labels: Labels, names: Sequence[str], caption: str = "", *, cell: int = 640
) -> Image.Image:
    """An image, the same with the classes of its pixels over it, and which colours are which."""
    colours = class_colours(len(names))
    small, ids = _fitted(image, labels, cell)
    width = max(small.width, LEAST_TILE)
    picture = grid(
        [[_widened(tile, width) for tile in (small, overlay(small, ids, colours))]],
        headings=[("image", _size(image)), ("prediction", "")],
        captions=[[caption]] if caption else (),
    )
    return _with_legend(picture, shares_of([labels], len(names)), "shares of the pixels", names, colours)


def comparison_picture(
    images: Sequence[Image.Image],
    truths: Sequence[Labels],
    predictions: Sequence[Labels],
    names: Sequence[str],
    captions: Sequence[str] = (),
    *,
    cell: int = 256,
) -> Image.Image:
    """One row per image: the image, the true classes, the predicted ones, and where these are wrong.

    The legend has the true classes with their shares, then those that are predicted alone.

    Raises:
        ValueError: there are not as many of each, or their sizes differ.
    """
    colours = class_colours(len(names))
    headings = [
        ("image", ""),
        ("truth", "untinted where there is no label"),
        ("prediction", ""),
        ("mistakes", "red; white where there is no label"),
    ]
    rows = []
    for i, (image, truth, prediction) in enumerate(zip(images, truths, predictions, strict=True)):
        if truth.shape != prediction.shape:
            raise ValueError(f"{truth.shape} true labels but {prediction.shape} predicted ones")
        small, true = _fitted(image, truth, cell)
        _, predicted = _fitted(image, prediction, cell)
        tinted = [overlay(small, ids, colours) for ids in (true, predicted)]
        row = [small, *tinted, mistakes(true, predicted, len(names))]
        texts = [[captions[i]]] if captions else ()
        rows.append(
            grid([[_widened(tile, cell) for tile in row]], headings=() if i else headings, captions=texts)
        )
    shares = dict(shares_of(truths, len(names)))
    shares |= {label: 0.0 for label, _ in shares_of(predictions, len(names)) if label not in shares}
    return _with_legend(_stacked(rows), [*shares.items()], "shares in the truth", names, colours)


def mistakes(truth: Labels, prediction: Labels, num_classes: int) -> Image.Image:
    """Red where a labelled pixel is wrong, grey where it is right, white where there is no label."""
    kinds = np.where(truth < num_classes, (truth == prediction) + 1, 0)
    return Image.fromarray(np.array([UNLABELLED, WRONG, RIGHT], np.uint8)[kinds])


def legend(
    shares: Sequence[tuple[int, float]], heading: str, names: Sequence[str], colours: Colours, height: int
) -> Image.Image:
    """Classes with their colours and shares, in as many columns as the height asks for.

    Args:
        shares: class ids, in the order in which they are shown, and shares.
        heading: says what these are shares of.
        height: of the picture with headings that it goes beside.
    """
    top = MARGIN + HEADINGS
    rows = max(1, (height - top - MARGIN) // LINE)
    columns = max(1, -(-len(shares) // rows))
    paper = Image.new("RGB", (columns * LEGEND_WIDTH, height), PAPER)
    draw = ImageDraw.Draw(paper)
    write(draw, (0, MARGIN), "classes", LEGEND_WIDTH, bold=True)
    write(draw, (0, MARGIN + TITLE_SIZE + 5), heading, LEGEND_WIDTH)
    for place, (label, share) in enumerate(shares):
        x, y = place // rows * LEGEND_WIDTH, top + place % rows * LINE
        draw.rectangle((x, y, x + SWATCH, y + SWATCH), fill=tuple(colours[label].tolist()))
        write(draw, (x + SWATCH + GAP, y), names[label], LEGEND_WIDTH - SWATCH - 70)
        write(draw, (x + LEGEND_WIDTH - MARGIN, y), f"{share:.1%}", 60, anchor="ra")
    return paper


def shares_of(pictures: Iterable[Labels], num_classes: int) -> list[tuple[int, float]]:
    """The classes that occur, with their shares of all labelled pixels, most frequent first."""
    counts = np.zeros(num_classes, np.int64)
    for labels in pictures:
        counts += np.bincount(labels[labels < num_classes].ravel(), minlength=num_classes)
    order = np.argsort(-counts, kind="stable")
    return [(int(label), float(counts[label] / counts.sum())) for label in order if counts[label]]


def _with_legend(
    picture: Image.Image,
    shares: Sequence[tuple[int, float]],
    heading: str,
    names: Sequence[str],
    colours: Colours,
) -> Image.Image:
    key = legend(shares, heading, names, colours, picture.height)
    paper = Image.new("RGB", (picture.width + key.width, picture.height), PAPER)
    paper.paste(picture, (0, 0))
    paper.paste(key, (picture.width, 0))
    return paper


def _stacked(pictures: Sequence[Image.Image]) -> Image.Image:
    """One above the other, each one's upper margin under the one above."""
    pitches = [picture.height - 2 * MARGIN + GAP for picture in pictures]
    height = sum(pitches) + 2 * MARGIN - GAP
    paper = Image.new("RGB", (max(picture.width for picture in pictures), height), PAPER)
    for i in reversed(range(len(pictures))):
        width, height = pictures[i].size
        paper.paste(pictures[i].crop((0, 0, width, height - MARGIN)), (0, sum(pitches[:i])))
    return paper


def _fitted(image: Image.Image, labels: Labels, cell: int) -> tuple[Image.Image, Labels]:
    """Both with the longer side at `cell` pixels; a label is the nearest one."""
    scale = cell / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    ids = Image.fromarray(labels.astype(np.int32)).resize(size, Image.Resampling.NEAREST)
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS), np.asarray(ids)


def _widened(image: Image.Image, width: int) -> Image.Image:
    """On white paper of a width, so that columns stay below one another."""
    paper = Image.new("RGB", (width, image.height), PAPER)
    paper.paste(image, (0, 0))
    return paper


def _borders(labels: Labels) -> NDArray[np.bool_]:
    """Pixels whose right or lower neighbour is of another class."""
    borders = np.zeros(labels.shape, bool)
    borders[:, :-1] |= labels[:, 1:] != labels[:, :-1]
    borders[:-1] |= labels[1:] != labels[:-1]
    return borders


def _size(image: Image.Image) -> str:
    return f"{image.width} x {image.height} pixels"
