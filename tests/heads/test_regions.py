"""The box stages: losses against plain loops, the cascade by hand, detections against plain NMS."""

import math

import pytest
import torch
from torch import nn

from itpn.errors import UserError
from itpn.heads.boxes import Objects
from itpn.heads.regions import RegionConfig, Regions
from itpn.heads.towers import BoxHead, HeadConfig, of_class
from tests.heads import plain

DEVIATIONS = ((0.1, 0.2), (0.05, 0.1), (0.033, 0.067))


def build(masks=True, num_classes=3, **numbers):
    torch.manual_seed(0)
    head = HeadConfig(norm="group", num_convs=1, conv_width=8, hidden_width=16)
    return Regions(6, num_classes, masks, RegionConfig(**{"head": head} | numbers))


def maps_of(size=128, batch=2):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, 6, size // s, size // s, generator=generator) for s in (4, 8, 16, 32)]


def objects(boxes, labels):
    masks = torch.ones(len(labels), 28, 28, dtype=torch.uint8)
    return Objects(torch.tensor(boxes).view(-1, 4).float(), torch.tensor(labels, dtype=torch.long), masks)


def rois_of(model, proposals, own, stage=0):
    return model.draw(proposals, (128, 128), own, None, model.stages[stage])


def test_one_stage_or_three():
    assert [stage.weight for stage in build().stages] == [1.0]
    model = build(cascade=True)
    assert [stage.weight for stage in model.stages] == [1.0, 0.5, 0.25]
    for stage, (centre, size) in zip(model.stages, DEVIATIONS, strict=True):
        assert stage.coder.weights == pytest.approx((1 / centre, 1 / centre, 1 / size, 1 / size))
    assert [stage.matcher.high_threshold for stage in model.stages] == [0.5, 0.6, 0.7]
    assert len(model.heads) == len(model.mask_heads) == 3
    assert len(build(masks=False).mask_heads) == 0


def test_of_class():
    by_class = torch.randn(4, 3, 5, 2)
    labels = torch.tensor([2, 0, 1, 2])
    expected = torch.stack([by_class[i, label] for i, label in enumerate(labels)])
    assert torch.equal(of_class(by_class, labels), expected)


def test_drawn_boxes_have_their_objects_label_and_know_what_was_given():
    model = build()
    own = objects([[10, 10, 50, 50], [60, 60, 100, 120]], [2, 0])
    proposals = torch.tensor([[12.0, 10, 50, 52], [0, 0, 20, 20], [62, 60, 100, 118]])
    rois = rois_of(model, proposals, own)
    assert torch.equal(rois.boxes, torch.cat([proposals, own.boxes]))
    assert rois.matches.tolist() == [0, -1, 1, 0, 1]
    assert rois.labels.tolist() == [2, 3, 0, 2, 0]
    assert rois.given.tolist() == [False, False, False, True, True]
    assert rois.positive.tolist() == [0, 2, 3, 4]


def test_an_image_with_neither_proposals_nor_objects_has_itself():
    rois = rois_of(build(), torch.zeros(0, 4), objects([], []))
    assert rois.boxes.tolist() == [[0, 0, 128, 128]]
    assert rois.labels.tolist() == [3]


def test_losses_of_class_and_box():
    """Per image, over its drawn boxes: cross-entropy of all, GIoU of the decoded box of the right class."""
    model = build()
    own = [objects([[10, 10, 50, 50], [60, 60, 100, 120]], [2, 0]), objects([[5, 5, 65, 45]], [1])]
    proposals = [
        torch.tensor([[12.0, 10, 50, 52], [0, 0, 20, 20], [66, 50, 100, 118], [70, 0, 90, 30]]),
        torch.tensor([[9.0, 9, 60, 40], [80, 80, 120, 120]]),
    ]
    rois = [rois_of(model, *image) for image in zip(proposals, own, strict=True)]
    logits, deltas = torch.randn(9, 4), torch.randn(9, 3, 4)
    found = model.box_losses(logits, deltas, rois, own, model.stages[0])
    entropy, giou, row = [], [], 0
    for image, truth in zip(rois, own, strict=True):
        entropies, distances = 0.0, 0.0
        for box, match, label in zip(image.boxes.tolist(), image.matches, image.labels, strict=True):
            entropies -= logits[row].log_softmax(0)[label].item()
            if match >= 0:
                decoded = plain.decode(deltas[row, label].tolist(), box, (0.1, 0.2))
                distances += plain.giou_loss(decoded, truth.boxes[match].tolist())
            row += 1
        entropy.append(entropies / len(image.boxes))
        giou.append(distances / len(image.boxes))
    assert found["class"].item() == pytest.approx(sum(entropy) / 2, rel=1e-5)
    assert found["box"].item() == pytest.approx(sum(giou) / 2, rel=1e-4)


