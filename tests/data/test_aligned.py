"""Images and labels stay on one another, and each change is what a library or the description says."""

import colorsys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2 import functional

from itpn.data.aligned import (
    Distortion,
    crop_corner,
    cut_image,
    cut_labels,
    distorted,
    padded,
    saturated,
    scaled_size,
    turned,
)
from itpn.data.randomness import generator
from itpn.data.transforms import to_tensor
from tests.data.segmented import blocks

SIZES = st.tuples(st.integers(1, 60), st.integers(1, 60))


@given(st.integers(1, 5000), st.integers(1, 5000), st.floats(0.5, 2.0))
def test_the_scaled_size_is_the_published_one(height: int, width: int, ratio: float) -> None:
    """mmcv's imrescale of mmseg's Resize."""
    long, short = int(2048 * ratio), int(512 * ratio)
    factor = min(long / max(height, width), short / min(height, width))
    expected = max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))
    assert scaled_size((height, width), 512, 2048, ratio) == expected


@settings(max_examples=40, deadline=None)
@given(SIZES, SIZES, SIZES, st.integers(0, 1000))
def test_a_part_is_that_of_the_whole(
    size: tuple[int, int], scaled: tuple[int, int], crop: tuple[int, int], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    labels = rng.integers(0, 9, size, dtype=np.uint8)
    corner = tuple(int(rng.integers(0, max(0, s - c) + 1)) for s, c in zip(scaled, crop, strict=True))
    part, truth = cut_image(image, scaled, corner, crop), cut_labels(labels, scaled, corner, crop)
    window = np.s_[corner[0] : corner[0] + crop[0], corner[1] : corner[1] + crop[1]]
    whole = np.asarray(image.resize(scaled[::-1], Image.Resampling.BILINEAR))[window]
    difference = np.abs(part.permute(1, 2, 0).numpy().astype(int) - whole)
    assert difference.max() <= 2  # Pillow rounds between its two passes, whose order may be another
    nearest = np.asarray(Image.fromarray(labels).resize(scaled[::-1], Image.Resampling.NEAREST))[window]
    rows, columns = (  # but for those half-way between two, where Pillow rounds either way
        (2 * np.arange(start, min(start + length, whole)) + 1) * side % (2 * whole) > 0
        for side, whole, start, length in zip(size, scaled, corner, crop, strict=True)
    )
    assert truth.shape == part.shape[1:] == nearest.shape
    assert np.array_equal(truth[rows][:, columns], nearest[rows][:, columns])
    assert part.shape[1:] == (min(crop[0], scaled[0]), min(crop[1], scaled[1]))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.floats(0.4, 3.0))
def test_labels_lie_where_their_pixels_do(seed: int, ratio: float) -> None:
    """An image that is painted by its labels is, away from where colours mix, painted by the cut labels."""
    rng = np.random.default_rng(seed)
    labels = blocks(rng, 48, 72, num_classes=2, block=12)
    image = Image.fromarray(np.repeat(255 * labels[..., None], 3, 2))
    scaled = scaled_size((48, 72), 48, 200, ratio)
    corner = crop_corner(labels, scaled, (30, 30), 255, 0.75, generator(seed, 0, 0, "crop"))
    pixels, truth = cut_image(image, scaled, corner, (30, 30)), cut_labels(labels, scaled, corner, (30, 30))
    clear = (pixels[0] < 5) | (pixels[0] > 250)
    assert torch.equal((pixels[0] > 127)[clear], torch.from_numpy(truth == 1)[clear])
    assert clear.float().mean() > 0.3


def test_a_crop_is_drawn_again_where_one_class_fills_it() -> None:
    labels = np.zeros((40, 200), np.uint8)
    labels[:, 180:] = 1
    labels[:20] = 255  # does not count
    for seed in range(20):
        corner = crop_corner(labels, (40, 200), (40, 40), 255, 0.75, generator(seed, 0, 0, "c"))
        first = crop_corner(labels, (40, 200), (40, 40), 255, 1.0, generator(seed, 0, 0, "c"))
        seen = labels[20:, corner[1] : corner[1] + 40]
        share = max((seen == 0).mean(), (seen == 1).mean())
        draws = generator(seed, 0, 0, "c")
        tops = [[int(torch.randint(side + 1, (), generator=draws)) for side in (0, 160)] for _ in range(10)]
        assert first == tuple(tops[0]) and list(corner) in tops
        good = [place for place in tops if 150 < place[1] < 170]  # each class has less than three quarters
        assert list(corner) == (good[0] if good else tops[-1]) and (share < 0.75) == bool(good)


