"""What is in a proposed box: class, better box and mask, in one stage (Mask R-CNN, arXiv 1703.06870) or three
(Cascade R-CNN, arXiv 1712.00726)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.ops import batched_nms, clip_boxes_to_image, generalized_box_iou_loss, remove_small_boxes

from itpn.errors import UserError
from itpn.heads.boxes import UNKNOWN, Generators, Objects, Sizes, draw, match, pool, shares
from itpn.heads.masks import mask_targets
from itpn.heads.towers import BoxHead, HeadConfig, MaskHead, of_class


@dataclass(frozen=True, kw_only=True)
class RegionConfig:
    """Box and mask heads. Defaults are the published ones. Mask R-CNN is the first stage of the cascade."""

    cascade: bool = False
    """Use three stages, each starting from the boxes of the one before, instead of one."""
    stage_ious: tuple[float, ...] = (0.5, 0.6, 0.7)
    """Lowest IoU with an object that makes a box positive, per stage. Other boxes are background."""
    stage_weights: tuple[float, ...] = (1.0, 0.5, 0.25)
    """Weight of each stage's losses."""
    stage_deviations: tuple[tuple[float, float], ...] = ((0.1, 0.2), (0.05, 0.1), (0.033, 0.067))
    """Scale of the box deltas, per stage: the change of centre and log size that a prediction of 1 makes."""
    num_sampled: int = 512
    """Number of boxes per image to train on."""
    positive_fraction: float = 0.25
    """Largest share of positives among them."""
    head: HeadConfig = field(default_factory=HeadConfig)
    class_weight: float = 1.0
    """Weight of the cross-entropy loss."""
    box_weight: float = 10.0
    """Weight of the GIoU loss."""
    mask_weight: float = 1.0
    """Weight of the mask's cross-entropy loss."""
    min_score: float = 0.05
    """Lowest score of a detection that is kept."""
    nms_iou: float = 0.5
    """IoU with a better detection of the same class above which a detection is dropped."""
    num_detections: int = 100
    """Largest number of detections per image; the best are kept."""

    def __post_init__(self) -> None:
        lengths = {len(self.stage_ious), len(self.stage_weights), len(self.stage_deviations)}
        if len(lengths) > 1 or not self.stage_ious:
            raise UserError("detector.regions: stage_ious, stage_weights, stage_deviations differ in length")
        fractions = (*self.stage_ious, self.nms_iou, self.positive_fraction)
        if not all(0 < value <= 1 for value in fractions) or not 0 <= self.min_score < 1:
            raise UserError(
                "detector.regions: IoUs and positive_fraction must lie in (0, 1], min_score in [0, 1)"
            )
        weights = (*self.stage_weights, self.class_weight, self.box_weight, self.mask_weight)
        if min(weights) < 0 or min(value for pair in self.stage_deviations for value in pair) <= 0:
            raise UserError("detector.regions: weights must not be negative, stage_deviations above 0")
        if min(self.num_sampled, self.num_detections) < 1:
            raise UserError("detector.regions: num_sampled and num_detections must be at least 1")


class Stage(NamedTuple):
    weight: float
    coder: Any
    matcher: Any


class Rois(NamedTuple):
    """Boxes of one image that a stage is trained on: ``boxes [r, 4]``; ``matches [r]``, the object of each or
    below 0; ``labels [r]``, its class, the number of classes for background; ``given [r]``, True for an
    object's own box."""

    boxes: Tensor
    matches: Tensor
    labels: Tensor
    given: Tensor

    @property
    def positive(self) -> Tensor:
        return (self.matches >= 0).nonzero().flatten()


