"""`itpn bench data DIR`: loading images as training does, beside plain Pillow + torchvision, on one core."""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from itpn.bench.photographs import QUALITY, sizes_of, write_photographs
from itpn.commands.arguments import parse
from itpn.data.images import ImageList, find_images
from itpn.data.picture import BadImageError, Box, Size, load_image, open_picture, orientation
from itpn.data.randomness import generator
from itpn.data.transforms import random_crop_box, random_resized_crop_flip
from itpn.errors import UserError
from itpn.outputs import claim, writing

GROUP = 4
"""Images that one way loads before it is the other's turn."""

MEGAPIXELS = {"below 0.5 megapixels": 0.5, "0.5 to 2 megapixels": 2.0, "above 2 megapixels": float("inf")}
MIN_SCALE, FLIP = 0.2, 0.5


@dataclass(frozen=True)
class Options:
    """Measure how many training images per second one core loads, beside Pillow + torchvision on the same
    files."""

    directory: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")] = None
    """Folder of images, as for training. Leave it out and give --synthetic to use made-up images."""
    synthetic: str | None = None
    """Make JPEGs of these sizes instead, such as 500x400,1024x768."""
    image_size: int = 224
    """Side of the crops in pixels."""
    num: int = 32
    """Number of images to load: from the folder in all, or of each synthetic size."""
    rounds: int = 5
    """Number of passes over the images, each with new crops. Medians are shown."""
    json: Path | None = None
    """JSON file to write the results to."""

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

    def generator(self) -> torch.Generator:
        return generator(0, self.epoch, self.index, "crop")


@dataclass(frozen=True)
class Result:
    """Images per second of both ways, and how far their pixels differ, in steps of 1 / 255."""

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
    claim(("--json", options.json))
    with tempfile.TemporaryDirectory() as folder, one_thread():
        results = measure_all(files_by_size(options, Path(folder)), options)
    console = Console(highlight=False, soft_wrap=True)
    console.print(table_of(results))
    if options.json:
        figures = {name: {**asdict(result), "ratio": result.ratio} for name, result in results.items()}
        with writing(options.json, "--json") as file:
            file.write_text(json.dumps(figures, indent=2) + "\n")


