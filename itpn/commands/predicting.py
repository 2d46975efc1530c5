"""What a model says of images, whatever it says: the options, the images, what cannot be read or written."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated, Literal

import tyro

from itpn.data.images import ImageList, find_images
from itpn.data.picture import BadImageError
from itpn.data.source import Images, Names
from itpn.engine.distributed import DeviceName
from itpn.errors import UserError, printable

NUM_NAMED = 20
"""Unreadable images that are named."""


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Say what images show, with scores, what is where in them, or what each of their pixels shows; or what
    they are like, as embeddings."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run directory, a .safetensors file of ours, a folder of save_pretrained, or a Hub id."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image files, and folders of images; of a folder with train and val, val."""
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


def sources_of(given: tuple[Path, ...]) -> Iterator[Images]:
    """Each folder's images, and between them the files that are named one by one."""
    for is_folder, paths in groupby(given, Path.is_dir):
        if is_folder:
            yield from (find_images(path, "val" if (path / "val").is_dir() else "train") for path in paths)
        else:
            names = [str(path) for path in paths]
            yield ImageList(
                root=Path(),
                names=Names(names),
                labels=None,
                class_names=None,
                description=f"{len(names):,} images",
            )


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


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    try:
        yield path
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): name another place") from error
