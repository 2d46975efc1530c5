"""Detection and instance segmentation: Mask R-CNN or Cascade Mask R-CNN on the pre-trained pyramid itself."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from itpn.errors import UserError
from itpn.heads.boxes import Generators, Objects
from itpn.heads.proposals import STRIDES, ProposalConfig, Proposals
from itpn.heads.regions import Detections, RegionConfig, Regions
from itpn.heads.towers import BoxHead, MaskHead
from itpn.nn.normalise import Normalise
from itpn.nn.pyramid import Model, ModelConfig, detection_maps


@dataclass(frozen=True, kw_only=True)
class DetectorConfig:
    num_classes: int = 80
    """Number of classes, without the background. Training sets it to the number in the annotations."""
    masks: bool = True
    """Predict masks as well as boxes."""
    mean: tuple[float, ...] | None = None
    """Mean of each image channel, in 0..1. None: as for the initial weights, else ImageNet's."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each image channel, in 0..1. None: as for the initial weights, else
    ImageNet's."""
    proposals: ProposalConfig = field(default_factory=ProposalConfig)
    regions: RegionConfig = field(default_factory=RegionConfig)

    def __post_init__(self) -> None:
        if not 1 <= self.num_classes <= 1_000_000:
            raise UserError(f"detector.num_classes: {self.num_classes} lies outside 1..1,000,000")
        if (self.mean is None) != (self.std is None):
            raise UserError("detector.mean and detector.std: give both or neither")


@dataclass(frozen=True)
class DetectionDraw:
    """Draws a sample's seed of anchors and boxes to train on, and its numbers for drop path."""

    num_drops: int = 0

    def __call__(self, generator: torch.Generator) -> dict[str, Tensor]:
        """``sampling: long []`` and, where drop path is on, ``drop: float [num_drops]`` in [0, 1)."""
        draws = {"sampling": torch.randint(2**62, (), generator=generator)}
        if self.num_drops:
            draws["drop"] = torch.rand(self.num_drops, generator=generator)
        return draws


class Detector(nn.Module):
    """Backbone, pyramid and heads: what is where in images.

    Args:
        config: with its mean and std.

    Raises:
        UserError: the model has no pyramid.
    """

    def __init__(self, model: ModelConfig, config: DetectorConfig) -> None:
        super().__init__()
        if config.mean is None or config.std is None:
            raise ValueError("config.mean and config.std are not settled")
        if model.pyramid is None:
            raise UserError("a detector needs a pyramid: model.pyramid must not be none")
        width = model.pyramid.width
        self.config = config
        self.normalise = Normalise(config.mean, config.std, model.backbone.in_channels)
        self.model = Model(model)
        self.proposals = Proposals(width, config.proposals)
        self.regions = Regions(width, config.num_classes, config.masks, config.regions)

    def maps(self, images: Tensor, drop: Tensor | None = None) -> list[Tensor]:
        """Normalised images ``[B, c, H, W]`` to maps ``[B, F, h, w]`` of strides 4 to 64.

        Raises:
            UserError: a side is no multiple of the unit, or shorter than the coarsest stride.
        """
        if min(images.shape[2:]) < STRIDES[-1]:
            raise UserError(f"images of {images.shape[2]} x {images.shape[3]} pixels: a detector needs 64")
        _, levels = self.model(images, drop=drop)
        assert levels is not None
        return detection_maps(levels, self.model.backbone.grid_of(images))

    def detect(self, images: Tensor, sizes: Tensor) -> list[Detections]:
        """Detections of each image, in pixels of the padded one; the module must be in evaluation mode.

        Args:
            images: normalised, ``[B, c, H, W]``, padded at the right and below.
            sizes: ``long [B, 2]``, height and width without padding.
        """
        maps, inner = self.maps(images), sizes_of(sizes)
        boxes, _ = self.proposals(maps, inner, None, [None] * len(images))
        return self.regions.detect(maps, boxes, inner)

    @torch.no_grad()
    def predict(self, images: Tensor, sizes: Tensor) -> list[Detections]:
        """`detect` on images ``uint8 [B, c, H, W]``."""
        return self.detect(self.normalise(images), sizes)