class Detections(NamedTuple):
    """Found in one image, best first: ``boxes [n, 4]`` in pixels of the padded image, ``scores [n]``,
    ``labels [n]``, and ``masks [n, 28, 28]``, probabilities over each box, or None."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None


class Regions(nn.Module):
    pool = staticmethod(pool)

    def __init__(self, width: int, num_classes: int, masks: bool, config: RegionConfig) -> None:
        super().__init__()
        self.config, self.num_classes = config, num_classes
        published = zip(config.stage_ious, config.stage_weights, config.stage_deviations, strict=True)
        stages = [
            Stage(weight, BoxCoder((1 / centre, 1 / centre, 1 / size, 1 / size)), Matcher(iou, iou))
            for iou, weight, (centre, size) in published
        ]
        self.stages = stages if config.cascade else stages[:1]
        self.heads = nn.ModuleList([BoxHead(width, num_classes, config.head) for _ in self.stages])
        self.mask_heads = nn.ModuleList(
            [MaskHead(width, num_classes, config.head) for _ in self.stages] if masks else []
        )

    def losses(
        self,
        maps: Sequence[Tensor],
        proposals: Sequence[Tensor],
        sizes: Sizes,
        objects: Sequence[Objects],
        generators: Generators,
    ) -> list[dict[str, Tensor]]:
        """``class``, ``box`` and, where there are masks, ``mask`` of each stage, without any weights.

        Each is a mean over images: of the mean over an image's drawn boxes of the cross-entropy; of the sum
        over its positive boxes of the GIoU loss of the decoded box, divided by the number of drawn ones; of
        the mean over its positive boxes of the mask's cross-entropy. An image without positives adds 0. As
        published all images' boxes are averaged at once, which differs for masks alone: there an image with
        many positives counts for more, and accumulation would matter.
        """
        losses, boxes = [], list(proposals)
        for i, stage in enumerate(self.stages):
            rois = [self.draw(*image, stage) for image in zip(boxes, sizes, objects, generators, strict=True)]
            all_boxes = [image.boxes for image in rois]
            logits, deltas = self.heads[i](self.pool(maps, all_boxes, BoxHead.size))
            parts = self.box_losses(logits, deltas, rois, objects, stage)
            if self.mask_heads:
                parts["mask"] = self.mask_loss(self.mask_heads[i], maps, rois, objects)
            losses.append(parts)
            if i + 1 < len(self.stages):
                labels = torch.cat([image.labels for image in rois])
                refined = self.refine(logits, deltas, all_boxes, sizes, stage, labels)
                boxes = [new[~image.given] for new, image in zip(refined, rois, strict=True)]
        return losses

    @torch.no_grad()
    def draw(
        self,
        proposals: Tensor,
        size: tuple[int, int],
        objects: Objects,
        generator: torch.Generator | None,
        stage: Stage,
    ) -> Rois:
        """The boxes of one image to train on, from its proposals and its objects' own boxes."""
        boxes = torch.cat([proposals, objects.boxes])
        if len(boxes) == 0:  # only where the network's numbers are no longer finite
            boxes = boxes.new_tensor([[0, 0, size[1], size[0]]])
        matches = match(objects.boxes, boxes, stage.matcher)
        ids = draw(matches, self.config.num_sampled, self.config.positive_fraction, generator)
        matches = matches[ids]
        labels = torch.full_like(matches, self.num_classes)
        labels[matches >= 0] = objects.labels[matches[matches >= 0]]
        return Rois(boxes[ids], matches, labels, ids >= len(proposals))

    def box_losses(
        self, logits: Tensor, deltas: Tensor, rois: Sequence[Rois], objects: Sequence[Objects], stage: Stage
    ) -> dict[str, Tensor]:
        """The losses of class and box from all images' boxes end to end, with their objects' own."""
        weights = shares([len(image.boxes) for image in rois], logits.device)
        labels = torch.cat([image.labels for image in rois])
        positive = (labels < self.num_classes).nonzero().flatten()
        chosen = of_class(deltas.index_select(0, positive), labels[positive])
        boxes = torch.cat([image.boxes for image in rois])[positive]
        target = torch.cat(
            [own.boxes[image.matches[image.positive]] for image, own in zip(rois, objects, strict=True)]
        )
        entropy = F.cross_entropy(logits, labels, reduction="none")
        giou = generalized_box_iou_loss(stage.coder.decode_single(chosen, boxes), target)
        return {"class": (entropy * weights).sum(), "box": (giou * weights[positive]).sum()}

    def mask_loss(
        self, head: nn.Module, maps: Sequence[Tensor], rois: Sequence[Rois], objects: Sequence[Objects]
    ) -> Tensor:
        """Of the positive boxes whose object has a mask."""
        boxes, labels, targets = [], [], []
        for image, own in zip(rois, objects, strict=True):
            assert own.masks is not None
            known = (own.masks[:, 0, 0] != UNKNOWN)[image.matches[image.positive]]
            ids = image.positive[known]
            boxes.append(image.boxes[ids])
            labels.append(image.labels[ids])
            size = 2 * MaskHead.size
            targets.append(mask_targets(own.masks, own.boxes, boxes[-1], image.matches[ids], size))
        logits = head(self.pool(maps, boxes, MaskHead.size), torch.cat(labels))
        entropy = F.binary_cross_entropy_with_logits(logits, torch.cat(targets), reduction="none")
        return (entropy.mean((1, 2)) * shares([len(image) for image in boxes], logits.device)).sum()

    @torch.no_grad()
    def refine(
        self,
        logits: Tensor,
        deltas: Tensor,
        boxes: Sequence[Tensor],
        sizes: Sizes,
        stage: Stage,
        labels: Tensor | None = None,
    ) -> list[Tensor]:
        """Every image's boxes moved as the class says that is given, or else looks best, inside the image."""
        best = logits[:, :-1].argmax(1)
        if labels is not None:
            best = torch.where(labels < self.num_classes, labels, best)
        moved = stage.coder.decode_single(of_class(deltas, best), torch.cat(list(boxes)))
        by_image = torch.split(moved, [len(image) for image in boxes])
        return [clip_boxes_to_image(image, size) for image, size in zip(by_image, sizes, strict=True)]

    @torch.no_grad()
    def detect(self, maps: Sequence[Tensor], proposals: Sequence[Tensor], sizes: Sizes) -> list[Detections]:
        """Every stage moves the boxes on; the classes are those of the stages' mean logits, the masks their
        mean probabilities."""
        boxes, votes = list(proposals), []
        for i, stage in enumerate(self.stages):
            logits, deltas = self.heads[i](self.pool(maps, boxes, BoxHead.size))
            votes.append(logits)
            if i + 1 < len(self.stages):
                boxes = self.refine(logits, deltas, boxes, sizes, stage)
        counts = [len(image) for image in boxes]
        scores = torch.split(torch.stack(votes).mean(0).softmax(1)[:, :-1], counts)
        repeated = torch.cat(boxes).repeat_interleave(self.num_classes, dim=0)
        decoded = stage.coder.decode_single(deltas.flatten(0, 1), repeated).view_as(deltas)
        by_image = zip(torch.split(decoded, counts), scores, sizes, strict=True)
        found = [self.choose(*image) for image in by_image]
        return self.with_masks(maps, found) if self.mask_heads else found

    def choose(self, boxes: Tensor, scores: Tensor, size: tuple[int, int]) -> Detections:
        """The best of one image's boxes ``[R, C, 4]`` with their scores ``[R, C]``."""
        rows, labels = (scores > self.config.min_score).nonzero().unbind(1)
        boxes, scores = clip_boxes_to_image(boxes[rows, labels], size), scores[rows, labels]
        keep = remove_small_boxes(boxes, 1e-2)
        boxes, scores, labels = boxes[keep], scores[keep], labels[keep]
        best = batched_nms(boxes, scores, labels, self.config.nms_iou)[: self.config.num_detections]
        return Detections(boxes[best], scores[best], labels[best], None)

    def with_masks(self, maps: Sequence[Tensor], found: Sequence[Detections]) -> list[Detections]:
        boxes, labels = [image.boxes for image in found], torch.cat([image.labels for image in found])
        pooled = self.pool(maps, boxes, MaskHead.size)
        masks = torch.stack([head(pooled, labels).sigmoid() for head in self.mask_heads]).mean(0)
        by_image = torch.split(masks, [len(image) for image in boxes])
        return [image._replace(masks=own) for image, own in zip(found, by_image, strict=True)]
