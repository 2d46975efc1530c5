"""What loaders, k-NN and pictures see of a data set, whether it lies in folders or in tar shards."""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from itpn.data.picture import Picture, Size
from itpn.data.randomness import generator
from itpn.errors import UserError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})


class Blobs:
    """Millions of short byte strings in one array, which forked workers share without copying.

    Attributes:
        characters: All of them, one after the other, uint8.
        ends: Where each of them ends, int64 [n].
    """

    def __init__(self, blobs: Sequence[bytes] = ()) -> None:
        self.characters: NDArray[Any] = np.frombuffer(b"".join(blobs), dtype=np.uint8)
        self.ends: NDArray[Any] = np.fromiter(accumulate(map(len, blobs)), np.int64, len(blobs))

    def __len__(self) -> int:
        return len(self.ends)

    def blob(self, index: int) -> bytes:
        index = range(len(self))[index]
        start = self.ends[index - 1] if index else 0
        return self.characters[start : self.ends[index]].tobytes()


class Names(Blobs):
    """File names, which may hold bytes that are no text."""

    def __init__(self, names: Sequence[str] = ()) -> None:
        super().__init__([os.fsencode(name) for name in names])

    @classmethod
    def packed(cls, characters: NDArray[Any], ends: NDArray[Any]) -> "Names":
        names = cls()
        names.characters, names.ends = characters, ends
        return names

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self.blob(index))


@dataclass(frozen=True, kw_only=True, eq=False)
class Images(ABC):
    """The images of one split, in a fixed order.

    Attributes:
        names: Paths inside the data set, with `/` between folders.
        labels: Class ids, long [n], or None where not every image has one.
        class_names: By class id; None exactly where `labels` is.
        description: One line to print: how many images, and where they were found.
        notes: What was odd about the files, a line each: a number, an example, the likely cause and a cure.
        unlabelled: Why there are no classes, and what to do; empty where there are.
    """

    names: Names
    labels: Tensor | None
    class_names: tuple[str, ...] | None
    description: str
    notes: tuple[str, ...] = ()
    unlabelled: str = ""

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def name(self, index: int) -> Path:
        """What messages call an image."""

    @abstractmethod
    def open(self, index: int) -> AbstractContextManager[Picture]:
        """Raises BadImageError, as do the methods of the picture."""

    def check_size(self, index: int, size: Size) -> None:
        """Raises BadImageError if the data set says that an image has another size; most say nothing."""
        return

    @abstractmethod
    def read(self, index: int) -> bytes:
        """What the image's file holds; raises BadImageError."""

    @abstractmethod
    def order(self, seed: int, epoch: int) -> Tensor:
        """The order of one training epoch: a permutation of the indices, long [n]."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 in hex of all names in order, labels and class names: another one means other data."""
        digest = sha256(repr((len(self), self.class_names)).encode())
        digest.update(self.names.ends.tobytes())
        digest.update(self.names.characters.tobytes())
        if self.labels is not None:
            digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True, eq=False)
class Subset(Images):
    """Some of the images of a data set, with the same classes.

    Attributes:
        indices: Which they are, int64 [n].
    """

    whole: Images
    indices: NDArray[Any]

    @classmethod
    def of(cls, whole: Images, indices: Tensor, note: str) -> "Subset":
        """Those of `indices`, long [n], each once; `note` says why, in a word or two."""
        found, *clauses = whole.description.partition(";")
        return cls(
            names=Names([whole.names[index] for index in indices.tolist()]),
            labels=None if whole.labels is None else whole.labels[indices],
            class_names=whole.class_names,
            description=f"{len(indices):,} of {found}, {note}{''.join(clauses)}",
            notes=whole.notes,
            unlabelled=whole.unlabelled,
            whole=whole,
            indices=indices.numpy(),
        )

    def name(self, index: int) -> Path:
        return self.whole.name(int(self.indices[index]))

    def open(self, index: int) -> AbstractContextManager[Picture]:
        return self.whole.open(int(self.indices[index]))

    def check_size(self, index: int, size: Size) -> None:
        self.whole.check_size(int(self.indices[index]), size)

    def read(self, index: int) -> bytes:
        return self.whole.read(int(self.indices[index]))

    def order(self, seed: int, epoch: int) -> Tensor:
        """That of the whole without the others, so that shards are read one after the other here too."""
        places = torch.full((len(self.whole),), -1)
        places[self.indices] = torch.arange(len(self))
        order = places[self.whole.order(seed, epoch)]
        return order[order >= 0]

    @property
    def fingerprint(self) -> str:
        return sha256(f"{self.whole.fingerprint} {self.indices.tolist()}".encode()).hexdigest()


def hold_out(images: Images, share: float, seed: int) -> tuple[Subset, Subset]:
    """Splits images into those to train on, which keep the notes, and those to validate on, by the seed.

    A `share` of each class is held out, rounded, but at least one image and not all; of a class with a single
    image none. Images without classes are split as if they were of one.

    Raises:
        UserError: The share is not between 0 and 1, or no class has two images.
    """
    if not 0 < share < 1:
        raise UserError(f"the share of images to hold out is {share}; it lies between 0 and 1")
    labels = torch.zeros(len(images), dtype=torch.long) if images.labels is None else images.labels
    held_out = torch.zeros(len(images), dtype=torch.bool)
    for label in torch.unique(labels).tolist():
        members = (labels == label).nonzero().flatten()
        num = min(max(1, round(share * len(members))), len(members) - 1)
        chosen = torch.randperm(len(members), generator=generator(seed, 0, label, "hold out"))[:num]
        held_out[members[chosen]] = True
    if not held_out.any():
        raise UserError(
            f"none of {images.description} can be held out for validation: no class has two images; add "
            "images, or a validation set"
        )
    return (
        Subset.of(images, (~held_out).nonzero().flatten(), "to train on"),
        replace(Subset.of(images, held_out.nonzero().flatten(), "held out for validation"), notes=()),
    )
