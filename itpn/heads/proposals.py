"""Where objects may be: the region proposal network (arXiv 1506.01497) on the pyramid's maps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import batched_nms, clip_boxes_to_image, remove_small_boxes

from itpn.errors import UserError
from itpn.heads.boxes import Generators, Objects, Sizes, draw, match

STRIDES = (4, 8, 16, 32, 64)


@dataclass(frozen=True, kw_only=True)
class ProposalConfig:
    """Region proposals. Defaults are the published ones of Mask R-CNN."""

    anchor_scale: float = 8.0
    """Side of the square anchor in strides of its map. 8 gives anchors of 32 to 512 pixels."""
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Aspect ratios (height / width) of the anchors at each location."""
    positive_iou: float = 0.7
    """Lowest IoU with an object that makes an anchor positive. The best anchor of each object is always
    positive."""
    negative_iou: float = 0.3
    """IoU with every object below which an anchor is background."""
    num_sampled: int = 256
    """Number of anchors per image to train on."""
    positive_fraction: float = 0.5
    """Largest share of positives among them."""
    num_before_nms: tuple[int, int] = (2000, 1000)
    """Number of proposals per map that enter NMS, in training and in prediction."""
    num_proposals: tuple[int, int] = (1000, 1000)
    """Number of proposals per image, in training (2000 for the published cascade) and in prediction."""
    nms_iou: float = 0.7
    """IoU with a better proposal of the same map above which a proposal is dropped."""
    objectness_weight: float = 1.0
    """Weight of the objectness loss."""
    box_weight: float = 1.0
    """Weight of the box loss."""
    box_beta: float = 0.0
    """Beta of the smooth-L1 box loss, its transition from square to absolute. The published cascade has
    1/9."""

    def __post_init__(self) -> None:
        if not 0 <= self.negative_iou <= self.positive_iou <= 1 or not 0 < self.nms_iou <= 1:
            raise UserError(
                "detector.proposals: 0 <= negative_iou <= positive_iou <= 1 and 0 < nms_iou <= 1 must hold"
            )
        if min(self.anchor_scale, *self.anchor_ratios, 1 if self.anchor_ratios else 0) <= 0:
            raise UserError(
                "detector.proposals: anchor_scale and anchor_ratios (at least one) must be above 0"
            )
        if min(self.num_sampled, *self.num_before_nms, *self.num_proposals) < 1:
            raise UserError("detector.proposals: every number of anchors and proposals must be at least 1")
        if not 0 < self.positive_fraction <= 1:
            raise UserError(
                f"detector.proposals.positive_fraction: {self.positive_fraction} lies outside (0, 1]"
            )
        if min(self.objectness_weight, self.box_weight, self.box_beta) < 0:
            raise UserError("detector.proposals: weights and box_beta must not be negative")


class Anchors(NamedTuple):
    """Of all maps end to end: ``boxes [A, 4]``, and how many each map has."""

    boxes: Tensor
    counts: list[int]

    def inside(self, size: tuple[int, int]) -> Tensor:
        """bool ``[A]``: whose centre lies in the image and not in its padding."""
        x, y = (self.boxes[:, :2] + self.boxes[:, 2:]).div(2).unbind(1)
        return (x < size[1]) & (y < size[0])


