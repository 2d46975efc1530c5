"""Objects drawn on their image, and those found beside those that are there."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from itpn.data.coco import Coco
from itpn.data.masks import drawn, runs_of_text
from itpn.show.colours import Colour, class_colour
from itpn.show.sheet import INK, PAPER, font, grid, shortened

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2."""

SIDES = (480, 1280)
"""A picture's longer side is made at least and at most so many pixels, so that labels can be read."""
STRENGTH = 0.4
"""How much of a mask is the colour of its class."""

NAME_WIDTH = 0.5
"""Of a picture's width; a longer name is cut off where its box is not wider."""
NARROW = 9
"""A label may be as wide as so many letters are high, and letters are made smaller for it."""


class Shown(NamedTuple):
    """An object in an image, in its pixels."""

    box: Box
    label: int
    name: str
    score: float | None = None
    """In 0..1; None for what is known to be there."""
    mask: NDArray[np.bool_] | None = None
    """[H, W]"""


def annotated(coco: Coco, index: int) -> list[Shown]:
    """What an image's annotations say."""
    objects, size = coco.objects, coco.size(index)
    shown = []
    for number in objects.of(index):
        label, outline = int(objects.labels[number]), objects.outline(number)
        x, y, width, height = objects.boxes[number].tolist()
        name = coco.categories[label].name + " (crowd)" * bool(objects.crowd[number])
        mask = None if outline is None else drawn(outline, size)
        shown.append(Shown((x, y, x + width, y + height), label, name, mask=mask))
    return shown


def detected(coco: Coco, results: Iterable[Mapping[str, Any]], least_score: float = 0.5) -> list[Shown]:
    """What COCO's results say of one image, without what has a lower score."""
    labels = {category.id: label for label, category in enumerate(coco.categories)}
    shown = []
    for result in results:
        if result["score"] >= least_score:
            (x, y, width, height), label = result["bbox"], labels[result["category_id"]]
            runs = result.get("segmentation")
            mask = None if runs is None else drawn(runs_of_text(runs["counts"].encode()), tuple(runs["size"]))
            name = coco.categories[label].name
            shown.append(Shown((x, y, x + width, y + height), label, name, result["score"], mask))
    return shown


def objects_picture(image: Image.Image, objects: Sequence[Shown]) -> Image.Image:
    """The image with masks, boxes and names in the colours of the classes.

    Small images are enlarged and large ones made smaller. Of objects that overlap the smaller one lies above,
    and of labels that would the better one takes the place.
    """
    scale = min(max(1.0, SIDES[0] / max(image.size)), SIDES[1] / max(image.size))
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    canvas = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    line = max(2, round(max(size) / 400))
    placed = [_scaled(shown, size, image.size) for shown in objects]
    placed.sort(key=lambda shown: -_area(shown.box))
    for shown in placed:
        if shown.mask is not None:
            _lay(canvas, shown.mask, class_colour(shown.label), line)
    draw = ImageDraw.Draw(canvas)
    for shown in placed:
        x1, y1, x2, y2 = _inside(shown.box, size)
        draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=INK)
        draw.rectangle((x1, y1, x2, y2), outline=class_colour(shown.label), width=line)
    placed.sort(key=lambda shown: -1.0 if shown.score is None else -shown.score)
    taken: list[Box] = []
    for shown in placed:
        taken.append(_label(draw, shown, size, line, taken))
    return canvas


def comparison_picture(
    images: Sequence[Image.Image],
    truth: Sequence[Sequence[Shown]],
    found: Sequence[Sequence[Shown]],
    captions: Sequence[str] = (),
    *,
    note: str = "",
) -> Image.Image:
    """A row for each image: what is there, and what was found.

    Args:
        captions: One for each image, below its row.
        note: Below the heading of what was found, such as the least score that is shown.
    """
    if not images or not len(images) == len(truth) == len(found) == len(captions or images):
        raise ValueError(
            f"{len(images)} images with {len(truth)} truths and {len(found)} lists of objects found"
        )
    rows = [
        [objects_picture(image, objects) for objects in (there, seen)]
        for image, there, seen in zip(images, truth, found, strict=True)
    ]
    headings = [("annotated", ""), ("found", note)]
    return grid(rows, headings=headings, captions=[[text] for text in captions])


class _Drawn(NamedTuple):
    box: Box
    label: int
    name: str
    score: float | None
    mask: Image.Image | None


def _scaled(shown: Shown, size: tuple[int, int], original: tuple[int, int]) -> _Drawn:
    across, down = size[0] / original[0], size[1] / original[1]
    x1, y1, x2, y2 = shown.box
    mask = None
    if shown.mask is not None:
        pixels = Image.fromarray(shown.mask.astype(np.uint8) * 255)
        mask = pixels.resize(size, Image.Resampling.BILINEAR).point(lambda value: 255 * (value > 127))
    # File names and class names may hold line breaks and bytes that are no text.
    name = " ".join(shown.name.encode(errors="replace").decode().split())
    return _Drawn((x1 * across, y1 * down, x2 * across, y2 * down), shown.label, name, shown.score, mask)


def _lay(canvas: Image.Image, mask: Image.Image, colour: Colour, line: int) -> None:
    """Tints a mask and draws its rim."""
    tint = Image.new("RGB", canvas.size, colour)
    rim = ImageChops.subtract(mask, mask.filter(ImageFilter.MinFilter(2 * (line // 2) + 1)))
    canvas.paste(tint, mask=mask.point(lambda value: round(STRENGTH * value)))
    canvas.paste(tint, mask=rim)


def _label(
    draw: ImageDraw.ImageDraw, shown: _Drawn, size: tuple[int, int], line: int, taken: Sequence[Box]
) -> Box:
    """Writes the name where no other one is, at a corner of the box, inside or outside; returns the place."""
    face = font(True, max(11, min(round(max(size) / 48), size[0] // NARROW)))
    x1, y1, x2, y2 = _inside(shown.box, size)
    score = "" if shown.score is None else f" {shown.score:.2f}"
    room = min(max(x2 - x1, NAME_WIDTH * size[0], NARROW * face.size), size[0])
    text = shortened(shown.name, face, room - face.getlength(score) - 3 * line) + score
    width, height = face.getlength(text) + 3 * line, face.size + 2.0 * line
    lefts, tops = (x1, x2 - width, x1 - width, x2), (y1 - height, y1, y2, y2 - height)
    corners = [(left, top) for left in lefts for top in tops]
    places = []
    for left, top in corners:
        left, top = min(max(0.0, left), size[0] - width), min(max(0.0, top), size[1] - height)
        places.append((left, top, left + width, top + height))
    place = min(places, key=lambda place: sum(_common(place, other) for other in taken))
    colour = class_colour(shown.label)
    draw.rectangle(place, fill=colour)
    ink = INK if 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140 else PAPER
    middle = (place[0] + 1.5 * line, (place[1] + place[3]) / 2)
    draw.text(middle, text, fill=ink, font=face, anchor="lm")
    return place


def _inside(box: Box, size: tuple[int, int]) -> Box:
    """So that the box's line is inside the picture, too, and is not inside out."""
    x1, y1 = (min(max(0.0, low), most - 1.0) for low, most in zip(box[:2], size, strict=True))
    x2, y2 = (
        min(max(low, high - 1), most - 1.0) for low, high, most in zip((x1, y1), box[2:], size, strict=True)
    )
    return x1, y1, x2, y2


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _common(one: Box, other: Box) -> float:
    across, down = (max(0.0, min(one[i + 2], other[i + 2]) - max(one[i], other[i])) for i in (0, 1))
    return across * down