def test_loss_of_masks():
    """Of positive boxes alone, of the right class alone: a mean over them, then over images."""
    model, maps = build(), maps_of()
    own = [objects([[10, 10, 50, 50], [60, 60, 100, 120]], [2, 0]), objects([[5, 5, 65, 45]], [1])]
    rois = [rois_of(model, torch.tensor([[14.0, 12, 52, 50], [0, 0, 9, 9]]), truth) for truth in own]
    loss = model.mask_loss(model.mask_heads[0], maps, rois, own)
    head, means = model.mask_heads[0], []
    for image, truth in enumerate(own):
        losses = []
        for i in rois[image].positive:
            box = rois[image].boxes[i].tolist()
            level = maps[0][image]
            pooled = plain.roi_align(level, box, 14, 4)[None]
            probability = head.predict(head.convs(pooled))[0, rois[image].labels[i]].sigmoid()
            target = torch.zeros(28, 28)
            x1, y1, x2, y2 = truth.boxes[rois[image].matches[i]].tolist()
            for row in range(28):
                for col in range(28):
                    x = box[0] + (col + 0.5) / 28 * (box[2] - box[0])
                    y = box[1] + (row + 0.5) / 28 * (box[3] - box[1])
                    target[row, col] = x1 <= x <= x2 and y1 <= y <= y2
            losses.append(nn.functional.binary_cross_entropy(probability, target).item())
        means.append(sum(losses) / len(losses))
    assert [len(image.positive) for image in rois] == [3, 1]
    assert loss.item() == pytest.approx(sum(means) / 2, rel=2e-3)


def test_objects_without_a_mask_teach_none():
    model, maps = build(), maps_of()
    own = [objects([[10, 10, 50, 50], [60, 60, 100, 120]], [2, 0]), objects([[5, 5, 65, 45]], [1])]
    proposals = [truth.boxes for truth in own]
    known = [
        own[0]._replace(boxes=own[0].boxes[:1], labels=own[0].labels[:1], masks=own[0].masks[:1]),
        own[1],
    ]
    unknown = own[0].masks.clone()
    unknown[1] = 255
    own[0] = own[0]._replace(masks=unknown)
    losses = []
    for truth in (own, known):
        rois = [rois_of(model, *image) for image in zip(proposals, truth, strict=True)]
        losses.append(model.mask_loss(model.mask_heads[0], maps, rois, truth))
    torch.testing.assert_close(losses[0], losses[1])


