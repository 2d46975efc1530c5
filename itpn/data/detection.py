"""Batches of images with objects, for training detectors and for evaluating them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from itpn.data.coco import Coco, check_categories
from itpn.data.coco_file import find_coco, places
from itpn.data.coco_names import located
from itpn.data.folders import Split
from itpn.data.grouping import GroupedEpochs
from itpn.data.loader import BadImages, Batch, Draw, Loaded, MicroBatches, Samples, load
from itpn.data.objects import objects_seen
from itpn.data.picture import BadImageError
from itpn.data.progress import watched
from itpn.data.source import hold_out
from itpn.data.views import Array, MultiScale, fitting, paddings, random_views, shrunk, whole_views
from itpn.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DetectionDataConfig:
    root: Path = Path("data/coco")
    """Folder with train2017, val2017 and annotations/instances_{train,val}2017.json; or with train and valid,
    each with _annotations.coco.json beside its images."""
    train_images: Path | None = None
    """Folder of the training images; None: ROOT/train2017."""
    train_annotations: Path | None = None
    """COCO instances file of the training images; None: ROOT/annotations/instances_train2017.json."""
    val_images: Path | None = None
    """Folder of the validation images. None: ROOT/val2017. Without it and val_annotations, a share of the
    training images is held out."""
    val_annotations: Path | None = None
    """COCO instances file of the validation images. None: ROOT/annotations/instances_val2017.json."""
    scale: MultiScale = field(default_factory=MultiScale)
    single_class: bool = False
    """Take all objects for one class, "object": find where things are, not what they are."""
    empty_images: bool = False
    """Train on images without objects too; the published recipes leave them out."""
    mask_size: int = 112
    """Pixels of an object's mask in training, across and down its box."""
    max_bad_share: float = 0.05
    """Share of the training annotations, and of the training images so far, that may be bad: they are left
    out, or replaced; more stop the run."""
    workers: int | None = None
    """Processes that load images, per rank; None: what suits the machine, 0: load in the training process."""

    def __post_init__(self) -> None:
        if not 1 <= self.mask_size <= 1024:
            raise UserError(f"data.mask_size is {self.mask_size}; it is a number of pixels, 1 to 1024")
        if not 0 <= self.max_bad_share <= 1:
            raise UserError(f"data.max_bad_share is {self.max_bad_share}; it is a share, in [0, 1]")
        if self.workers is not None and self.workers < 0:
            raise UserError(f"data.workers is {self.workers}; it is a number of processes, 0 or more")


def has_validation(config: DetectionDataConfig) -> bool:
    """Whether images to validate on are named, or there is anything at COCO's places for them."""
    named = config.val_images or config.val_annotations
    return named is not None or any(place.exists() for place in places(config.root, "val"))


def find_splits(config: DetectionDataConfig, val_share: float) -> tuple[Coco, Coco]:
    """The images to train and to validate on, of the same classes; a share is held out where there is no val.

    Raises:
        UserError: See `find_objects`; or the two have other classes, or there is one image only.
    """
    if has_validation(config):
        train, val = find_objects(config, "train"), find_objects(config, "val")
        check_categories(train, val)
        return _with_shared(train, val), val
    coco = _all_to_train_on(config)
    ours, theirs = hold_out(coco, val_share, seed=0)
    train, val = (
        coco.of_images(some.indices, f"of {coco.description}, {note}")
        for some, note in ((ours, "to train on"), (theirs, "held out for validation"))
    )
    if not train.objects.counts().any():
        raise UserError(
            f"all images with objects of {coco.file} are held out for validation; annotate more images, or "
            "name others to validate on: --data.val-images, --data.val-annotations"
        )
    return train if config.empty_images else train.with_objects(), replace(val, notes=())