def files_by_size(options: Options, folder: Path) -> dict[str, list[Path]]:
    """The files to load, by what to call their size; those made are written to `folder`."""
    if options.synthetic is not None:
        sizes = sizes_of(options.synthetic)
        print(f"Synthetic JPEGs: noise as detailed as photographs, quality {QUALITY}, 4:2:0.")
        return {f"{w} x {h}": write_photographs(folder, (w, h), options.num) for w, h in sizes}
    assert options.directory is not None
    images = find_images(options.directory)
    if not isinstance(images, ImageList):
        raise UserError(f"{options.directory} holds tar shards; name a folder of image files")
    files: dict[str, list[Path]] = {name: [] for name in MEGAPIXELS}
    chosen = range(0, len(images), max(1, len(images) // options.num))[: options.num]
    for path in map(images.path, chosen):
        if (megapixels := megapixels_of(path)) is not None:
            files[next(name for name, most in MEGAPIXELS.items() if megapixels <= most)].append(path)
    print(images.description)
    if not any(files.values()):
        raise UserError(
            f"none of {len(chosen)} images can be compared: all are unreadable or rotated by EXIF; "
            "name another folder, or raise --num to try more"
        )
    num_left_out = len(chosen) - sum(map(len, files.values()))
    if num_left_out:
        print(
            f"{num_left_out} images left out: unreadable, or rotated by EXIF (ignored by the plain loader)."
        )
    return {name: paths for name, paths in files.items() if paths}


def megapixels_of(path: Path) -> float | None:
    """None for a file that the plain way cannot load, or loads unturned."""
    try:
        load_image(path)
        with Image.open(path) as image:
            turned = orientation(image) in range(2, 9)
            return None if turned else image.width * image.height / 1e6
    except (OSError, BadImageError):
        return None


def measure_all(files: dict[str, list[Path]], options: Options) -> dict[str, Result]:
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("loading", total=sum(map(len, files.values())) * (options.rounds + 1))
        return {
            name: measure(paths, options, lambda num: progress.advance(task, num))
            for name, paths in files.items()
        }


def measure(paths: list[Path], options: Options, advance: Callable[[int], None]) -> Result:
    """Both ways in turn, a few images each, so that neither gets the better moments of the machine."""
    size = (options.image_size, options.image_size)
    plain_way = PlainWay(size)

    def ours(sample: Sample) -> Tensor:
        with open_picture(sample.path) as picture:
            return random_resized_crop_flip(
                picture, size, min_scale=MIN_SCALE, flip=FLIP, generator=sample.generator()
            )

    differences: list[float] = []
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    for epoch in range(options.rounds + 1):
        samples = [drawn(path, epoch, index) for index, path in enumerate(paths)]
        spent = {"ours": 0.0, "plain": 0.0}
        for start in range(0, len(samples), GROUP):
            group = samples[start : start + GROUP]
            began = time.perf_counter()
            our_pixels = [ours(sample) for sample in group]
            between = time.perf_counter()
            plain_pixels = [plain_way(sample) for sample in group]
            spent["ours"] += between - began
            spent["plain"] += time.perf_counter() - between
            differences += map(mean_difference, our_pixels, plain_pixels)
            advance(len(group))
        if epoch:  # the first round is for caches to fill
            for way, total in spent.items():
                seconds[way].append(total)
    ours_rate, plain_rate = (len(paths) / statistics.median(seconds[way]) for way in ("ours", "plain"))
    return Result(len(paths), ours_rate, plain_rate, statistics.mean(differences), max(differences))


def drawn(path: Path, epoch: int, index: int) -> Sample:
    """The crop that training draws for this image in this epoch."""
    with open_picture(path) as picture:
        width, height = picture.size
    draws = generator(0, epoch, index, "crop")
    box = random_crop_box(width, height, MIN_SCALE, draws)
    return Sample(path, epoch, index, box, mirrored=float(torch.rand((), generator=draws)) < FLIP)


class PlainWay:
    """The loading of most training code: Pillow decodes the whole image, then torchvision's transforms
    follow."""

    def __init__(self, image_size: Size) -> None:
        try:
            from torchvision.transforms import v2
        except ImportError as error:
            raise UserError("itpn bench data compares with torchvision; pip install torchvision") from error

        interpolation = v2.InterpolationMode.BICUBIC
        self._crop = v2.RandomResizedCrop(image_size, interpolation=interpolation, antialias=True)
        self._flip = v2.RandomHorizontalFlip(p=1)
        self._to_tensor = v2.PILToTensor()

    def __call__(self, sample: Sample) -> Tensor:
        left, top, width, height = sample.box
        # Instead of drawing a box from the global generator, which takes it some microseconds.
        self._crop.make_params = lambda _: {"left": left, "top": top, "width": width, "height": height}
        crop = self._crop(Image.open(sample.path).convert("RGB"))
        pixels: Tensor = self._to_tensor(self._flip(crop) if sample.mirrored else crop)
        return pixels


def mean_difference(ours: Tensor, plain: Tensor) -> float:
    return float((ours.float() - plain.float()).abs().mean())


def table_of(results: dict[str, Result]) -> Table:
    table = Table("", title="images a second on one core", title_justify="left")
    for heading in (
        "images",
        "itpn",
        "Pillow + torchvision",
        "ratio",
        "mean pixel difference of 255",
        "of one image",
    ):
        table.add_column(heading, justify="right")
    for name, result in results.items():
        table.add_row(
            name,
            f"{result.num_images}",
            f"{result.ours:.0f}",
            f"{result.plain:.0f}",
            f"{result.ratio:.2f}",
            f"{result.mean_difference:.3f}",
            f"up to {result.largest_mean_difference:.3f}",
        )
    return table


@contextmanager
def one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
