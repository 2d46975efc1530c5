"""`itpn bench data DIR`: loading images as training does, beside plain Pillow + torchvision, on one core."""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from itpn.bench.photographs import Size, sizes_of, write_photographs
from itpn.commands.arguments import parse
from itpn.data.images import find_images
from itpn.data.loader import DataConfig
from itpn.data.picture import BadImageError, Box, open_picture
from itpn.data.randomness import generator
from itpn.data.transforms import random_crop_box, random_resized_crop_flip
from itpn.errors import UserError

GROUP = 4
"""Images that one way loads before it is the other's turn."""

MEGAPIXELS = {"below 0.5 megapixels": 0.5, "0.5 to 2 megapixels": 2.0, "above 2 megapixels": float("inf")}
ORIENTATION = 0x0112


@dataclass(frozen=True)
class Options:
    """Images a second that one core loads for training, beside Pillow + torchvision on the same files and crops."""

    directory: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")] = None
    """Images as training finds them; or leave it out and give --synthetic."""
    synthetic: str | None = None
    """Make JPEGs of these sizes instead, such as 500x400,1024x768."""
    image_size: int = 224
    """Side of the crops in pixels."""
    num: int = 32
    """Images to load, of the whole folder or of each size made."""
    rounds: int = 5
    """Times that every image is loaded, each time with another crop; medians are shown."""
    json: Path | None = None
    """Where to write the figures."""

    def __post_init__(self) -> None:
        if (self.directory is None) == (self.synthetic is None):
            raise UserError("itpn bench data: give either a folder of images or --synthetic 500x400,1024x768")
        if min(self.image_size, self.num, self.rounds) < 1:
            raise UserError("--image-size, --num and --rounds must be at least 1")


@dataclass(frozen=True)
class Sample:
    """An image and one crop of it."""

    path: Path
    epoch: int
    index: int
    box: Box
    mirrored: bool


@dataclass(frozen=True)
class Result:
    """Images a second of both ways, and how far their pixels differ, in steps of 1 / 255."""

    num_images: int
    ours: float
    plain: float
    mean_difference: float
    largest_mean_difference: float

    @property
    def ratio(self) -> float:
        return self.ours / self.plain


def run(arguments: list[str]) -> None:
    options = parse(Options, arguments, "itpn bench data")
    with tempfile.TemporaryDirectory() as folder, one_thread():
        results = measure_all(files_by_size(options, Path(folder)), options)
    console = Console(highlight=False, soft_wrap=True)
    console.print(table_of(results))
    if options.json:
        figures = {name: {**asdict(result), "ratio": result.ratio} for name, result in results.items()}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def files_by_size(options: Options, folder: Path) -> dict[str, list[Path]]:
    """The files to load, by what to call their size."""
    if options.synthetic is not None:
        print("Made-up JPEGs: noise with the spectrum of photographs, quality 88, 4:2:0.")
        sizes: list[Size] = sizes_of(options.synthetic)
        return {f"{w} x {h}": write_photographs(folder, (w, h), options.num) for w, h in sizes}
    assert options.directory is not None
    images = find_images(options.directory)
    files: dict[str, list[Path]] = {name: [] for name in MEGAPIXELS}
    num_left_out = 0
    step = max(1, len(images) // options.num)
    for index in range(0, len(images), step)[: options.num]:
        path = images.root / images.names[index]
        try:
            with Image.open(path) as image:
                turned = image.getexif().get(ORIENTATION, 1) != 1
                megapixels = image.width * image.height / 1e6
            with open_picture(path) as picture:
                picture.decode()
        except (OSError, BadImageError):
            turned = True
        if turned:
            num_left_out += 1
            continue
        files[next(name for name, most in MEGAPIXELS.items() if megapixels <= most)].append(path)
    print(images.description)
    if num_left_out:
        print(f"{num_left_out} left out: unreadable, or turned by EXIF, which the plain way does not heed.")
    return files
