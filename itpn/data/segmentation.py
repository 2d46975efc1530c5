"""Batches of images with a label for every pixel, for training and for evaluation."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, assert_never

import torch
from torch import Tensor
from torch.utils.data import Dataset

from itpn.data.ade20k import SPLITS, find_ade20k, folder_of
from itpn.data.aligned import (
    Distortion,
    crop_corner,
    cut_image,
    cut_labels,
    distorted,
    fitted,
    padded,
    scaled_size,
)
from itpn.data.folders import Split
from itpn.data.labelled import IGNORED, LabelledImages, find_masks
from itpn.data.labels import MAX_CLASSES
from itpn.data.loader import Batch, Draw, Loaded, MicroBatches, Samples, load
from itpn.data.pairing import folders_of
from itpn.data.picture import BadImageError, Size
from itpn.data.randomness import generator
from itpn.data.source import hold_out
from itpn.errors import UserError

OnBad = Callable[[BadImageError], None]
Format = Literal["ade20k", "masks"]


@dataclass(frozen=True, kw_only=True)
class SegmentationDataConfig:
    """Location and augmentation of images with label maps. Defaults are the published values for ADE20K."""

    root: Path = Path("data/ADEChallengeData2016")
    """Folder of the data set."""
    format: Format = "ade20k"
    """Layout of the data set: ADE20K's, or images/train beside labels/train, and val (masks)."""
    num_classes: int | None = None
    """Number of classes of masks, if no file names them."""
    names: Path | None = None
    """Text file with one class name per line, for masks. None: ROOT/classes.txt if it exists."""
    ignored: int | None = IGNORED
    """Value that marks unlabelled pixels in masks. None: every pixel is labelled."""
    zero_is_no_label: bool = False
    """Treat 0 in masks as unlabelled; the classes then start at 1."""
    values: tuple[int, ...] = ()
    """Value that masks store for each class, such as 0 255. A listed value is never ignored. Empty:
    consecutive numbers."""
    short: int = 512
    """Target length of the shorter side in pixels. Images are scaled to fit it and `long`."""
    long: int = 2048
    """Target length of the longer side in pixels. Training then scales by `ratio`."""
    ratio: tuple[float, float] = (0.5, 2.0)
    """Range of the uniform random scale in training."""
    crop: Size = (512, 512)
    """Height and width of the training crops."""
    max_class_share: float = 0.75
    """Largest share of one class among a crop's labels. Above it, the crop is redrawn up to nine times. 1:
    never."""
    flip: float = 0.5
    """Probability of mirroring an image."""
    brightness: float = 32.0
    """Largest change of brightness, on a scale of 255. Applied with probability 0.5, as are the next
    three."""
    contrast: float = 0.5
    """Strength s of the contrast change, a factor from 1 - s to 1 + s."""
    saturation: float = 0.5
    """Strength s of the saturation change, a factor from 1 - s to 1 + s."""
    hue: float = 18.0
    """Largest rotation of the hue, in degrees."""
    padding: tuple[int, int, int] = (124, 116, 104)
    """Padding colour of images smaller than the crop. The default is ImageNet's mean, which normalises to
    0."""
    skip_bad: bool = False
    """Leave out images that cannot be used (unreadable, or no or wrong labels) instead of stopping at the
    first."""
    max_bad_share: float = 0.05
    """Largest share of the training images so far that may be left out. More stop the run."""
    workers: int | None = None
    """Number of loading processes per rank. None: chosen for the machine. 0: load in the training process."""

    def __post_init__(self) -> None:
        if not 1 <= (1 if self.num_classes is None else self.num_classes) <= MAX_CLASSES:
            raise UserError(f"data.num_classes is {self.num_classes}; there can be 1 to {MAX_CLASSES:,}")
        if self.format == "ade20k" and (self.values or self.names or self.num_classes):
            raise UserError("data.values, data.names and data.num_classes need --data.format masks")
        if not 0 < self.ratio[0] <= self.ratio[1] <= 16:
            raise UserError(f"data.ratio is {self.ratio}; it is a smallest and a largest factor, in (0, 16]")
        sizes = (self.short * self.ratio[0], self.long * self.ratio[0], *self.crop)
        if min(sizes) < 1 or max(self.short, self.long, *self.crop) > 1 << 15:
            raise UserError("data.short, data.long and data.crop are numbers of pixels, from 1 to 32,768")
        if not 0 < self.max_class_share <= 1:
            raise UserError(f"data.max_class_share is {self.max_class_share}; it is a share, in (0, 1]")
        if not 0 <= self.flip <= 1 or not 0 <= self.max_bad_share <= 1:
            raise UserError("data.flip is a probability and data.max_bad_share a share, both in [0, 1]")
        if min(self.distortion) < 0 or self.brightness > 255 or self.hue > 180:
            raise UserError("data.brightness lies in [0, 255], data.hue in [0, 180]")
        if max(self.contrast, self.saturation) > 1:
            raise UserError("data.contrast and data.saturation lie in [0, 1]")
        if not 0 <= min(self.padding) <= max(self.padding) <= 255:
            raise UserError(f"data.padding is {self.padding}; it is a colour, 0 to 255 for each channel")
        if self.workers is not None and self.workers < 0:
            raise UserError(f"data.workers is {self.workers}; it is a number of processes, 0 or more")

    @property
    def distortion(self) -> Distortion:
        return Distortion(self.brightness, self.contrast, self.saturation, self.hue)


