"""k-nearest-neighbour classification with frozen features: a monitor of pre-training that needs no training.

Each image of the validation split is classified by the k training images of highest cosine similarity s, each
voting for its class with weight exp(s / temperature).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from itpn.data.classes import check_same_classes
from itpn.data.source import Images
from itpn.errors import UserError
from itpn.evaluate.gather import OutputFn, Pass, gathered, outputs, summed

MAX_SIMILARITIES = 1 << 26
"""Similarities held at a time (256 MB), which bounds the memory for any size of the training split."""


@dataclass(frozen=True, kw_only=True)
class KnnConfig:
    every: int = 0
    """Epochs between evaluations. 0: never."""
    root: Path | None = None
    """Folder with train and val in class folders. None: the folder of the training images."""
    k: int = 20
    """Number of neighbours that vote."""
    temperature: float = 0.07
    """Temperature of the vote. A neighbour's weight is exp(similarity / temperature)."""
    batch_size: int = 64
    """Images per rank and forward pass."""

    def __post_init__(self) -> None:
        if self.k < 1 or self.batch_size < 1 or not self.temperature > 0 or self.every < 0:
            raise UserError("knn.k, knn.batch_size and knn.temperature must be positive, knn.every 0 or more")


def knn(
    features_fn: OutputFn, train: Images, val: Images, config: KnnConfig, through: Pass
) -> dict[str, float]:
    """Top-1 and top-5 accuracy on `val`, each in 0..1, each image counted once; the same on every rank.

    An unreadable image is no neighbour in `train` and wrong in `val`.
    """
    num_classes = len(check_same_classes(train, val))

    def features_of(images: Images) -> tuple[Tensor, Tensor]:
        features, labels = outputs(features_fn, images, config.batch_size, through)
        return normalize(features, dim=1), labels

    keys, key_labels = (gathered(mine, len(train), through.world_size) for mine in features_of(train))
    keys, key_labels = keys[key_labels >= 0], key_labels[key_labels >= 0]
    queries, labels = features_of(val)
    hits = torch.zeros(2, dtype=torch.long, device=through.device)
    chunk = max(1, MAX_SIMILARITIES // max(1, len(keys)))
    for start in range(0, len(queries), chunk):
        some = slice(start, start + chunk)
        votes = knn_votes(queries[some], keys, key_labels, num_classes, config.k, config.temperature)
        hits += torch.stack([_hits(votes, labels[some], 1), _hits(votes, labels[some], 5)])
    top1, top5 = summed(hits, through.world_size).tolist()
    return {"knn_top1": top1 / len(val), "knn_top5": top5 / len(val)}


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
