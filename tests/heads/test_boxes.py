"""Matching, drawing and pooling, each against a plain loop."""

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.ops import batched_nms, generalized_box_iou_loss

from itpn.heads.boxes import draw, match, pool, shares
from tests.heads import plain


def some_boxes(num, seed=0, extent=100.0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(num, 2, generator=generator) * extent
    side = 4 + torch.rand(num, 2, generator=generator) * extent / 2
    return torch.cat([corner, corner + side], dim=1)


def test_pooling_is_a_mean_of_bilinear_samples():
    maps = [torch.randn(2, 3, 96 // s * 4, 128 // s * 4, dtype=torch.float64).float() for s in (4, 8, 16, 32)]
    boxes = [
        torch.tensor([[3.3, 5.1, 40.7, 61.2], [200.0, 20.0, 500.0, 380.0], [-9.0, 300, 60, 390]]),
        torch.tensor([[0.0, 0.0, 512.0, 384.0], [100.0, 90.0, 103.0, 95.0], [50.0, 60.0, 190.0, 160.0]]),
    ]
    found = pool(maps, boxes, 7)
    assert found.shape == (6, 3, 7, 7)
    levels = [0, 2, 0, 2, 0, 1]  # sides of 46, 329, 79, 443, 4 and 118 pixels
    for i in range(6):
        level, box = levels[i], boxes[i // 3][i % 3].tolist()
        expected = plain.roi_align(maps[level][i // 3], box, 7, 4 * 2**level)
        torch.testing.assert_close(found[i], expected, atol=1e-4, rtol=1e-4)


def test_pooled_bins_lie_where_the_box_says():
    """A map whose values are places in the image gives back the bins' centres: nothing is shifted."""
    maps = []
    for stride in (4, 8, 16, 32):
        centres = (torch.arange(1024 // stride) + 0.5) * stride
        maps.append(torch.stack(torch.meshgrid(centres, centres, indexing="xy"))[None])
    boxes = torch.tensor([[101.0, 200, 150, 300], [99, 60, 300, 260], [64, 96, 500, 700], [64, 64, 900, 800]])
    found = pool(maps, [boxes], 7)
    steps = (torch.arange(7) + 0.5) / 7
    for i, (x1, y1, x2, y2) in enumerate(boxes):
        torch.testing.assert_close(found[i, 0], (x1 + steps * (x2 - x1)).expand(7, 7), atol=0.02, rtol=0)
        torch.testing.assert_close(found[i, 1].T, (y1 + steps * (y2 - y1)).expand(7, 7), atol=0.02, rtol=0)


def test_pooling_survives_what_is_not_finite_and_what_is_not_there():
    maps = [torch.randn(2, 3, 64 // s, 64 // s, requires_grad=True) for s in (4, 8, 16, 32)]
    odd = torch.tensor([[float("nan")] * 4, [0, 0, float("inf"), float("inf")], [5, 5, 5, 5]])
    assert pool(maps, [odd, odd[:0]], 7).shape == (3, 3, 7, 7)
    nothing = pool(maps, [odd[:0], odd[:0]], 7)
    assert nothing.shape == (0, 3, 7, 7)
    nothing.sum().backward()
    assert all((level.grad == 0).all() for level in maps)


@pytest.mark.parametrize(("high", "low", "rescue"), [(0.7, 0.3, True), (0.5, 0.5, False)])
def test_matches(high, low, rescue):
    objects, boxes = some_boxes(6, 1), torch.cat([some_boxes(80, 2), some_boxes(6, 1) + 2])
    found = match(objects, boxes, Matcher(high, low, allow_low_quality_matches=rescue))
    expected = plain.matches(objects.tolist(), boxes.tolist(), high, low, rescue)
    assert found.tolist() == expected
    assert len(set(expected)) > 4
    assert match(objects[:0], boxes, Matcher(high, low)).tolist() == [-1] * len(boxes)
    assert match(objects, boxes[:0], Matcher(high, low)).tolist() == []


def test_drawing_fills_up_positives_then_background():
    matches = torch.tensor([-1] * 50 + [0] * 6 + [-2] * 20 + [3] * 4)
    for num, positives, background in ((16, 4, 12), (64, 10, 50), (40, 10, 30)):
        ids = draw(matches, num, 0.25, torch.Generator().manual_seed(0))
        assert ids.tolist() == sorted(set(ids.tolist()))
        assert (matches[ids] >= 0).sum() == positives
        assert (matches[ids] == -1).sum() == background
        assert len(ids) == positives + background


def test_drawing_is_repeated_by_the_seed_and_else_by_torchs_own():
    matches = torch.tensor([-1, 0, 1, -1] * 50)
    seeds = [draw(matches, 20, 0.5, torch.Generator().manual_seed(seed)).tolist() for seed in (1, 1, 2)]
    assert seeds[0] == seeds[1] != seeds[2]
    torch.manual_seed(5)
    first = draw(matches, 20, 0.5, None)
    assert first.tolist() != draw(matches, 20, 0.5, None).tolist()
    torch.manual_seed(5)
    assert first.tolist() == draw(matches, 20, 0.5, None).tolist()


def test_every_candidate_is_drawn_as_often():
    matches, counts = torch.tensor([-1] * 12 + [0] * 12), torch.zeros(24)
    for seed in range(600):
        counts[draw(matches, 8, 0.5, torch.Generator().manual_seed(seed))] += 1
    assert (counts - 200).abs().max() < 60  # a third of the time each; 5 standard deviations


def test_shares_make_means_of_means():
    values = torch.arange(6.0)
    weights = shares([4, 0, 2], values.device)
    assert (values * weights).sum().item() == pytest.approx((1.5 + 0 + 4.5) / 3)


def test_nms():
    boxes, scores = some_boxes(60, 3, 40.0), torch.rand(60, generator=torch.Generator().manual_seed(0))
    groups = torch.arange(60) % 3
    expected = plain.nms(boxes.tolist(), scores.tolist(), groups.tolist(), 0.5)
    assert batched_nms(boxes, scores, groups, 0.5).tolist() == expected
    assert 10 < len(expected) < 60


def test_giou():
    found = generalized_box_iou_loss(a := some_boxes(20, 4), b := some_boxes(20, 5))
    expected = [plain.giou_loss(*pair) for pair in zip(a.tolist(), b.tolist(), strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected))


@pytest.mark.parametrize("deviations", [(1.0, 1.0), (0.1, 0.2), (0.033, 0.067)])
def test_boxes_to_deltas_and_back(deviations):
    centre, size = deviations
    coder = BoxCoder((1 / centre, 1 / centre, 1 / size, 1 / size))
    boxes, targets = some_boxes(10, 6), some_boxes(10, 7)
    deltas = coder.encode_single(targets, boxes)
    pairs = list(zip(targets.tolist(), boxes.tolist(), strict=True))
    expected = torch.tensor([plain.encode(target, box, deviations) for target, box in pairs])
    torch.testing.assert_close(deltas, expected, atol=1e-4, rtol=1e-4)
    small = deltas.clamp(-3, 3)
    decoded = [plain.decode(d, b, deviations) for d, b in zip(small.tolist(), boxes.tolist(), strict=True)]
    torch.testing.assert_close(coder.decode_single(small, boxes), torch.tensor(decoded), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(coder.decode_single(deltas, boxes), targets, atol=1e-3, rtol=1e-4)
