"""Mixup, CutMix, random erasing and label smoothing, as timm publishes them, of numbers drawn per sample.

The numbers are drawn on the CPU and travel in the batch; pixels and targets change on the device. Images are
mixed in pairs, positions 2i and 2i + 1 of an epoch, so a sample's partner does not depend on the batch.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from itpn.errors import UserError

Box = tuple[int, int, int, int]
"""Top, left, height, width in pixels."""
NO_BOX: Box = (0, 0, 0, 0)

ERASED_AREA = (0.02, 1 / 3)
"""Smallest and largest share of an image that is erased."""
MIN_ASPECT = 0.3
"""Height over width of what is erased lies between this and its inverse."""
NUM_TRIES = 10
"""Tries at a box that is smaller than the image."""


@dataclass(frozen=True, kw_only=True)
class MixConfig:
    """Mixup, CutMix, random erasing and label smoothing. The published values are for ImageNet. Small data
    sets need weaker ones or none."""

    mixup: float = 0.8
    """Alpha of Mixup: two images and their labels are blended by a share from Beta(alpha, alpha). 0:
    never."""
    cutmix: float = 1.0
    """Alpha of CutMix: a box of the partner, its area share from Beta(alpha, alpha), is pasted in. 0:
    never."""
    prob: float = 1.0
    """Probability that a pair of images is mixed."""
    switch_prob: float = 0.5
    """Probability of CutMix rather than Mixup, if both are on."""
    erasing: float = 0.25
    """Probability of replacing a box of an image by noise (random erasing). 0: never."""
    smoothing: float = 0.1
    """Label smoothing: share of a label that is spread evenly over all classes. 0: none."""

    def __post_init__(self) -> None:
        for name in ("mixup", "cutmix"):
            alpha = getattr(self, name)
            if alpha and not 1e-3 <= alpha <= 1e3:  # numpy's Beta fails far beyond
                raise UserError(f"mix.{name} is {alpha}; it is 0, for off, or lies between 0.001 and 1000")
        for name in ("prob", "switch_prob", "erasing"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"mix.{name} is {getattr(self, name)}; it is a probability, in [0, 1]")
        if not 0 <= self.smoothing < 1:
            raise UserError(f"mix.smoothing is {self.smoothing}; it is a share, in [0, 1)")

    @property
    def mixes(self) -> bool:
        """Whether images come in pairs, for which a device's batch must be even."""
        return self.prob > 0 and (self.mixup > 0 or self.cutmix > 0)


