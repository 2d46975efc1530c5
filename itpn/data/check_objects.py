"""What a data set's annotations are like, in lines to print."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from itpn.data.check import Tally
from itpn.data.coco import OTHER_SIZE, Coco, Finding
from itpn.data.folders import some
from itpn.errors import printable

SMALL, MEDIUM = 32**2, 96**2
"""Areas in pixels at which COCO's small objects end and its large ones begin."""


class ObjectTally(Tally):
    """Tally of one split's images with objects."""

    def __init__(self, images: Coco) -> None:
        super().__init__(images)
        self.coco = images

    def warnings(self) -> Iterator[str]:
        yield from super().warnings()
        counts = np.bincount(
            self.coco.objects.labels[~self.coco.objects.crowd], minlength=len(self.coco.categories)
        )
        unseen = [self.coco.categories[label].name for label in np.flatnonzero(counts == 0)]
        if unseen:
            yield (
                f"{len(unseen):,} of {len(counts):,} classes have no object here: {some(unseen)}; annotate "
                "some, or remove the classes from 'categories'"
            )
        other = [index for index, reason in self.bad.items() if OTHER_SIZE in reason]
        if len(other) > (len(self.bad) + self.num_read) / 2:
            yield (
                f"{len(other):,} of {len(self.bad) + self.num_read:,} images have another size than "
                f"{self.coco.file} says, such as {self.coco.names[other[0]]}: {self.bad[other[0]]}; if they "
                "were scaled or turned, take those that were annotated; if not, correct width and height"
            )


def described(finding: Finding) -> str:
    """In one line."""
    return f"{finding.where}: {finding.reason}; {'left out' if finding.left_out else 'kept'}"


def summary(coco: Coco) -> Iterator[str]:
    objects = coco.objects
    single = ~objects.crowd
    yield f"{int(single.sum()):,} objects and {int(objects.crowd.sum()):,} crowds"
    if single.any():
        counts = objects.counts()
        yield (
            f"objects in an image: median {int(np.median(counts)):,}, at most {counts.max():,}; "
            f"none in {int((counts == 0).sum()):,} images"
        )
        areas = objects.areas[single]
        small, medium = int((areas < SMALL).sum()), int((areas < MEDIUM).sum())
        yield f"small {small:,}, medium {medium - small:,}, large {len(areas) - medium:,}"
        by_class = np.bincount(objects.labels[single], minlength=len(coco.categories))
        (fewest, smallest), *_, (most, largest) = (
            sorted(zip(by_class.tolist(), coco.categories, strict=True)) * 2
        )
        yield (
            f"{len(coco.categories):,} classes of {fewest:,} ({printable(smallest.name)}) "
            f"to {most:,} ({printable(largest.name)}) objects"
        )
        num_masks = int((np.diff(objects.masks.ends, prepend=0)[single] > 0).sum())
        if num_masks < len(areas):
            yield f"without a mask: {len(areas) - num_masks:,}"
    for left_out, what in (
        (True, "annotations cannot be used and are left out"),
        (False, "odd ones are kept"),
    ):
        yield from _alike([finding.reason for finding in coco.findings if finding.left_out == left_out], what)


def _alike(reasons: Sequence[str], what: str) -> Iterator[str]:
    """The most frequent reasons first, numbers and quotations aside."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for reason in reasons:
        kinds[re.sub(r"-?\d[\d,.e+-]*|'[^']*'?|\[[^\]]*\]?", "…", reason)].append(reason)
    if kinds:
        yield f"{len(reasons):,} {what}:"
    for kind, alike in sorted(kinds.items(), key=lambda item: -len(item[1])):
        yield f"  {len(alike):,} {printable(alike[0] if len({*alike}) == 1 else kind)}"
