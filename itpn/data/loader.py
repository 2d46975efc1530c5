"""Batches for training and evaluation.

Position p of an epoch is the p-th image in that epoch's order; each step takes the next `batch_size`
positions, split over micro-steps and ranks. So which images a step sees depends on the global batch alone.
"""

import os
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from itpn.data.augment import augmented, check_randaugment, randaugment
from itpn.data.picture import BadImageError, Size
from itpn.data.randomness import generator, replacement
from itpn.data.source import Images
from itpn.data.transforms import CROP_RATIO, center_crop, jittered, random_resized_crop_flip
from itpn.errors import UserError, printable

Batch = dict[str, Tensor]
Draw = Callable[[Generator], Batch]
BadImages = list[tuple[int, str]]
"""Indices of images that could not be read, and why."""
Loaded = tuple[Batch | None, BadImages]

MAX_REPLACEMENTS = 100
SECONDS_TO_OUTLIVE_SIGTERM = 30


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    root: Path = Path("data/imagenet")
    """Folder of images; ROOT/train is used where it exists."""
    list: Path | None = None
    """Text file with one image path per line, relative to the root or to the file. It replaces the search."""
    min_scale: float = 0.2
    """Smallest share of an image's area in a random resized crop."""
    flip: float = 0.5
    """Probability of mirroring an image."""
    colour_jitter: float = 0.0
    """Strength s of the colour jitter: brightness, contrast and saturation change by factors from 1 - s to 1
    + s."""
    randaugment: str = ""
    """RandAugment in timm's notation, such as rand-m9-mstd0.5-inc1. Empty: none."""
    max_bad_share: float = 0.05
    """Largest share of the training images so far that may be unreadable. They are replaced; more stop the
    run."""
    workers: int | None = None
    """Number of loading processes per rank. None: chosen for the machine. 0: load in the training process."""

    def __post_init__(self) -> None:
        if not 0 < self.min_scale <= 1:
            raise UserError(f"data.min_scale is {self.min_scale}; it is a share of the area, in (0, 1]")
        if not 0 <= self.flip <= 1:
            raise UserError(f"data.flip is {self.flip}; it is a probability, in [0, 1]")
        if not 0 <= self.colour_jitter <= 1:
            raise UserError(f"data.colour_jitter is {self.colour_jitter}; it is a share, in [0, 1]")
        if self.randaugment:
            check_randaugment(self.randaugment)
        if not 0 <= self.max_bad_share <= 1:
            raise UserError(f"data.max_bad_share is {self.max_bad_share}; it is a share, in [0, 1]")
        if self.workers is not None and self.workers < 0:
            raise UserError(f"data.workers is {self.workers}; it is a number of processes, 0 or more")


def steps_per_epoch(num_images: int, batch_size: int) -> int:
    """Whole global batches in an epoch; the images left over are in another epoch's permutation."""
    if num_images < batch_size:
        raise UserError(
            f"{num_images:,} images are fewer than one global batch of {batch_size:,}; "
            f"add images or lower --batch-size to at most {num_images:,}"
        )
    return num_images // batch_size


def train_loader(
    images: Images,
    config: DataConfig,
    *,
    image_size: Size,
    draw: Draw,
    seed: int,
    batch_size: int,
    micro_batch: int,
    rank: int = 0,
    world_size: int = 1,
    start_step: int = 0,
    device: torch.device | None = None,
    on_bad: Callable[[BadImageError], None] | None = None,
) -> Iterator[Batch]:
    """Micro-batches of one rank from step `start_step` on, without end.

    An unreadable image is replaced by another one, the same in every run. `on_bad` hears of it each time,
    with the batch that it was meant for; by default it is named on stderr once.

    Args:
        draw: What else is random about a sample: generator -> tensors, stacked into the batch. Picklable.
        batch_size: Global: over all ranks and micro-steps of a step.
        micro_batch: Images per rank and micro-step.

    Yields:
        images uint8 [b, 3, H, W], index and epoch long [b], labels long [b] where the images have them, and
        the drawn tensors [b, …]. `index` and label are those of the image shown, so a replaced one has its
        replacement's.
    """
    order = MicroBatches(images, seed, batch_size, micro_batch, rank, world_size, start_step)
    samples = TrainSamples(images, config, image_size, draw, seed)
    return load(samples, order, images, config.workers, device, on_bad)


