"""Label pictures: a class for every pixel, read from a PNG as it is stored there."""

import io
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from itpn.data.limits import check_coding
from itpn.data.picture import Size, blame, read_file
from itpn.errors import UserError

Labels = NDArray[Any]
"""Class ids [H, W], uint8 or int32; `Labelling.unlabelled` where there is none."""

MAX_CLASSES = (1 << 16) - 1
PNG_START = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
_BIT_DEPTH = 24  # where the header of a PNG has it
_SPREAD = {2: 85, 4: 17}  # Pillow spreads grey values of few bits over 0..255
_MODES = {"1": "uint8", "L": "uint8", "P": "uint8", "I;16": "uint16"}
_ODD = -1


@dataclass(frozen=True)
class Labelling:
    """What the numbers in label pictures mean.

    Attributes:
        class_names: By class id.
        first: The number that class 0 is stored as; the others follow.
        ignored: Numbers that mark a pixel without a label.
    """

    class_names: tuple[str, ...]
    first: int = 0
    ignored: tuple[int, ...] = (255,)

    def __post_init__(self) -> None:
        if not 1 <= self.num_classes <= MAX_CLASSES:
            raise UserError(f"{self.num_classes:,} classes; there can be 1 to {MAX_CLASSES:,}")

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def unlabelled(self) -> int:
        """The id of a pixel without a label: 255, or 65,535 where that could be a class."""
        return 255 if self.num_classes <= 255 else 65_535

    def ids(self, values: NDArray[Any]) -> Labels:
        """Stored numbers [H, W] to class ids.

        Raises:
            ValueError: a number is neither a class nor ignored.
        """
        ids: NDArray[np.int32] = self._table[values]
        if (odd := ids == _ODD).any():
            found = np.unique(values[odd]).tolist()
            some = ", ".join(f"{value:,}" for value in found[:5]) + (", …" if len(found) > 5 else "")
            last = self.first + self.num_classes - 1
            none = ", ".join(map(str, sorted(self.ignored)))
            raise ValueError(
                f"labels {some} are no class: those are {self.first} to {last:,}"
                + (f", and {none} is no label" if none else "")
            )
        return ids.astype(np.uint8) if self.num_classes <= 255 else ids

    @cached_property
    def _table(self) -> NDArray[np.int32]:
        table = np.full(1 << 16, _ODD, np.int32)
        last = min(self.first + self.num_classes, len(table))
        table[self.first : last] = np.arange(last - self.first)
        table[[value for value in self.ignored if value < len(table)]] = self.unlabelled
        return table


def read_labels(path: Path, labelling: Labelling, size: Size | None = None) -> Labels:
    """The class ids of a label picture: a grey PNG of up to 16 bits, or one with a palette.

    A palette's colours are not looked at, EXIF and transparency neither. Nothing is decoded before its header
    is found to be harmless.

    Args:
        size: what the height and width must be.

    Raises:
        BadImageError: it is no such file, or of another size, or has a number that is no class.
    """
    data = read_file(path)
    with blame(path):
        if not data.startswith(PNG_START):
            raise ValueError("labels are read from PNG files, and this is none")
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            check_coding(image)
            if image.mode not in _MODES:
                raise ValueError(
                    f"a PNG of mode {image.mode} holds colours, not labels; store one grey value, or one "
                    "index of a palette, per pixel"
                )
            if size is not None and image.size != size[::-1]:
                (height, width), (across, down) = size, image.size
                raise ValueError(f"{across} x {down} labels for an image of {width} x {height} pixels")
            values = np.array(image).astype(_MODES[image.mode], copy=False)
            if image.mode == "L":
                values = values // _SPREAD.get(data[_BIT_DEPTH], 1)
        return labelling.ids(values)


def label_picture(
    labels: Labels, labelling: Labelling, colours: NDArray[np.uint8] | None = None
) -> Image.Image:
    """Class ids [H, W] as a picture that `read_labels` reads back: of 8 bits if that is enough, else of 16.

    Args:
        colours: [classes, 3] for the palette of a picture of 8 bits; what is ignored is black.

    Raises:
        ValueError: pixels have no label, and there is no number for that.
    """
    ids = labels.astype(np.int64)
    missing = ids >= labelling.num_classes
    if missing.any() and not labelling.ignored:
        raise ValueError("pixels have no label, and no number stands for that")
    values = np.where(missing, max(labelling.ignored, default=0), ids + labelling.first)
    if values.max(initial=0) > 255:
        return Image.fromarray(values.astype(np.uint16))
    image = Image.fromarray(values.astype(np.uint8))
    if colours is not None:
        palette = np.zeros((256, 3), np.uint8)
        known = colours[: 256 - labelling.first]
        palette[labelling.first : labelling.first + len(known)] = known
        palette[[value for value in labelling.ignored if value < 256]] = 0
        image.putpalette(palette.tobytes())
    return image