def test_crops_are_uniform() -> None:
    labels = np.zeros((10, 10), np.uint8)
    corners = [crop_corner(labels, (10, 10), (8, 12), 255, 1.0, generator(0, 0, i, "c")) for i in range(900)]
    tops, lefts = zip(*corners, strict=True)
    assert set(lefts) == {0} and all(250 < tops.count(top) < 350 for top in range(3))


def test_padding() -> None:
    pixels = torch.ones(3, 2, 3, dtype=torch.uint8)
    grown = padded(pixels, torch.tensor([7, 8, 9]), (4, 5))
    assert torch.equal(grown[:, :2, :3], pixels) and grown.dtype == torch.uint8
    assert grown[:, 3].unique(dim=1).flatten().tolist() == [7, 8, 9] and (grown[0, :, 3:] == 7).all()
    assert padded(pixels, torch.tensor([7, 8, 9]), (2, 3)) is pixels


def by_colorsys(pixels: torch.Tensor, saturation: float = 1.0, turn: float = 0.0) -> torch.Tensor:
    changed = []
    for r, g, b in (pixels.flatten(1).T / 255).tolist():
        h, s, v = colorsys.rgb_to_hsv(r, g, b)
        changed.append(colorsys.hsv_to_rgb((h + turn) % 1, min(1, s * saturation), v))
    return 255 * torch.tensor(changed).T.view_as(pixels)


@pytest.fixture
def pixels() -> torch.Tensor:
    x = torch.randint(0, 256, (3, 12, 13), generator=torch.Generator().manual_seed(0)).float()
    x[:, 0, :4] = torch.tensor([0.0, 255, 90, 90]).expand(3, 4)  # without a hue
    return x


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0, 1.5, 5.0])
def test_saturation_is_that_of_hsv(pixels: torch.Tensor, factor: float) -> None:
    torch.testing.assert_close(
        saturated(pixels, factor), by_colorsys(pixels, saturation=factor), rtol=0, atol=2e-3
    )


@pytest.mark.parametrize("degrees", [-18.0, 0.0, 7.5, 100.0])
def test_hue_is_that_of_hsv(pixels: torch.Tensor, degrees: float) -> None:
    torch.testing.assert_close(
        turned(pixels, degrees), by_colorsys(pixels, turn=degrees / 360), rtol=0, atol=2e-3
    )


MOST = Distortion(32, 0.5, 0.5, 18)


def test_distortion_is_the_described_chain_of_changes() -> None:
    """Against torchvision's functions (its brightness is a factor, as is the contrast here) and the draws."""
    pixels = to_tensor(Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 8, 3), dtype=np.uint8)))
    orders = set()
    for index in range(60):
        found = distorted(pixels, MOST, generator(0, 0, index, "colour"))
        draws = torch.rand(9, generator=generator(0, 0, index, "colour"), dtype=torch.float64)
        b, c, s, h = ((2 * draws[:4] - 1) * torch.tensor(MOST)).tolist()
        on, contrast_first = (draws[4:8] < 0.5).tolist(), bool(draws[8] < 0.5)
        x = pixels / 255
        x = (x + b / 255).clamp(0, 1) if on[0] else x
        x = functional.adjust_brightness(x, 1 + c) if on[1] and contrast_first else x
        x = by_colorsys(255 * x, saturation=1 + s) / 255 if on[2] else x
        x = functional.adjust_hue(x, h / 360) if on[3] else x
        x = functional.adjust_brightness(x, 1 + c) if on[1] and not contrast_first else x
        assert found.dtype == torch.uint8 and (found - 255 * x).abs().max() <= 0.51
        orders.add((*on, contrast_first))
    assert len(orders) > 20


def test_what_is_zero_is_not_changed() -> None:
    pixels = torch.randint(0, 256, (3, 5, 5), dtype=torch.uint8)
    for index in range(10):
        assert torch.equal(distorted(pixels, Distortion(0, 0, 0, 0), generator(0, 0, index, "c")), pixels)
        black = torch.zeros(3, 4, 4, dtype=torch.uint8)
        assert torch.equal(distorted(black, MOST._replace(brightness=0), generator(0, 0, index, "c")), black)


def test_each_change_happens_half_of_the_time() -> None:
    pixels = torch.full((3, 2, 2), 100, dtype=torch.uint8)
    changed = [
        not torch.equal(distorted(pixels, Distortion(32, 0, 0, 0), generator(0, 0, i, "c")), pixels)
        for i in range(400)
    ]
    assert 0.42 < sum(changed) / 400 < 0.58
