"""Which classes occur in label pictures, how often, and what it means if some do not."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from itpn.data.check import LabelLook
from itpn.data.labelled import LabelledImages


class ClassCounts:
    """The classes in the label pictures that were looked at so far."""

    def __init__(self, images: LabelledImages) -> None:
        self.images, self.labelling = images, images.labelling
        self.num_pictures = 0
        self.pixels = np.zeros(images.labelling.num_classes, np.int64)
        """Pixels of each class."""
        self.occurrences = np.zeros_like(self.pixels)
        """Pictures that each class occurs in."""
        self.num_unlabelled = 0
        """Pixels without a label."""
        self.ignored: dict[int, Path] = {}
        """The numbers that are stored for these, and a picture with it."""

    def add(self, path: Path, found: LabelLook) -> None:
        self.num_pictures += 1
        self.num_unlabelled += found.num_unlabelled
        self.pixels[found.classes] += found.pixels
        self.occurrences[found.classes] += 1
        for number in found.ignored:
            self.ignored.setdefault(number, path)

    @property
    def met(self) -> list[int]:
        """Ids of the classes that occur."""
        return [int(label) for label in self.pixels.nonzero()[0]]

    def warnings(self) -> Iterator[str]:
        """Classes that never occur, a line; nothing where other pictures may still have them."""
        if self.num_pictures and len(self.met) < 2:
            yield self.too_few()
        elif self.num_pictures == len(self.images) and len(self.met) < self.labelling.num_classes:
            names = self.labelling.class_names
            absent = [name for name, pixels in zip(names, self.pixels, strict=True) if not pixels]
            some = ", ".join(absent[:5]) + ", …" * (len(absent) > 5)
            fits = len(self.met) + len(self.ignored) == len(names)
            cure = self._cure() if fits and self.ignored else ""
            yield f"{len(absent):,} of {len(names):,} classes never occur: {some}{cure}"

    def too_few(self) -> str:
        """What to say where there are not two classes to tell apart."""
        names = self.labelling.class_names
        found = (
            f"all labels are of one class, {names[self.met[0]]!r}," if self.met else "no pixel has a label"
        )
        where = f"in the {self.num_pictures:,} label pictures under {self.images.label_root}"
        cure = self._cure() or "; add label pictures with the others"
        return f"{found} {where}, and two are needed to tell apart{cure}"

    def _cure(self) -> str:
        """What helps if pixels that are ignored are of a class."""
        if not self.ignored:
            return ""
        path = next(iter(self.ignored.values()))
        share = self.num_unlabelled / (self.num_unlabelled + self.pixels.sum())
        numbers = sorted({*(self.labelling.numbers[label] for label in self.met), *self.ignored})
        give = f"--data.values {' '.join(map(str, numbers))}"
        if len(numbers) == self.labelling.num_classes:
            give = f"give {give}, in the order of the names"
        else:
            give = f"name all classes and give their numbers, as in {give}"
        return (
            f"; {', '.join(map(str, sorted(self.ignored)))} marks no label, for {share:.2%} of the pixels, "
            f"as in {path}: if it is a class, {give}"
        )
