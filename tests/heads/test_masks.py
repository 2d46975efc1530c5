"""Masks cut out and laid back, against the picture that they came from."""

import pytest
import torch
from torchvision.ops import roi_align

from itpn.heads.masks import mask_targets, paste_masks
from tests.heads import plain


def ellipse(box, size):
    """bool ``[H, W]``: pixels whose centre lies in the ellipse that fills the box."""
    y, x = torch.meshgrid(torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5, indexing="ij")
    return ((x - box[0]) / (box[2] - box[0]) * 2 - 1) ** 2 + (
        (y - box[1]) / (box[3] - box[1]) * 2 - 1
    ) ** 2 <= 1


def disc(side=112):
    return ellipse((0, 0, side, side), (side, side)).to(torch.uint8)


@pytest.mark.parametrize("side", [28, 112])
def test_targets_are_those_of_the_whole_bitmap(side):
    boxes = torch.tensor([[40.0, 30, 200, 130], [10, 150, 60, 220]])
    ids = torch.tensor([0, 1, 0, 0])
    rois = torch.tensor([[50.0, 20, 210, 140], [12, 140, 66, 215], [40, 30, 200, 130], [100, 80, 180, 110]])
    found = mask_targets(disc(side).repeat(2, 1, 1), boxes, rois, ids, 28)
    whole = torch.stack([ellipse(box.tolist(), (256, 256)) for box in boxes])[ids].float()
    places = torch.cat([torch.arange(4)[:, None], rois], dim=1)
    expected = roi_align(whole[:, None], places, 28, 1.0, 0, aligned=True)[:, 0] >= 0.5
    assert (found.bool() == expected).float().mean(dim=(1, 2)).min() > (0.98 if side == 112 else 0.96)
    assert found.unique().tolist() == [0, 1]


def test_an_object_has_no_mask_outside_its_box():
    full = torch.ones(1, 112, 112, dtype=torch.uint8)
    roi = torch.tensor([[0.0, 0, 100, 100]])
    found = mask_targets(full, torch.tensor([[50.0, 25, 100, 100]]), roi, torch.tensor([0]), 28)
    expected = torch.zeros(28, 28)
    expected[7:, 14:] = 1
    assert torch.equal(found[0], expected)


def test_pasting_takes_the_value_at_each_pixels_centre():
    """Towards 0 beyond the outermost centres of the mask, so that a full one ends with its box."""
    torch.manual_seed(0)
    masks = torch.rand(3, 28, 28)
    boxes = torch.tensor([[3.3, 4.6, 30.2, 21.7], [-5.5, 10.0, 12.5, 50.0], [20.4, 5.2, 21.8, 6.6]])
    pasted = paste_masks(masks, boxes, (40, 48))
    for mask, box, found in zip(masks, boxes.tolist(), pasted, strict=True):
        for row in range(40):
            for col in range(48):
                x = (col + 0.5 - box[0]) / (box[2] - box[0]) * 28 - 0.5
                y = (row + 0.5 - box[1]) / (box[3] - box[1]) * 28 - 0.5
                framed = torch.nn.functional.pad(mask, (1, 1, 1, 1))[None]
                assert bool(found[row, col]) == (plain.bilinear(framed, x + 1, y + 1).item() >= 0.5)
    assert pasted.flatten(1).any(1).tolist() == [True, True, True]


@pytest.mark.parametrize("box", [(10.0, 20.0, 90.0, 70.0), (31.4, 12.7, 44.2, 40.1)])
def test_cut_out_and_pasted_back(box):
    boxes = torch.tensor([box])
    cut = mask_targets(disc()[None], boxes, boxes, torch.tensor([0]), 28)
    found, expected = paste_masks(cut, boxes, (96, 128))[0], ellipse(box, (96, 128))
    assert (found & expected).sum() / (found | expected).sum() > 0.95


def test_a_full_mask_is_its_box():
    found = paste_masks(torch.ones(1, 28, 28), torch.tensor([[3.4, 2.6, 9.4, 7.6]]), (10, 12))[0]
    expected = torch.zeros(10, 12, dtype=torch.bool)
    expected[3:8, 3:9] = True
    assert torch.equal(found, expected)


def test_nothing_to_paste():
    assert paste_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), (5, 7)).shape == (0, 5, 7)
    outside = torch.tensor([[50.0, 50, 60, 60], [-9, -9, -1, -1], [2, 2, 2, 2]])
    assert not paste_masks(torch.ones(3, 28, 28), outside, (20, 20)).any()
