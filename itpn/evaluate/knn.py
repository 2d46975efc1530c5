"""k-nearest-neighbour classification with frozen features: a monitor of pre-training that needs no training.

Each image of the validation split is classified by the k training images of highest cosine similarity s, each
voting for its class with weight exp(s / temperature).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

from itpn.data.classes import check_same_classes
from itpn.data.loader import Batch, eval_loader
from itpn.data.picture import BadImageError, Size
from itpn.data.source import Images
from itpn.errors import UserError

FeaturesFn = Callable[[Tensor], Tensor]
"""Images uint8 [B, 3, H, W] on the device -> features [B, D]."""

MAX_SIMILARITIES = 1 << 26
"""Similarities held at a time (256 MB), which bounds the memory for any size of the training split."""


@dataclass(frozen=True, kw_only=True)
class KnnConfig:
    every: int = 0
    """Epochs between evaluations; 0: never."""
    root: Path | None = None
    """Folder with train and val, in class folders; None: the folder of the training images."""
    k: int = 20
    """Neighbours that vote."""
    temperature: float = 0.07
    """Similarity over this is a neighbour's log weight."""
    batch_size: int = 64
    """Images per rank and forward pass."""

    def __post_init__(self) -> None:
        if self.k < 1 or self.batch_size < 1 or not self.temperature > 0 or self.every < 0:
            raise UserError("knn.k, knn.batch_size and knn.temperature must be positive, knn.every 0 or more")


def knn(
    features_fn: FeaturesFn,
    train: Images,
    val: Images,
    config: KnnConfig,
    *,
    image_size: Size,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    workers: int | None = None,
    on_bad: Callable[[BadImageError], None] | None = None,
) -> dict[str, float]:
    """Top-1 and top-5 accuracy on `val`, each in 0..1, each image counted once; the same on every rank.

    An unreadable image is no neighbour in `train` and wrong in `val`.
    """
    num_classes = len(check_same_classes(train, val))
    if min(len(train), len(val)) < world_size:
        raise UserError(f"k-NN on {world_size} ranks needs as many images in each split; use fewer ranks")

    def features_of(images: Images) -> tuple[Tensor, Tensor]:
        batches = eval_loader(
            images,
            image_size=image_size,
            batch_size=config.batch_size,
            rank=rank,
            world_size=world_size,
            workers=workers,
            device=device,
            on_bad=on_bad,
        )
        return extract(features_fn, batches, device)

    keys, key_labels = (_gathered(mine, len(train), rank, world_size) for mine in features_of(train))
    keys, key_labels = keys[key_labels >= 0], key_labels[key_labels >= 0]
    queries, labels = features_of(val)
    hits = torch.zeros(2, dtype=torch.long, device=device)
    chunk = max(1, MAX_SIMILARITIES // max(1, len(keys)))
    for start in range(0, len(queries), chunk):
        some = slice(start, start + chunk)
        votes = knn_votes(queries[some], keys, key_labels, num_classes, config.k, config.temperature)
        hits += torch.stack([_hits(votes, labels[some], 1), _hits(votes, labels[some], 5)])
    if world_size > 1:
        dist.all_reduce(hits)
    top1, top5 = hits.tolist()
    return {"knn_top1": top1 / len(val), "knn_top5": top5 / len(val)}


@torch.no_grad()
def extract(features_fn: FeaturesFn, batches: Iterable[Batch], device: torch.device) -> tuple[Tensor, Tensor]:
    """Unit-length features [n, D] in fp32 and labels [n] of all batches, on the device."""
    features, labels = [], []
    for batch in batches:
        images = batch["images"].to(device, non_blocking=True)
        features.append(normalize(features_fn(images).float(), dim=1))
        labels.append(batch["labels"].to(device, non_blocking=True))
    return torch.cat(features), torch.cat(labels)


def knn_votes(
    queries: Tensor, keys: Tensor, key_labels: Tensor, num_classes: int, k: int, temperature: float
) -> Tensor:
    """The classes' votes [n, num_classes] for unit-length queries [n, D] among unit-length keys [m, D]."""
    similarity, nearest = (queries @ keys.T).topk(min(k, len(keys)))
    votes = queries.new_zeros(len(queries), num_classes)
    weights = ((similarity - 1) / temperature).exp()  # a common factor of exp(-1 / temperature): at most 1
    return votes.scatter_add_(1, key_labels[nearest], weights)


def _hits(votes: Tensor, labels: Tensor, top: int) -> Tensor:
    """How many labels are among the top classes; a class without a vote is not."""
    votes, classes = votes.topk(min(top, votes.shape[1]))
    return ((classes == labels[:, None]) & (votes > 0)).sum()


def _gathered(mine: Tensor, total: int, rank: int, world_size: int) -> Tensor:
    """All ranks' rows [total, …], where rank r holds those numbered r, r + world_size, …, in that order."""
    if world_size == 1:
        return mine
    rows = -(-total // world_size)
    padded = mine.new_zeros(rows, *mine.shape[1:])
    padded[: len(mine)] = mine
    parts = [torch.empty_like(padded) for _ in range(world_size)]
    dist.all_gather(parts, padded)
    return torch.stack(parts, dim=1).flatten(0, 1)[:total]
