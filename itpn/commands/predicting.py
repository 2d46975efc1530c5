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
    """Predict labels, objects, label maps or embeddings for images."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Run directory, .safetensors file written by itpn, folder written by save_pretrained, or Hub id."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image files, or folders to search for images. Pictures that itpn wrote are skipped."""
    top: int = 5
    """Number of labels per image, best first."""
    out: Path | None = None
    """Folder for pictures. A classifier's images are drawn with their labels on sheets of 24,
    predictions-001.png and so on. A detector or segmenter draws one picture per image; a segmenter also
    writes label maps to labels/. Default: predictions/ for detectors and segmenters."""
    json: Path | None = None
    """File for the predictions. A classifier or segmenter writes one JSON object per line: path, and labels
    with scores or class shares. A detector writes a COCO instances file with scores."""
    min_score: float = 0.5
    """Lowest score of a detection that is kept."""
    embeddings: Path | None = None
    """.npy file for the pooled features, [images, channels] in fp32. A .txt file beside it lists the
    paths."""
    batch_size: int = 16
    """Images per forward pass."""
    image_size: tuple[int, int] | None = None
    """Height and width in pixels. Default: the training size."""
    mode: Literal["slide", "whole"] | None = None
    """Inference of a segmenter: in sliding windows, or on the whole image. Default: as it was evaluated."""
    flip: bool = False
    """Average a segmenter's prediction with that of the mirrored image."""
    device: DeviceName = "auto"
    """Device to run on."""

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