def has_split(config: SegmentationDataConfig, split: Split) -> bool:
    """Whether there is a folder of its images."""
    match config.format:
        case "ade20k":
            folder = folder_of(config.root) / "images" / SPLITS[split]
        case "masks":
            folder, _ = folders_of(config.root, split)
        case _:
            assert_never(config.format)
    return folder.is_dir()


def find_labelled(config: SegmentationDataConfig, split: Split) -> LabelledImages:
    """The images of a split, as `find_ade20k` or `find_masks` finds them."""
    match config.format:
        case "ade20k":
            return find_ade20k(config.root, split, skip_bad=config.skip_bad)
        case "masks":
            return find_masks(
                config.root,
                split,
                num_classes=config.num_classes,
                names=config.names,
                ignored=config.ignored,
                zero_is_no_label=config.zero_is_no_label,
                values=config.values,
                skip_bad=config.skip_bad,
            )
        case _:
            assert_never(config.format)


def find_splits(config: SegmentationDataConfig, val_share: float) -> tuple[LabelledImages, LabelledImages]:
    """The images to train and to validate on; a share is held out where there is no val."""
    images = find_labelled(config, "train")
    if has_split(config, "val"):
        return images, find_labelled(config, "val")
    train, val = hold_out(images, val_share, seed=0)
    return images.some(train.indices, train.description), images.some(val.indices, val.description)


def train_crops(
    images: LabelledImages,
    config: SegmentationDataConfig,
    *,
    draw: Draw,
    seed: int,
    batch_size: int,
    micro_batch: int,
    rank: int = 0,
    world_size: int = 1,
    start_step: int = 0,
    device: torch.device | None = None,
    on_bad: OnBad | None = None,
) -> Iterator[Batch]:
    """Micro-batches of one rank from step `start_step` on, without end; the arguments of `train_loader`.

    With `config.skip_bad` an image that cannot be used is replaced by another one, the same in every run, and
    `on_bad` hears of it; without it is an error.

    Yields:
        images uint8 [b, 3, H, W], labels uint8 (int32 from 256 classes on) [b, H, W], index and epoch long
        [b], and the drawn tensors [b, …].
    """
    order = MicroBatches(images, seed, batch_size, micro_batch, rank, world_size, start_step)
    samples = TrainCrops(images, config, draw, seed)
    return load(samples, order, images, config.workers, device, on_bad if config.skip_bad else refuse)


def eval_pairs(
    images: LabelledImages,
    config: SegmentationDataConfig,
    *,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | None = None,
    on_bad: OnBad | None = None,
) -> Iterator[Batch]:
    """Every image exactly once over all ranks, one at a time: r, r + world_size, … on rank r.

    Yields:
        images uint8 [1, 3, h, w], scaled to `short` and `long`; labels [1, H, W], of the size that the file
        has; index long [1]. Of an image that cannot be used the index alone, with `config.skip_bad`; else it
        is an error.
    """
    order = range(rank, len(images), world_size)
    samples = EvalPairs(images, config)
    return load(samples, order, images, config.workers, device, on_bad if config.skip_bad else refuse)


class TrainCrops(Samples):
    """Random crops of randomly scaled images, with their labels."""

    def __init__(self, images: LabelledImages, config: SegmentationDataConfig, draw: Draw, seed: int) -> None:
        super().__init__(len(images), draw, seed)
        self.images, self.config = images, config

    def sample(self, epoch: int, index: int, shown: int) -> Batch:
        config, unlabelled = self.config, self.images.labelling.unlabelled
        image, labels = self.images.pair(shown)
        draws = generator(self.seed, epoch, index, "crop")
        ratio, flip = torch.rand(2, generator=draws, dtype=torch.float64).tolist()
        ratio = config.ratio[0] + ratio * (config.ratio[1] - config.ratio[0])
        scaled = scaled_size((image.height, image.width), config.short, config.long, ratio)
        corner = crop_corner(labels, scaled, config.crop, unlabelled, config.max_class_share, draws)

        pixels = cut_image(image, scaled, corner, config.crop)
        truth = torch.from_numpy(cut_labels(labels, scaled, corner, config.crop))[None]
        if flip < config.flip:
            pixels, truth = pixels.flip(-1), truth.flip(-1)
        pixels = distorted(pixels, config.distortion, generator(self.seed, epoch, index, "colour"))
        return {
            "images": padded(pixels, torch.tensor(config.padding), config.crop),
            "labels": padded(truth, torch.tensor([unlabelled]), config.crop)[0],
        }


class EvalPairs(Dataset[Loaded]):
    """Maps an index to a batch of that image, and what could not be read."""

    def __init__(self, images: LabelledImages, config: SegmentationDataConfig) -> None:
        self.images, self.config = images, config

    def __getitem__(self, index: int) -> Loaded:
        batch: dict[str, Tensor] = {"index": torch.tensor([index])}
        bad: Sequence[tuple[int, str]] = []
        try:
            image, labels = self.images.pair(index)
        except BadImageError as error:
            bad = [(index, error.reason)]
        else:
            batch |= {
                "images": fitted(image, self.config.short, self.config.long),
                "labels": torch.from_numpy(labels)[None],
            }
        return batch, list(bad)


def refuse(bad: BadImageError) -> None:
    raise UserError(f"{bad}, or leave such files out with --data.skip-bad")