def eval_loader(
    images: Images,
    *,
    image_size: Size,
    crop_ratio: float = CROP_RATIO,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int | None = None,
    device: torch.device | None = None,
    on_bad: Callable[[BadImageError], None] | None = None,
) -> Iterator[Batch]:
    """Every image exactly once over all ranks: r, r + world_size, … on rank r; the last batch may be smaller.

    Args:
        crop_ratio: Share of the scaled image's sides that its central crop covers; see `crop_ratio_of`.

    Yields:
        images uint8 [b, 3, H, W], index and labels long [b]. The label is -1 where there is none or the
        image cannot be read (its pixels are then 0), so that such an image counts as wrong.
    """
    mine = range(rank, len(images), world_size)
    order = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    return load(EvalSamples(images, image_size, crop_ratio), order, images, workers, device, on_bad)


class Epochs(Protocol):
    """Something whose samples have an order in each epoch."""

    def __len__(self) -> int: ...

    def order(self, seed: int, epoch: int) -> Tensor:
        """Indices of samples, each at most once, long [len(self)]."""
        ...


class MicroBatches(Sampler[list[tuple[int, int]]]):
    """The (epoch, index) pairs of each micro-step of one rank, from `start_step` on, without end."""

    def __init__(
        self,
        epochs: Epochs,
        seed: int,
        batch_size: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
    ) -> None:
        self.steps = steps_per_epoch(len(epochs), batch_size)
        if batch_size % (micro_batch * world_size):
            raise ValueError(f"{batch_size=} is not a multiple of {micro_batch=} times {world_size=}")
        self.epochs, self.seed, self.start_step = epochs, seed, start_step
        self.batch_size, self.micro_batch = batch_size, micro_batch
        self.first, self.stride = rank * micro_batch, world_size * micro_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, step = divmod(self.start_step, self.steps)
        while True:
            order = self.epochs.order(self.seed, epoch)
            for start in range(step * self.batch_size, self.steps * self.batch_size, self.batch_size):
                for offset in range(start + self.first, start + self.batch_size, self.stride):
                    yield [(epoch, index) for index in order[offset : offset + self.micro_batch].tolist()]
            epoch, step = epoch + 1, 0


class Samples(Dataset[Loaded], ABC):
    """Maps the (epoch, index) pairs of a micro-batch to the batch and what could not be read on the way.

    An unreadable image is replaced by another one. The batch is None when too many in a row are unreadable.
    """

    def __init__(self, num_images: int, draw: Draw, seed: int) -> None:
        self.num_images, self.draw, self.seed = num_images, draw, seed

    @abstractmethod
    def sample(self, epoch: int, index: int, shown: int) -> Batch:
        """The sample whose image is `shown`, and whose random numbers are those of `index`.

        Raises:
            BadImageError: The image cannot be read.
        """

    def collate(self, samples: Sequence[Batch]) -> Batch:
        return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}

    def __getitem__(self, pairs: Sequence[tuple[int, int]]) -> Loaded:
        bad: BadImages = []
        samples = []
        for epoch, index in pairs:
            sample = self._sample(epoch, index, bad)
            if sample is None:
                return None, bad
            samples.append(sample)
        return self.collate(samples), bad

    def _sample(self, epoch: int, index: int, bad: BadImages) -> Batch | None:
        shown = index
        for attempt in range(MAX_REPLACEMENTS):
            try:
                sample = self.sample(epoch, index, shown)
            except BadImageError as error:
                bad.append((shown, error.reason))
                shown = replacement(self.seed, epoch, index, attempt, self.num_images)
                continue
            drawn = self.draw(generator(self.seed, epoch, index, "draw"))
            return {**sample, "index": torch.tensor(shown), "epoch": torch.tensor(epoch), **drawn}
        return None


