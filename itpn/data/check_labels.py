"""Labelled images looked through before training: which cannot be used, and how much there is of what."""

import io
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image

from itpn.data.check import LabelLook, Look, Tally, look, sampled
from itpn.data.check_objects import ObjectTally
from itpn.data.class_counts import ClassCounts
from itpn.data.coco import Coco
from itpn.data.labelled import LabelledImages
from itpn.data.labels import CONVERT, MAX_CLASSES, read_stored
from itpn.data.picture import FORMATS, BadImageError, Size, orientation
from itpn.data.progress import watched
from itpn.data.randomness import permutation
from itpn.data.source import Images
from itpn.errors import UserError, printable

NUM_LABELS = 512
"""How many label pictures are looked through for the classes before training."""
MOST_NUMBERS = 32
"""Numbers up to which they may be classes that nobody has named."""


class LabelTally(Tally):
    """What is known of the pairs of one split so far."""

    def __init__(self, images: LabelledImages) -> None:
        super().__init__(images)
        self.labelling, self.unpaired = images.labelling, images.unpaired
        self.classes = ClassCounts(images)
        self.look = partial(look_at_pair, images)
        self._colours: dict[int, tuple[bytes, Path]] = {}
        self._clash = ""
        self._turned: dict[bool, list[int]] = {True: [], False: []}

    def add(self, index: int, found: Look | str) -> None:
        super().add(index, found)
        if isinstance(found, Look) and found.labels is not None:
            path = self.classes.images.label_path(index)
            self.classes.add(path, found.labels)
            for number, colour in found.labels.colours.items():
                before, first = self._colours.setdefault(number, (colour, path))
                if before != colour and not self._clash:
                    self._clash = f"{number} is #{before.hex()} in {first} and #{colour.hex()} in {path}"
            if found.labels.turned is not None:
                self._turned[found.labels.turned].append(index)

    def warnings(self) -> Iterator[str]:
        yield from super().warnings()
        if self.labelling.num_classes < MAX_CLASSES:
            yield from self.classes.warnings()
        if self._clash:
            yield (
                f"the palettes of label pictures differ: {self._clash}; the numbers are read, not the "
                f"colours; if the colours are the classes, {CONVERT}"
            )
        if self._turned[False] and not self._turned[True]:
            yield (
                f"{len(self._turned[False]):,} images are turned by EXIF, as "
                f"{self.images.name(self._turned[False][0])}, and nothing tells whether their labels are; "
                "compare them, and store images and labels upright"
            )


def tally_of(images: Images) -> Tally:
    """An empty tally of the kind that the images need."""
    if isinstance(images, Coco):
        return ObjectTally(images)
    return LabelTally(images) if isinstance(images, LabelledImages) else Tally(images)


def warnings_of(images: Images) -> list[str]:
    """Silent faults, as far as a few images show them."""
    tally = sampled(tally_of(images))
    if isinstance(tally, LabelTally):
        tally.classes = classes_met(tally.classes.images)
    return [*tally.warnings()]


def check_classes(images: LabelledImages) -> None:
    """Raises UserError where all labels are of one class, so that there is nothing to learn."""
    found = classes_met(images)
    if found.num_pictures and len(found.met) < 2:
        raise UserError(found.too_few())


@lru_cache(maxsize=4)
def classes_met(images: LabelledImages) -> ClassCounts:
    """Looks through label pictures until every class is met, at 512 of them at most; at more while there is
    one class only."""
    found = ClassCounts(images)
    order = permutation(0, 0, len(images)).tolist()
    for number, index in enumerate(watched(order, "looking for the classes")):
        lacking = found.num_pictures and len(found.met) < 2
        if len(found.met) == images.labelling.num_classes > 1 or (number >= NUM_LABELS and not lacking):
            break
        with suppress(BadImageError):  # which training itself tells of
            found.add(images.label_path(index), look_at_labels(images, index))
    return found


def look_at_pair(images: LabelledImages, index: int) -> Look | str:
    """What a usable pair is like, or why it is none."""
    found = look(images, index)
    if isinstance(found, str):
        return found
    try:
        labels = look_at_labels(images, index, (found.height, found.width))
        if "turned by EXIF" in found.traits:
            labels = labels._replace(turned=_tells(images.read(index)))
    except BadImageError as error:
        return images.blaming(index, error).reason
    return found._replace(labels=labels)


def look_at_labels(images: LabelledImages, index: int, size: Size | None = None) -> LabelLook:
    """Look at an image's labels; raises BadImageError."""
    labelling = images.labelling
    stored = read_stored(images.label_path(index), labelling, size)
    counts = np.bincount(stored.ids.ravel(), minlength=labelling.unlabelled + 1)
    classes = counts[: labelling.num_classes].nonzero()[0]
    numbers = np.bincount(stored.numbers.ravel()).nonzero()[0].tolist()
    return LabelLook(
        classes,
        counts[classes],
        int(counts[labelling.unlabelled]),
        tuple(number for number in numbers if number in labelling.ignored),
        {number: stored.palette[3 * number : 3 * number + 3] for number in numbers if stored.palette},
    )


def _tells(data: bytes) -> bool:
    """Whether an image that EXIF turns has another size then."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        return image.width != image.height and (orientation(image) or 1) >= 5


def summary(tally: LabelTally) -> Iterator[str]:
    """What the labels are like, in lines to print."""
    names, counts = tally.labelling.class_names, tally.classes.pixels
    total, found = counts.sum(), tally.classes.met
    if len(names) == MAX_CLASSES:
        yield f"the number of classes is not known; the labels found are {_ranges(found)}"
        yield _how_to_name(found)
    if num_pixels := total + tally.classes.num_unlabelled:
        yield f"{total / num_pixels:.2%} of {num_pixels:,} pixels have a label; of these"
    width = max((len(printable(names[i])) for i in found), default=0)
    for i in found:
        yield (
            f"  {printable(names[i]):{width}}  {counts[i]:>13,} pixels  {counts[i] / total:>7.2%}  "
            f"in {tally.classes.occurrences[i]:,} images"
        )


def _how_to_name(numbers: Sequence[int]) -> str:
    """What to do where nothing says which numbers are classes."""
    if len(numbers) > MOST_NUMBERS:
        return f"if edges were smoothed or JPEG was used on the way, {CONVERT}"
    usual = f"give --data.values {' '.join(map(str, numbers))}"
    return f"if they all are classes, {usual}; or name those that are, one a line, in classes.txt"


def _ranges(numbers: Sequence[int]) -> str:
    """0 to 3, 7, 255"""
    known = set(numbers)
    starts = [n for n in numbers if n - 1 not in known]
    ends = [n for n in numbers if n + 1 not in known]
    return ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in zip(starts, ends, strict=True))
