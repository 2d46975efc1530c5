"""What loaders, k-NN and pictures see of a data set, whether it lies in folders or in tar shards."""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from itpn.data.picture import Picture

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})


class Names:
    """Millions of file names in one array of bytes, which forked workers share without copying.

    Attributes:
        characters: All names, one after the other, uint8.
        ends: Where each of them ends, int64 [n].
    """

    def __init__(self, names: Sequence[str] = ()) -> None:
        encoded = [os.fsencode(name) for name in names]
        self.characters: NDArray[Any] = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self.ends: NDArray[Any] = np.fromiter(accumulate(map(len, encoded)), np.int64, len(encoded))

    @classmethod
    def packed(cls, characters: NDArray[Any], ends: NDArray[Any]) -> "Names":
        names = cls()
        names.characters, names.ends = characters, ends
        return names

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.characters[start : self.ends[index]].tobytes())


@dataclass(frozen=True, kw_only=True, eq=False)
class Images(ABC):
    """The images of one split, in a fixed order.

    Attributes:
        names: Paths inside the data set, with `/` between folders.
        labels: Class ids, long [n], or None where not every image has one.
        class_names: By class id; None exactly where `labels` is.
        description: One line to print: how many images, and where they were found.
    """

    names: Names
    labels: Tensor | None
    class_names: tuple[str, ...] | None
    description: str

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def name(self, index: int) -> Path:
        """What messages call an image."""

    @abstractmethod
    def open(self, index: int) -> AbstractContextManager[Picture]:
        """Raises BadImageError, as do the methods of the picture."""

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