class TrainSamples(Samples):
    """Random crops of images, with their labels if they have any."""

    def __init__(self, images: Images, config: DataConfig, image_size: Size, draw: Draw, seed: int) -> None:
        super().__init__(len(images), draw, seed)
        self.images, self.config, self.image_size = images, config, image_size
        if config.randaugment:
            randaugment(config.randaugment, image_size)  # once, before the workers are forked

    def sample(self, epoch: int, index: int, shown: int) -> Batch:
        pixels = self._pixels(epoch, index, shown)
        if self.config.randaugment:
            draws = generator(self.seed, epoch, index, "randaugment")
            pixels = augmented(pixels, self.config.randaugment, draws)
        if self.config.colour_jitter:
            draws = generator(self.seed, epoch, index, "colour")
            pixels = jittered(pixels, self.config.colour_jitter, draws)
        labels = self.images.labels
        return {"images": pixels} if labels is None else {"images": pixels, "labels": labels[shown]}

    def _pixels(self, epoch: int, index: int, shown: int) -> Tensor:
        with self.images.open(shown) as picture:
            return random_resized_crop_flip(
                picture,
                self.image_size,
                min_scale=self.config.min_scale,
                flip=self.config.flip,
                generator=generator(self.seed, epoch, index, "crop"),
            )


class EvalSamples(Dataset[Loaded]):
    """Maps the indices of a batch to the batch and what could not be read."""

    def __init__(self, images: Images, image_size: Size, crop_ratio: float = CROP_RATIO) -> None:
        self.images, self.image_size, self.crop_ratio = images, image_size, crop_ratio

    def __getitem__(self, indices: Sequence[int]) -> Loaded:
        index = torch.tensor(indices)
        pixels = torch.zeros(len(indices), 3, *self.image_size, dtype=torch.uint8)
        labels = torch.full_like(index, -1) if self.images.labels is None else self.images.labels[index]
        bad: BadImages = []
        for row, i in enumerate(indices):
            try:
                with self.images.open(i) as picture:
                    pixels[row] = center_crop(picture.decode(), self.image_size, self.crop_ratio)
            except BadImageError as error:
                bad.append((i, error.reason))
                labels[row] = -1
        return {"images": pixels, "index": index, "labels": labels}, bad


def load(
    samples: Dataset[Loaded],
    order: Iterable[Any],
    images: Images,
    workers: int | None,
    device: torch.device | None,
    on_bad: Callable[[BadImageError], None] | None,
) -> Iterator[Batch]:
    """The batches that `samples` makes of the entries of `order`; `on_bad` hears of each unreadable image.

    Args:
        on_bad: None: each is named on stderr once.
    """
    return _reporting(
        _data_loader(samples, order, workers, device), images, on_bad or _named_once_on_stderr()
    )


def _data_loader(
    dataset: Dataset[Loaded], order: Iterable[Any], workers: int | None, device: torch.device | None
) -> DataLoader[Loaded]:
    on_cpu = device is None or device.type == "cpu"
    workers = default_workers(on_cpu) if workers is None else workers
    return DataLoader(
        dataset,
        batch_size=None,  # the dataset maps a whole batch at a time
        sampler=order,
        num_workers=workers,
        pin_memory=device is not None and device.type == "cuda",
        worker_init_fn=_leave_signals_to_the_parent,
        generator=Generator(),  # or it would draw from the global one, which belongs to the model
    )


def default_workers(on_cpu: bool) -> int:
    """Loading processes per rank: training on the CPU needs its cores itself and asks for few images."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(2, share // 2) if on_cpu else max(1, min(16, share))


def _leave_signals_to_the_parent(_worker: int) -> None:
    # Ctrl-C reaches every process of the terminal, and a scheduler's SIGTERM every process of the job. The
    # parent needs its batches to end a step cleanly, and then ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(SECONDS_TO_OUTLIVE_SIGTERM))


def _reporting(
    loader: DataLoader[Loaded], images: Images, on_bad: Callable[[BadImageError], None]
) -> Iterator[Batch]:
    for batch, bad in loader:
        for index, reason in bad:
            on_bad(BadImageError(images.name(index), reason))
        if batch is None:
            first = BadImageError(images.name(bad[0][0]), bad[0][1])
            raise UserError(f"{len(bad)} images in a row cannot be read, the first is {first}")
        yield batch


def _named_once_on_stderr() -> Callable[[BadImageError], None]:
    heard: set[Path] = set()

    def hear(bad: BadImageError) -> None:
        if bad.path not in heard:
            heard.add(bad.path)
            print(f"unreadable image left out: {printable(bad.path)}: {bad.reason}", file=sys.stderr)

    return hear
