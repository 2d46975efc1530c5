"""The proposal network: anchors by their numbers, proposals and losses against plain loops."""

import math

import pytest
import torch
import torch.nn.functional as F

from itpn.errors import UserError
from itpn.heads.boxes import Objects
from itpn.heads.proposals import STRIDES, ProposalConfig, Proposals
from tests.heads import plain


def build(**numbers):
    torch.manual_seed(0)
    return Proposals(8, ProposalConfig(**numbers))


def maps_of(height, width, batch=2):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, 8, height // s, width // s, generator=generator) for s in STRIDES]


def objects(*boxes):
    return Objects(torch.tensor(boxes).view(-1, 4).float(), torch.zeros(len(boxes), dtype=torch.long), None)


def test_published_anchors():
    """Three per place, 32 to 512 pixels, centred on the cells' corners; also where pooling dropped a row."""
    found = build().anchors(maps_of(160, 128))
    assert found.counts == [3 * (160 // s) * (128 // s) for s in STRIDES]
    expected = []
    for stride in STRIDES:
        for row in range(160 // stride):
            for col in range(128 // stride):
                for ratio in (0.5, 1.0, 2.0):
                    w, h = 8 * stride / math.sqrt(ratio), 8 * stride * math.sqrt(ratio)
                    x, y = col * stride, row * stride
                    expected.append([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
    torch.testing.assert_close(found.boxes, torch.tensor(expected))


def test_predictions_belong_to_their_anchors():
    """Order of rows, columns, ratios: a head that marks one place and ratio marks that anchor."""
    model, maps = build(), maps_of(64, 128, batch=1)
    for layer in (model.head.cls_logits, model.head.bbox_pred):
        torch.nn.init.zeros_(layer.weight)
    model.head.bbox_pred.bias.data = torch.arange(12.0)
    model.head.cls_logits.bias.data = torch.tensor([0.0, 1, 2])
    logits, deltas = model.predict(maps)
    assert logits[0, :6].tolist() == [0, 1, 2, 0, 1, 2]
    assert deltas[0, :3].flatten().tolist() == list(range(12))
    torch.nn.init.ones_(model.head.cls_logits.weight)
    model.head.conv = torch.nn.Identity()
    logits, _ = model.predict(maps)
    expected = maps[0][0].sum(0)[5, 7] + 1
    torch.testing.assert_close(logits[0, (5 * 32 + 7) * 3 + 1], expected)


@pytest.mark.parametrize("training", [True, False])
def test_proposals_are_the_best_that_do_not_overlap(training):
    model = build(num_before_nms=(60, 40), num_proposals=(50, 30), anchor_scale=3.0).train(training)
    torch.nn.init.normal_(model.head.bbox_pred.weight, std=0.1)
    maps, size = maps_of(96, 128), (80, 100)
    logits, deltas = model.predict(maps)
    anchors = model.anchors(maps)
    found = model(maps, [(96, 128), size], None, [None, None])[0][1]
    before, most = (60, 50) if training else (40, 30)
    boxes, scores, levels, first = [], [], [], 0
    for level, count in enumerate(anchors.counts):
        of_level = []
        for i in range(first, first + count):
            x1, y1, x2, y2 = anchors.boxes[i].tolist()
            if (x1 + x2) / 2 < size[1] and (y1 + y2) / 2 < size[0]:
                of_level.append(i)
        of_level.sort(key=lambda i: -logits[1, i].item())
        for i in of_level[:before]:
            x1, y1, x2, y2 = plain.decode(deltas[1, i].tolist(), anchors.boxes[i].tolist())
            x1, x2 = (min(max(x, 0.0), size[1]) for x in (x1, x2))
            y1, y2 = (min(max(y, 0.0), size[0]) for y in (y1, y2))
            if x2 - x1 >= 1e-3 and y2 - y1 >= 1e-3:
                boxes.append([x1, y1, x2, y2])
                scores.append(logits[1, i].item())
                levels.append(level)
        first += count
    kept = plain.nms(boxes, scores, levels, 0.7)[:most]
    torch.testing.assert_close(found, torch.tensor([boxes[i] for i in kept]), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("beta", [0.0, 1 / 9])
def test_losses_are_means_over_images_and_drawn_anchors(beta):
    model, maps = build(box_beta=beta, num_sampled=10_000, positive_fraction=1.0), maps_of(64, 96)
    torch.nn.init.normal_(model.head.bbox_pred.weight, std=0.3)
    torch.nn.init.normal_(model.head.cls_logits.weight, std=0.3)
    sizes = [(64, 96), (50, 70)]
    truth = [objects([10.0, 8, 50, 40], [60, 20, 90, 60]), objects([5.0, 5, 45, 48])]
    _, found = model(maps, sizes, truth, [None, None])
    logits, deltas = model.predict(maps)
    every = model.anchors(maps).boxes.tolist()
    objectness, box = [], []
    for image, (size, own) in enumerate(zip(sizes, truth, strict=True)):
        inside = [
            i for i, a in enumerate(every) if (a[0] + a[2]) / 2 < size[1] and (a[1] + a[3]) / 2 < size[0]
        ]
        matches = plain.matches(own.boxes.tolist(), [every[i] for i in inside], 0.7, 0.3, True)
        entropy, distance, num = 0.0, 0.0, 0
        for i, best in zip(inside, matches, strict=True):
            if best == -2:
                continue
            num += 1
            entropy += F.softplus(-logits[image, i] if best >= 0 else logits[image, i]).item()
            if best >= 0:
                target = plain.encode(own.boxes[best].tolist(), every[i])
                for a, b in zip(deltas[image, i].tolist(), target, strict=True):
                    d = abs(a - b)
                    distance += d * d / 2 / beta if d < beta else d - beta / 2
        objectness.append(entropy / num)
        box.append(distance / num)
    assert found["rpn_objectness"].item() == pytest.approx(sum(objectness) / 2, rel=1e-4)
    assert found["rpn_box"].item() == pytest.approx(sum(box) / 2, rel=1e-4)
    assert sum(box) > 0


def test_an_image_without_objects_has_background_alone():
    model, maps = build(), maps_of(64, 64)
    boxes, found = model(maps, [(64, 64)] * 2, [objects(), objects()], [None, None])
    assert found["rpn_box"] == 0
    sum(found.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(len(image) for image in boxes)


def test_what_is_no_longer_finite_gives_no_proposals_and_no_crash():
    model, maps = build(), maps_of(64, 64)
    torch.nn.init.constant_(model.head.bbox_pred.bias, float("nan"))
    boxes, found = model(maps, [(64, 64)] * 2, [objects([4.0, 4, 30, 30])] * 2, [None, None])
    assert [len(image) for image in boxes] == [0, 0]
    assert found["rpn_box"].isnan()


@pytest.mark.parametrize(
    "numbers",
    [
        {"positive_iou": 0.2},
        {"nms_iou": 0.0},
        {"anchor_scale": 0.0},
        {"anchor_ratios": ()},
        {"num_sampled": 0},
        {"num_proposals": (0, 1000)},
        {"positive_fraction": 0.0},
        {"box_weight": -1.0},
    ],
)
def test_nonsense_is_refused(numbers):
    with pytest.raises(UserError, match=r"detector\.proposals"):
        ProposalConfig(**numbers)