def _with_shared(train: Coco, val: Coco) -> Coco:
    """The images to train on, with a note if some of them are validated on as well."""
    ours, theirs = (
        {real for _, real in located(coco.root, [coco.names[i] for i in range(len(coco))])}
        for coco in (train, val)
    )
    both = sorted((ours & theirs) - {""})
    if not both:
        return train
    note = (
        f"{len(both):,} images of {train.file} are in {val.file}, too, such as {both[0]}, so that a "
        "validation says nothing of new images; list each in one of the two"
    )
    return replace(train, notes=(*train.notes, note))


def find_validation(config: DetectionDataConfig, val_share: float) -> Coco:
    """The images to validate on, as `find_splits` has them; those to train on are not read without need."""
    return find_objects(config, "val") if has_validation(config) else find_splits(config, val_share)[1]


def find_objects(config: DetectionDataConfig, split: Split) -> Coco:
    """The images of a split with their objects; for training those that it is to see.

    Raises:
        UserError: See `find_coco`; or too many annotations are bad.
    """
    if split == "val":
        return _read(config, split, config.val_images, config.val_annotations)
    coco = _all_to_train_on(config)
    return coco if config.empty_images else coco.with_objects()


def _all_to_train_on(config: DetectionDataConfig) -> Coco:
    """Those without objects, too."""
    coco = _read(config, "train", config.train_images, config.train_annotations)
    bad = [finding for finding in coco.findings if finding.left_out]
    if len(bad) > config.max_bad_share * coco.num_annotations:
        raise UserError(
            f"{len(bad):,} of {coco.num_annotations:,} annotations of {coco.file} cannot be used, more than "
            f"data.max_bad_share {config.max_bad_share:g}, such as {bad[0].where}: {bad[0].reason}; correct "
            "them: itpn check-data --format coco lists all"
        )
    if not coco.objects.counts().any():
        raise UserError(f"{coco.file} has no object to learn from; annotate some, or name another file")
    return coco


def _read(config: DetectionDataConfig, split: Split, images: Path | None, annotations: Path | None) -> Coco:
    coco = find_coco(config.root, split, images, annotations)
    return coco.of_one_class() if config.single_class else coco


