"""What a frozen model makes of every image of a split, each image once over all ranks."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from itpn.data.loader import Batch, eval_loader
from itpn.data.picture import BadImageError, Size
from itpn.data.progress import watched
from itpn.data.source import Images
from itpn.data.transforms import CROP_RATIO
from itpn.errors import UserError

OutputFn = Callable[[Tensor], Tensor]
"""Images uint8 [B, 3, H, W] on the device -> rows [B, D], features or logits."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """How images are gone through, each once over all ranks; the fields are those of `eval_loader`."""

    image_size: Size
    crop_ratio: float = CROP_RATIO
    device: torch.device
    rank: int = 0
    world_size: int = 1
    workers: int | None = None
    on_bad: Callable[[BadImageError], None] | None = None


def outputs(
    output_fn: OutputFn, images: Images, batch_size: int, through: Pass, progress: str = ""
) -> tuple[Tensor, Tensor]:
    """This rank's rows fp32 [n, D] and labels long [n], on the device: of images r, r + world_size, ….

    Args:
        progress: What a bar on the terminal calls this work; empty: no bar, as beside a run's live line.

    Raises:
        UserError: there are fewer images than ranks.
    """
    rank, world_size = through.rank, through.world_size
    if len(images) < world_size:
        raise UserError(f"{world_size} ranks for {len(images)} images: each needs one; use fewer ranks")
    batches: Iterable[Batch] = eval_loader(
        images,
        image_size=through.image_size,
        crop_ratio=through.crop_ratio,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        workers=through.workers,
        device=through.device,
        on_bad=through.on_bad,
    )
    if progress:
        num_mine = len(range(rank, len(images), world_size))
        batches = watched(batches, progress, -(-num_mine // batch_size))
    return extract(output_fn, batches, through.device)


@torch.no_grad()
def extract(output_fn: OutputFn, batches: Iterable[Batch], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows [n, D] in fp32 and labels [n] of all batches, on the device."""
    rows, labels = [], []
    for batch in batches:
        images = batch["images"].to(device, non_blocking=True)
        rows.append(output_fn(images).float())
        labels.append(batch["labels"].to(device, non_blocking=True))
    return torch.cat(rows), torch.cat(labels)


def gathered(mine: Tensor, total: int, world_size: int) -> Tensor:
    """All ranks' rows [total, …], where rank r holds those numbered r, r + world_size, …, in that order."""
    if world_size == 1:
        return mine
    rows = -(-total // world_size)
    padded = mine.new_zeros(rows, *mine.shape[1:])
    padded[: len(mine)] = mine
    parts = [torch.empty_like(padded) for _ in range(world_size)]
    dist.all_gather(parts, padded)
    return torch.stack(parts, dim=1).flatten(0, 1)[:total]


def summed(counts: Tensor, world_size: int) -> Tensor:
    """The sum over all ranks, on every rank."""
    if world_size > 1:
        dist.all_reduce(counts)
    return counts
