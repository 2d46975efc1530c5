"""Labelled images looked through before training: which cannot be used, and how much there is of what."""

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from itpn.data.check import LabelLook, Look, Tally, look, sampled
from itpn.data.labelled import LabelledImages
from itpn.data.labels import MAX_CLASSES, read_labels
from itpn.data.picture import BadImageError
from itpn.data.source import Images
from itpn.errors import printable


class LabelTally(Tally):
    """What is known of the pairs of one split so far."""

    def __init__(self, images: LabelledImages) -> None:
        super().__init__(images)
        self.labelling, self.unpaired = images.labelling, images.unpaired
        self.num_unlabelled = 0
        """Pixels without a label."""
        self.pixels = np.zeros(images.labelling.num_classes, np.int64)
        """Pixels of each class."""
        self.occurrences = np.zeros_like(self.pixels)
        """Images that each class occurs in."""
        self.look = partial(look_at_pair, images)

    def add(self, index: int, found: Look | str) -> None:
        super().add(index, found)
        if isinstance(found, Look) and found.labels is not None:
            self.num_unlabelled += found.labels.num_unlabelled
            self.pixels[found.labels.classes] += found.labels.pixels
            self.occurrences[found.labels.classes] += 1


def tally_of(images: Images) -> Tally:
    """An empty tally of the kind that the images need."""
    return LabelTally(images) if isinstance(images, LabelledImages) else Tally(images)


def warnings_of(images: Images) -> list[str]:
    """What would go wrong without a word, as far as a few images show."""
    return [*sampled(tally_of(images)).warnings()]


def look_at_pair(images: LabelledImages, index: int) -> Look | str:
    """What a usable pair is like, or why it is none."""
    found = look(images, index)
    if isinstance(found, str):
        return found
    labelling = images.labelling
    try:
        labels = read_labels(images.label_path(index), labelling, (found.height, found.width))
    except BadImageError as error:
        return images.blaming(index, error).reason
    counts = np.bincount(labels.ravel(), minlength=labelling.unlabelled + 1)
    classes = counts[: labelling.num_classes].nonzero()[0]
    return found._replace(labels=LabelLook(classes, counts[classes], int(counts[labelling.unlabelled])))


def summary(tally: LabelTally) -> Iterator[str]:
    """What the labels are like, in lines to print."""
    names, counts = tally.labelling.class_names, tally.pixels
    total, found = counts.sum(), counts.nonzero()[0].tolist()
    if len(names) == MAX_CLASSES:
        yield f"the number of classes is not known; the labels found are {_ranges(found)}"
    if absent := len(names) - len(found) if len(names) < MAX_CLASSES else 0:
        some = [printable(names[i]) for i in range(len(names)) if not counts[i]][:5]
        yield f"{absent:,} of {len(names):,} classes never occur: {', '.join(some)}{', …' * (absent > 5)}"
    if num_pixels := total + tally.num_unlabelled:
        yield f"{total / num_pixels:.2%} of {num_pixels:,} pixels have a label; of these"
    width = max((len(printable(names[i])) for i in found), default=0)
    for i in found:
        yield (
            f"  {printable(names[i]):{width}}  {counts[i]:>13,} pixels  {counts[i] / total:>7.2%}  "
            f"in {tally.occurrences[i]:,} images"
        )


def _ranges(numbers: Sequence[int]) -> str:
    """0 to 3, 7, 255"""
    known = set(numbers)
    starts = [n for n in numbers if n - 1 not in known]
    ends = [n for n in numbers if n + 1 not in known]
    return ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in zip(starts, ends, strict=True))