def train_loader(
    coco: Coco,
    config: DetectionDataConfig,
    *,
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
    """As `itpn.data.loader.train_loader`, for images with objects.

    Yields:
        images uint8 [b, 3, H, W], padded with 0 to the right and below; the same H, W, which are multiples
        of 32, throughout a global batch. sizes long [b, 2], their heights and widths without it. Of at most M
        objects: boxes float32 [b, M, 4] as x1, y1, x2, y2 in pixels, labels long [b, M], -1 in what an image
        does not fill, and, if the data have masks, masks uint8 [b, M, S, S], laid over the boxes: 1 inside,
        0 outside, 255 everywhere where it is unknown. index and epoch long [b], and the drawn tensors [b, …].
    """
    epochs = GroupedEpochs(coco.sizes, config.scale, batch_size)
    order = MicroBatches(epochs, seed, batch_size, micro_batch, rank, world_size, start_step)
    return load(TrainSamples(coco, config, epochs, draw, seed), order, coco, config.workers, device, on_bad)


def eval_loader(
    coco: Coco,
    config: DetectionDataConfig,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | None = None,
    on_bad: Callable[[BadImageError], None] | None = None,
    progress: str = "",
) -> Iterator[Batch]:
    """Every image exactly once over all ranks, whole and at one scale; images of one padded size together.

    An image is padded by its own size alone, so that nothing depends on those beside it. Ranks may have
    different numbers of batches.

    Args:
        progress: What a bar on the terminal calls the work that is done on the batches; empty: no bar.

    Yields:
        images uint8 [b, 3, H, W] and sizes long [b, 2], as in training; original long [b, 2], height and
        width of the files' images, to whose pixels detections go back; index long [b]; readable bool [b],
        False for an image that cannot be read (its pixels are 0): it is one without detections.
    """
    sizes, shapes = whole_views(coco.sizes, config.scale).sizes, paddings(config.scale)
    group = fitting(sizes, shapes)
    order = [
        (padding, some.tolist())
        for number, padding in enumerate(shapes.tolist())
        for some in _pieces(np.flatnonzero(group == number), batch_size)
    ]
    order = order[rank::world_size]
    batches = load(EvalSamples(coco, sizes), order, coco, config.workers, device, on_bad)
    return iter(watched(batches, progress, len(order))) if progress else batches


def _pieces(values: Array, length: int) -> list[Array]:
    return [values[start : start + length] for start in range(0, len(values), length)]


class TrainSamples(Samples):
    """Random views of images with what they show of the objects."""

    def __init__(
        self, coco: Coco, config: DetectionDataConfig, epochs: GroupedEpochs, draw: Draw, seed: int
    ) -> None:
        super().__init__(len(coco), draw, seed)
        self.coco, self.config, self.epochs = coco, config, epochs

    def sample(self, epoch: int, index: int, shown: int) -> Batch:
        plan = self.epochs.plan(self.seed, epoch)
        views = random_views(self.coco.sizes[[shown]], plan.draws[[index]], self.config.scale)
        padded = plan.padded[index]
        left, top, width, height = views.boxes[0].tolist()
        box, mirrored = (left, top, width, height), bool(views.mirrored[0])
        H, W = shrunk(views.sizes[0], padded).tolist()
        with self.coco.open(shown) as picture:
            pixels = picture.cut(box, (H, W))
        seen = objects_seen(
            self.coco, shown, box, (H, W), mirrored=mirrored, resolution=self.config.mask_size
        )
        objects = {
            name: torch.from_numpy(np.ascontiguousarray(part)) for name, part in seen._asdict().items()
        }
        if not self.coco.has_masks:
            del objects["masks"]
        pixels = padded_to(pixels.flip(-1) if mirrored else pixels, padded.tolist())
        return {"images": pixels, "sizes": torch.tensor([H, W]), **objects}

    def collate(self, samples: Sequence[Batch]) -> Batch:
        most = max(1, *(len(sample["labels"]) for sample in samples))
        return super().collate([_with_room(sample, most) for sample in samples])


def _with_room(sample: Batch, most: int) -> Batch:
    """A sample with its objects' tensors filled up to `most` objects."""
    filled = dict(sample)
    for name, value in (("boxes", 0), ("labels", -1), ("masks", 0)):
        if name in sample:
            objects = sample[name]
            room = objects.new_full((most - len(objects), *objects.shape[1:]), value)
            filled[name] = torch.cat([objects, room])
    return filled


class EvalSamples(Dataset[Loaded]):
    """Maps a padded size and indices of images to the batch and what could not be read.

    Args:
        sizes: What each image is scaled to, [n, 2].
    """

    def __init__(self, coco: Coco, sizes: Array) -> None:
        self.coco, self.sizes = coco, sizes

    def __getitem__(self, piece: tuple[Sequence[int], Sequence[int]]) -> Loaded:
        (H, W), indices = piece
        pixels = torch.zeros(len(indices), 3, H, W, dtype=torch.uint8)
        readable = torch.ones(len(indices), dtype=torch.bool)
        bad: BadImages = []
        for row, index in enumerate(indices):
            (height, width), size = self.coco.size(index), self.sizes[index].tolist()
            try:
                with self.coco.open(index) as picture:
                    pixels[row, :, : size[0], : size[1]] = picture.cut((0, 0, width, height), tuple(size))
            except BadImageError as error:
                bad.append((index, error.reason))
                readable[row] = False
        original, sizes = (torch.from_numpy(array[indices]) for array in (self.coco.sizes, self.sizes))
        batch = {"images": pixels, "sizes": sizes, "original": original, "index": torch.tensor(indices)}
        return {**batch, "readable": readable}, bad


def padded_to(pixels: Tensor, size: Sequence[int]) -> Tensor:
    """With zeros to the right and below."""
    return F.pad(pixels, (0, size[1] - pixels.shape[-1], 0, size[0] - pixels.shape[-2]))