class Proposals(nn.Module):
    """One 3x3 convolution for all maps, then objectness and box of every anchor, these in fp32."""

    def __init__(self, width: int, config: ProposalConfig) -> None:
        super().__init__()
        self.config = config
        self.head = RPNHead(width, len(config.anchor_ratios))
        self.coder = BoxCoder(weights=(1.0, 1.0, 1.0, 1.0))
        self.matcher = Matcher(config.positive_iou, config.negative_iou, allow_low_quality_matches=True)

    def forward(
        self, maps: Sequence[Tensor], sizes: Sizes, objects: Sequence[Objects] | None, generators: Generators
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """From maps ``[B, F, h, w]`` of strides 4 to 64.

        Returns:
            Boxes of each image, best first, inside it; and, where ``objects`` are given, the losses
            ``rpn_objectness`` and ``rpn_box`` without their weights: means over images of an image's sum over
            its drawn anchors, divided by their number.
        """
        logits, deltas = self.predict(maps)
        anchors = self.anchors(maps)
        inside = [anchors.inside(size) for size in sizes]
        images = list(zip(logits, deltas, inside, strict=True))
        boxes = [self.propose(*image, anchors, size) for image, size in zip(images, sizes, strict=True)]
        if objects is None:
            return boxes, {}
        losses = [
            self.losses(*image, anchors.boxes, own, generator)
            for image, own, generator in zip(images, objects, generators, strict=True)
        ]
        objectness, box = torch.stack(losses).mean(0)
        return boxes, {"rpn_objectness": objectness, "rpn_box": box}

    def predict(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Objectness ``[B, A]`` and box deltas ``[B, A, 4]`` of all maps end to end."""
        logits, deltas = [], []
        for level in maps:
            hidden = self.head.conv(level)
            with torch.autocast(level.device.type, enabled=False):
                scores, boxes = self.head.cls_logits(hidden.float()), self.head.bbox_pred(hidden.float())
            logits.append(scores.movedim(1, -1).flatten(1))
            deltas.append(boxes.movedim(1, -1).reshape(len(level), -1, 4))
        return torch.cat(logits, dim=1), torch.cat(deltas, dim=1)

    def anchors(self, maps: Sequence[Tensor]) -> Anchors:
        """Centred on each cell's upper left corner, as published.

        torchvision's ``AnchorGenerator`` rounds anchors to pixels and guesses the stride from sizes, wrongly
        where pooling has dropped a row.
        """
        ratios = torch.tensor(self.config.anchor_ratios)
        extent = torch.stack([ratios.rsqrt(), ratios.sqrt()], dim=1) * self.config.anchor_scale / 2
        around = torch.cat([-extent, extent], dim=1).to(maps[0].device)  # [ratios, 4] in strides
        boxes = []
        for level, stride in zip(maps, STRIDES, strict=True):
            rows, cols = (torch.arange(n, device=level.device) for n in level.shape[2:])
            y, x = torch.meshgrid(rows, cols, indexing="ij")
            centres = torch.stack([x, y, x, y], dim=-1)
            boxes.append(((centres[:, :, None] + around) * stride).view(-1, 4))
        return Anchors(torch.cat(boxes), [len(level) for level in boxes])

    @torch.no_grad()
    def propose(
        self, logits: Tensor, deltas: Tensor, inside: Tensor, anchors: Anchors, size: tuple[int, int]
    ) -> Tensor:
        """The best boxes of one image, each overlapping better ones of its map no more than ``nms_iou``."""
        config, which = self.config, 0 if self.training else 1
        ids, levels, first = [], [], 0
        scores = logits.masked_fill(~inside, float("-inf"))
        for level, found in enumerate(torch.split(scores, anchors.counts)):
            best = found.topk(min(config.num_before_nms[which], len(found))).indices + first
            ids.append(best)
            levels.append(torch.full_like(best, level))
            first += len(found)
        chosen, level_of = torch.cat(ids), torch.cat(levels)
        boxes = self.coder.decode_single(deltas[chosen], anchors.boxes[chosen])
        boxes = clip_boxes_to_image(boxes, size)
        keep = remove_small_boxes(boxes, 1e-3)
        keep = keep[inside[chosen[keep]]]
        boxes, level_of, scores = boxes[keep], level_of[keep], scores[chosen[keep]]
        best = batched_nms(boxes, scores, level_of, config.nms_iou)[: config.num_proposals[which]]
        kept: Tensor = boxes[best]
        return kept

    def losses(
        self,
        logits: Tensor,
        deltas: Tensor,
        inside: Tensor,
        anchors: Tensor,
        objects: Objects,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Objectness and box loss ``[2]`` of one image."""
        config, ids = self.config, inside.nonzero().flatten()
        matches = match(objects.boxes, anchors[ids], self.matcher)
        drawn = draw(matches, config.num_sampled, config.positive_fraction, generator)
        ids, matches = ids[drawn], matches[drawn]
        positive = matches >= 0
        objectness = F.binary_cross_entropy_with_logits(
            logits.index_select(0, ids), positive.to(logits), reduction="sum"
        )
        found = ids[positive]
        target = self.coder.encode_single(objects.boxes[matches[positive]], anchors[found])
        box = F.smooth_l1_loss(deltas.index_select(0, found), target, beta=config.box_beta, reduction="sum")
        return torch.stack([objectness, box]) / max(len(ids), 1)