@dataclass(frozen=True)
class MixDraw:
    """Draws how a sample is mixed with its partner and what is erased of it, and its numbers for drop path.

    Attributes:
        size: Height and width of the images.
    """

    config: MixConfig
    size: tuple[int, int]
    num_drops: int = 0

    def __call__(self, generator: torch.Generator) -> dict[str, Tensor]:
        """``lam: float []``, the share that an image keeps; ``box: long [4]``, which the partner fills (all
        0: it is blended in, but not at all where lam is 1); ``erase: long [4]`` (all 0: nothing);
        ``noise_seed: long []``; where drop path is on, ``drop: float [num_drops]`` in [0, 1). Boxes are top,
        left, height, width."""
        rng = np.random.default_rng(int(torch.randint(1 << 62, (), generator=generator)))
        lam, box = self._mixing(rng)
        draws = {
            "lam": torch.tensor(lam, dtype=torch.float32),
            "box": torch.tensor(box),
            "erase": torch.tensor(self._erasing(rng)),
            "noise_seed": torch.tensor(int(rng.integers(1 << 62))),
        }
        if self.num_drops:
            draws["drop"] = torch.rand(self.num_drops, generator=generator)
        return draws

    def _mixing(self, rng: np.random.Generator) -> tuple[float, Box]:
        config = self.config
        cut = config.cutmix > 0 and (config.mixup == 0 or rng.random() < config.switch_prob)
        if not config.mixes or rng.random() >= config.prob:
            return 1.0, NO_BOX
        alpha = config.cutmix if cut else config.mixup
        lam = float(rng.beta(alpha, alpha))
        if not cut:
            return lam, NO_BOX
        box = self._cut_box(1 - lam, rng)
        return 1 - box[2] * box[3] / math.prod(self.size), box

    def _cut_box(self, share: float, rng: np.random.Generator) -> Box:
        """Of a share of the area, shaped as the image, its centre uniform; what sticks out is cut off."""
        spans = []
        for side in self.size:
            cut = int(side * math.sqrt(share))
            centre = int(rng.integers(side))
            start, end = max(centre - cut // 2, 0), min(centre + (cut + 1) // 2, side)
            spans.append((start, end - start))
        (top, height), (left, width) = spans
        return (top, left, height, width) if height * width else NO_BOX

    def _erasing(self, rng: np.random.Generator) -> Box:
        if rng.random() >= self.config.erasing:
            return NO_BOX
        H, W = self.size
        for _ in range(NUM_TRIES):
            area = H * W * rng.uniform(*ERASED_AREA)
            aspect = MIN_ASPECT ** rng.uniform(-1, 1)
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height < H and width < W:
                top, left = int(rng.integers(H - height + 1)), int(rng.integers(W - width + 1))
                return (top, left, height, width) if height * width else NO_BOX
        return NO_BOX


def mix(images: Tensor, targets: Tensor, lam: Tensor, box: Tensor) -> tuple[Tensor, Tensor]:
    """Each image and its target mixed with its partner's: rows 2i and 2i + 1, both by the numbers of row 2i.

    Args:
        images: ``[B, c, H, W]``.
        targets: Probabilities ``[B, classes]``.
        lam: What of itself an image keeps, ``[B]``.
        box: What the partner fills, ``[B, 4]``; of no area: the two are blended.

    Raises:
        UserError: the batch is odd.
    """
    if len(images) % 2:
        raise UserError(
            f"Mixup and CutMix take images in pairs, but a device's batch has {len(images)}; give an even "
            "--device-batch, or switch both off"
        )
    lam, box = lam[::2].view(-1, 1, 1, 1), box[::2]
    cut = _inside(box, images)
    kept = torch.where(cut.flatten(1).any(1).view(-1, 1, 1, 1), ~cut, lam)
    return _paired(images, kept), _paired(targets, lam.view(-1, 1))


def _paired(x: Tensor, kept: Tensor) -> Tensor:
    """``x [B, …]`` times ``kept [B / 2, …]`` and its partner times the rest."""
    pairs, kept = x.reshape(-1, 2, *x.shape[1:]), kept.unsqueeze(1).to(x.dtype)
    return (pairs * kept + pairs.flip(1) * (1 - kept)).flatten(0, 1)


def erase(images: Tensor, boxes: Tensor, seeds: Tensor) -> Tensor:
    """Normalised images ``[B, c, H, W]`` with noise of mean 0 and deviation 1 in a box of each.

    Args:
        boxes: ``[B, 4]``; of no area: nothing is erased.
        seeds: ``[B]``, of which the noise is a function.
    """
    if images.is_cpu:  # whose arithmetic is dear, and where nothing waits for the choice
        rows = boxes.any(1).nonzero().flatten()
        return images.index_copy(0, rows, _erased(images[rows], boxes[rows], seeds[rows]))
    return _erased(images, boxes, seeds)


def _erased(images: Tensor, boxes: Tensor, seeds: Tensor) -> Tensor:
    return torch.where(_inside(boxes, images), noise(seeds, images.shape[1:]).to(images.dtype), images)


def _inside(boxes: Tensor, images: Tensor) -> Tensor:
    """The pixels in boxes ``[B, 4]`` of images ``[…, H, W]``: bool ``[B, 1, H, W]``."""
    H, W = images.shape[-2:]
    top, left, height, width = boxes.view(-1, 4, 1, 1, 1).unbind(1)
    rows = torch.arange(H, device=boxes.device).view(H, 1)
    columns = torch.arange(W, device=boxes.device)
    return (rows >= top) & (rows < top + height) & (columns >= left) & (columns < left + width)


def noise(seeds: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Independent standard normal numbers ``[B, c, H, W]``, each a function of seed, channel, row and column.

    So they are the same on every device (up to rounding) and whatever the batch, unlike those of a generator
    there. Two neighbouring columns share the 64 bits of a hash (Box and Muller).
    """
    num_channels, H, W = shape
    bits = seeds.view(-1, 1, 1, 1)
    for axis, num in enumerate((num_channels, H, -(-W // 2)), start=-3):
        ids = torch.arange(1, num + 1, device=seeds.device)
        bits = _scrambled(bits + _GOLDEN * ids.view(-1, *[1] * (-1 - axis)))
    radius = (-2 * ((((bits >> 40) & _24_BITS) + 1) * 2.0**-24).log()).sqrt()
    angle = (bits & _24_BITS) * (2 * math.pi * 2.0**-24)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1).flatten(-2)[..., :W]


_24_BITS = (1 << 24) - 1
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)


def _scrambled(bits: Tensor) -> Tensor:
    """SplitMix64's finaliser: every bit of a long depends on every bit that goes in."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = _folded(bits, shift).mul_(factor - (1 << 64))
    return _folded(bits, 31)


def _folded(bits: Tensor, by: int) -> Tensor:
    """Exclusive or with itself shifted to the right, zeros from the left."""
    return (bits >> by).bitwise_and_((1 << (64 - by)) - 1).bitwise_xor_(bits)


def smoothed_targets(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Labels ``[B]`` as probabilities ``[B, classes]``, with a share spread evenly over all classes."""
    spread = smoothing / num_classes
    targets = torch.full((len(labels), num_classes), spread, device=labels.device)
    return targets.scatter_(1, labels.unsqueeze(1), 1 - smoothing + spread)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each sample, ``[B]``, in fp32, of logits and probabilities ``[B, classes]``."""
    return F.cross_entropy(logits.float(), targets, reduction="none")