def test_images_without_objects_leave_zeros_that_can_be_differentiated():
    model, maps = build(cascade=True), [level.requires_grad_() for level in maps_of()]
    proposals = [torch.tensor([[3.0, 4, 40, 50], [50, 50, 90, 90]])] * 2
    stages = model.losses(maps, proposals, [(128, 128)] * 2, [objects([], [])] * 2, [None] * 2)
    assert [stage["box"].item() for stage in stages] == [0, 0, 0]
    assert [stage["mask"].item() for stage in stages] == [0, 0, 0]
    assert all(stage["class"].item() > 0 for stage in stages)
    sum(loss for stage in stages for loss in stage.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert any(level.grad.abs().sum() > 0 for level in maps)


def test_each_stage_goes_on_from_the_boxes_of_the_one_before(monkeypatch):
    """By hand: one object, one proposal that overlaps it by a half, a head that halves the way each time.

    What the second stage draws from is the moved proposal and not the object's own box, which is added anew.
    """
    model = build(masks=False, cascade=True, num_classes=1)
    target, proposal = [40.0, 40.0, 80.0, 80.0], [40.0, 53.0, 80.0, 93.0]
    assert plain.iou(target, proposal) == pytest.approx(27 / 53)  # just above the first stage's 0.5
    drawn, original = [], Regions.draw

    def watched(self, proposals, size, own, generator, stage):
        drawn.append((proposals, original(self, proposals, size, own, generator, stage)))
        return drawn[-1][1]

    monkeypatch.setattr(Regions, "draw", watched)
    # -6.5 pixels of 40 are -0.1625 of the box's side.
    for i, (head, (centre, _)) in enumerate(zip(model.heads, DEVIATIONS, strict=True)):
        shift = -(13 / 2 ** (i + 1)) / 40 / centre
        answer = torch.tensor([0.0, shift, 0.0, 0.0])
        monkeypatch.setattr(
            head,
            "forward",
            lambda pooled, d=answer: (torch.zeros(len(pooled), 2), d.expand(len(pooled), 1, 4)),
        )
    own = objects([target], [0])
    losses = model.losses(maps_of(batch=1), [torch.tensor([proposal])], [(128, 128)], [own], [None])
    tops = [53.0, 46.5, 43.25]
    for (proposals, rois), top in zip(drawn, tops, strict=True):
        torch.testing.assert_close(proposals, torch.tensor([[40.0, top, 80.0, top + 40]]), atol=1e-4, rtol=0)
        assert rois.given.tolist() == [False, True]
    assert [rois.labels.tolist() for _, rois in drawn] == [[0, 0], [0, 0], [0, 0]]
    for stage, top, shift in zip(losses, tops, (6.5, 3.25, 1.625), strict=True):
        moved = [[40, y - shift, 80, y + 40 - shift] for y in (top, 40.0)]
        expected = sum(plain.giou_loss(box, target) for box in moved) / 2
        assert stage["box"].item() == pytest.approx(expected, abs=1e-5)


def test_later_stages_ask_for_more():
    model = build(cascade=True)
    own, proposals = objects([[0, 0, 100, 100]], [1]), torch.tensor([[0.0, 0, 100, 55], [0, 0, 100, 65]])
    labels = [rois_of(model, proposals, own, stage).labels.tolist() for stage in range(3)]
    assert labels == [[1, 1, 1], [3, 1, 1], [3, 3, 1]]


def test_refining_follows_the_label_and_else_the_best_class():
    model = build(num_classes=2)
    boxes = torch.tensor([[10.0, 10, 50, 50], [10, 10, 50, 50], [100, 100, 124, 124]])
    deltas = torch.zeros(3, 2, 4)
    deltas[:, 0, 0], deltas[:, 1, 0] = 1.0, -1.0  # a tenth of the side to the right, or to the left
    logits = torch.tensor([[5.0, 0, 9], [0, 5, 9], [5, 0, 9]])  # background is best throughout
    moved = model.refine(logits, deltas, [boxes[:2], boxes[2:]], [(128, 128), (120, 120)], model.stages[0])
    torch.testing.assert_close(moved[0], torch.tensor([[14.0, 10, 54, 50], [6, 10, 46, 50]]))
    torch.testing.assert_close(moved[1], torch.tensor([[102.4, 100, 120, 120]]))
    told = model.refine(
        logits, deltas, [boxes], [(128, 128)], model.stages[0], labels=torch.tensor([1, 2, 0])
    )[0]
    torch.testing.assert_close(told[:, 0], torch.tensor([6.0, 6, 102.4]))


def test_detections_are_plain_nms_per_class():
    model = build(num_classes=2, num_detections=9)
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(40, 2, 2, generator=generator) * 60
    boxes = torch.cat([corner, corner + 20 + 20 * torch.rand(40, 2, 2, generator=generator)], dim=2)
    scores = torch.rand(40, 2, generator=generator) ** 4
    found = model.choose(boxes, scores, (80, 90))
    rows = [(i, c) for i in range(40) for c in range(2) if scores[i, c] > 0.05]
    clipped = [
        [min(max(x, 0), limit) for x, limit in zip(boxes[row].tolist(), (90, 80, 90, 80), strict=True)]
        for row in rows
    ]
    kept = plain.nms(clipped, [scores[row].item() for row in rows], [c for _, c in rows], 0.5)[:9]
    torch.testing.assert_close(found.boxes, torch.tensor([clipped[i] for i in kept]))
    assert found.labels.tolist() == [rows[i][1] for i in kept]
    assert found.scores.tolist() == [scores[rows[i]].item() for i in kept]


def test_a_cascade_votes(monkeypatch):
    """Classes by the mean logits of all stages, the box by the last, masks by the mean probability."""
    model = build(cascade=True, num_classes=2)
    votes = torch.tensor([[4.0, 0, 0], [0, 1, 0], [0, 1, 0]])
    for i, head in enumerate(model.heads):
        deltas = torch.zeros(1, 2, 4)
        deltas[..., 0] = 1.0
        monkeypatch.setattr(head, "forward", lambda pooled, i=i, d=deltas: (votes[i : i + 1], d))
    for probability, head in zip((0.2, 0.5, 0.8), model.mask_heads, strict=True):
        value = math.log(probability / (1 - probability))
        monkeypatch.setattr(
            head, "forward", lambda pooled, labels, v=value: torch.full((len(labels), 28, 28), v)
        )
    [found] = model.detect(maps_of(batch=1), [torch.tensor([[20.0, 20, 60, 60]])], [(128, 128)])
    expected = torch.tensor([4 / 3, 2 / 3, 0]).softmax(0)
    assert found.labels.tolist() == [0, 1]
    torch.testing.assert_close(found.scores, expected[:2])
    moved = 40 * (0.1 + 0.05 + 0.033)
    torch.testing.assert_close(found.boxes[0], torch.tensor([20 + moved, 20, 60 + moved, 60]))
    torch.testing.assert_close(found.masks, torch.full((2, 28, 28), 0.5))


def test_nothing_proposed_is_nothing_found():
    model = build(cascade=True).eval()
    found = model.detect(maps_of(), [torch.zeros(0, 4)] * 2, [(128, 128)] * 2)
    assert [[len(part) for part in image] for image in found] == [[0, 0, 0, 0]] * 2


def test_boxes_are_regressed_in_fp32_under_autocast():
    head = BoxHead(6, 3, HeadConfig(norm="group", num_convs=1, conv_width=8, hidden_width=16))
    seen = []
    head.regress.register_forward_hook(lambda _, given, out: seen.append((given[0].dtype, out.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        logits, deltas = head(torch.randn(4, 6, 7, 7))
    assert seen == [(torch.float32, torch.float32)]
    assert logits.dtype == deltas.dtype == torch.float32


@pytest.mark.parametrize(("norm", "kind"), [("batch", nn.BatchNorm2d), ("group", nn.GroupNorm)])
def test_norms(norm, kind):
    head = BoxHead(256, 80, HeadConfig(norm=norm))
    assert len([layer for layer in head.modules() if isinstance(layer, kind)]) == 4
    assert [tuple(layer.weight.shape) for layer in head.modules() if isinstance(layer, nn.Linear)] == [
        (1024, 256 * 49),
        (81, 1024),
        (320, 1024),
    ]


@pytest.mark.parametrize(
    "numbers",
    [
        {"stage_ious": (0.5, 0.6)},
        {"stage_ious": (), "stage_weights": (), "stage_deviations": ()},
        {"stage_deviations": ((0.1, 0.2), (0.0, 0.1), (0.03, 0.07))},
        {"nms_iou": 1.5},
        {"min_score": 1.0},
        {"num_sampled": 0},
        {"mask_weight": -1.0},
    ],
)
def test_nonsense_is_refused(numbers):
    with pytest.raises(UserError, match=r"detector\.regions"):
        RegionConfig(**numbers)
    with pytest.raises(UserError, match=r"detector\.regions\.head"):
        HeadConfig(num_convs=0)
