"""What a model says of images, whatever it says: the options, the images, what cannot be read or written."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated, Literal

import tyro

from itpn.data.images import ImageList, find_all
from itpn.data.picture import BadImageError
from itpn.data.source import Images, Names
from itpn.engine.distributed import DeviceName
from itpn.errors import UserError, printable
from itpn.outputs import is_output

NUM_NAMED = 20
"""Unreadable images that are named."""


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Say what images show, with scores, what is where in them, or what each of their pixels shows; or what
    they are like, as embeddings."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run directory, a .safetensors file of ours, a folder of save_pretrained, or a Hub id."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image files, and folders, of which all images below are taken; but never pictures that itpn wrote."""
    top: int = 5
    """Labels per image, the best first."""
    out: Path | None = None
    """Folder for pictures of the images with their labels, 24 on a sheet: predictions-001.png and so on. Of a
    detector or segmenter a picture for each image, of a segmenter also labels/ with a PNG of class ids; not
    given: predictions/."""
    json: Path | None = None
    """File for a JSON object per image, one a line: path, labels, scores; or a segmenter's shares. Of a
    detector an instances file as COCO's, of the objects found, with scores."""
    min_score: float = 0.5
    """Of a detector: what has a lower score is left out."""
    embeddings: Path | None = None
    """File ending in .npy for the pooled features, [images, channels] in fp32; a .txt beside it has the
    paths, one a line."""
    batch_size: int = 16
    """Images at a time."""
    image_size: tuple[int, int] | None = None
    """Height and width in pixels; what the model was trained for if not given."""
    mode: Literal["slide", "whole"] | None = None
    """Of a segmenter: look at images in windows, or whole. Not given: as it was evaluated."""
    flip: bool = False
    """Of a segmenter: look at each image mirrored, too."""
    device: DeviceName = "auto"
    """Where to compute."""

    def __post_init__(self) -> None:
        if self.top < 1 or self.batch_size < 1 or min(self.image_size or (1,)) < 1:
            raise UserError("--top, --batch-size and --image-size must be 1 or more")
        if not 0 <= self.min_score < 1:
            raise UserError(f"--min-score {self.min_score}: a score lies in [0, 1)")
        if self.embeddings and self.embeddings.suffix != ".npy":
            raise UserError(f"--embeddings {self.embeddings}: name a file that ends in .npy")


def sources_of(given: tuple[Path, ...]) -> list[Images]:
    """Each folder's images, and between them the files that are named one by one. What is found, and that
    pictures which itpn wrote are left out, is said.

    Raises:
        UserError: a folder holds no image, or nothing is left.
    """
    sources: list[Images] = []
    ours = [path for path in given if is_output(path)]
    for is_folder, paths in groupby((path for path in given if path not in ours), Path.is_dir):
        if is_folder:
            found = [images for path in paths for images in find_all(path)]
            print("\n".join(printable(images.description) for images in found))
            sources += found
        else:
            names = Names([str(path) for path in paths])
            description = f"{len(names):,} images"
            sources.append(
                ImageList(root=Path(), names=names, labels=None, class_names=None, description=description)
            )
    if ours and not sources:
        raise UserError(f"itpn wrote {ours[0]} itself; copy it to another folder to use it as an image")
    for path in ours:
        print(f"left out, since itpn wrote it: {printable(path)}")
    return sources


def tell_unreadable(bad: Sequence[BadImageError], num_images: int) -> None:
    """On stderr.

    Raises:
        UserError: none of the images can be read.
    """
    if len(bad) == num_images:
        raise UserError(f"none of {num_images:,} images can be read; the first is {bad[0]}")
    for error in bad[:NUM_NAMED]:
        print(
            f"unreadable image left out: {printable(error.path)}: {printable(error.reason)}", file=sys.stderr
        )
    if bad:
        print(f"{len(bad):,} of {num_images:,} images cannot be read", file=sys.stderr)