class DetectObjective(Detector):
    """The detector, and what it is trained by.

    Every loss is a mean over images, and what is drawn for an image depends on its seed alone: neither
    accumulation nor the number of ranks changes anything, but that batch norm sees other boxes then.
    """

    @property
    def draw(self) -> DetectionDraw:
        """What the loader draws for each sample."""
        backbone = self.model.backbone
        return DetectionDraw(backbone.num_drops if backbone.config.drop_path else 0)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """From a batch of images with what is to be found in them.

        Args:
            batch: ``images: uint8 [B, c, H, W]``, padded at the right and below; ``sizes: long [B, 2]``,
                height and width without padding; ``boxes: float [B, M, 4]``; ``labels: long [B, M]``, -1 for
                no object; ``masks: uint8 [B, M, S, S]``, each laid over its box, of 0 and 1, or 255
                throughout where it is unknown; perhaps ``drop [B, D]`` and ``sampling: long [B]``, a seed per
                image, without which torch's global generator decides which anchors and boxes are trained on.

        Returns:
            ``loss``, the sum of its parts ``rpn_objectness``, ``rpn_box``, ``class``, ``box`` and ``mask``;
            of a cascade also each stage's, as ``stage1_class``, without weights.
        """
        objects, sizes, config = objects_of(batch, self.config.masks), sizes_of(batch["sizes"]), self.config
        generators = generators_of(batch)
        maps = self.maps(self.normalise(batch["images"]), batch.get("drop"))
        boxes, parts = self.proposals(maps, sizes, objects, generators)
        parts = {
            "rpn_objectness": config.proposals.objectness_weight * parts["rpn_objectness"],
            "rpn_box": config.proposals.box_weight * parts["rpn_box"],
        }
        stages = self.regions.losses(maps, boxes, sizes, objects, generators)
        weights = {
            "class": config.regions.class_weight,
            "box": config.regions.box_weight,
            "mask": config.regions.mask_weight,
        }
        for name in stages[0]:
            weighted = [
                own.weight * losses[name] for own, losses in zip(self.regions.stages, stages, strict=True)
            ]
            parts[name] = weights[name] * torch.stack(weighted).sum()
        loss = torch.stack(list(parts.values())).sum()
        if len(stages) > 1:
            parts |= {
                f"stage{i}_{name}": losses[name] for i, losses in enumerate(stages, 1) for name in losses
            }
        return {"loss": loss, **{name: part.detach() for name, part in parts.items()}}

    def begin_step(self, step: int, num_steps: int) -> None: ...

    def end_step(self, step: int, num_steps: int) -> None: ...

    def compile_blocks(self) -> list[nn.Module]:
        """The modules that are worth compiling one by one."""
        pyramid: Any = self.model.pyramid
        return [*self.model.backbone.blocks(), pyramid]

    def flops(self, size: tuple[int, int], num_boxes: float, num_masks: float) -> float:
        """Floating-point operations of a training step on one image: matrix products and convolutions,
        backward as twice forward.

        There is no number for all images: they differ in size, and in how many objects are found in them.

        Args:
            size: height and width that the image is padded to.
            num_boxes: boxes that the box heads see of it, of all stages together.
            num_masks: boxes that the mask heads see.
        """

        with torch.device("meta"):  # it knows no autocast, so the layers that are guarded from it stand alone
            twin = DetectObjective(self.model.config, self.config).eval()
            images = torch.empty(1, self.model.config.backbone.in_channels, *size)
            maps, forward = _counted(twin.maps, images)
            width = maps[0].shape[1]
            forward += _counted(twin.proposals.head, maps)[1]
            box_head: Any = twin.regions.heads[0]
            hidden, of_box = _counted(box_head.convs, torch.empty(1, width, BoxHead.size, BoxHead.size))
            of_box += _counted(box_head.classify, hidden)[1] + _counted(box_head.regress, hidden)[1]
            forward += num_boxes * of_box
            for mask_head in twin.regions.mask_heads[:1]:
                pooled, label = torch.empty(1, width, MaskHead.size, MaskHead.size), torch.tensor([0])
                forward += num_masks * _counted(mask_head, pooled, label)[1]
        return 3 * forward


def _counted(call: Callable[..., Any], *inputs: Any) -> tuple[Any, float]:
    """What a call returns, and its floating-point operations."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        result = call(*inputs)
    return result, float(counter.get_total_flops())


def objects_of(batch: dict[str, Tensor], masks: bool) -> list[Objects]:
    """What is to be found in each image of a batch, without what fills it up."""
    objects = []
    for i, labels in enumerate(batch["labels"]):
        real = labels >= 0
        objects.append(
            Objects(batch["boxes"][i][real], labels[real], batch["masks"][i][real] if masks else None)
        )
    return objects


def sizes_of(sizes: Tensor) -> list[tuple[int, int]]:
    return [(height, width) for height, width in sizes.tolist()]


def generators_of(batch: dict[str, Tensor]) -> Generators:
    """A generator for each image from its seed, or None where the batch brings no seeds."""
    if "sampling" not in batch:
        return [None] * len(batch["images"])
    return [torch.Generator().manual_seed(seed) for seed in batch["sampling"].tolist()]
