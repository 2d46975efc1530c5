from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from itpn.data.picture import open_picture
from itpn.data.randomness import generator
from itpn.data.transforms import (
    CROP_RATIO,
    center_crop,
    crop_ratio_of,
    jittered,
    random_crop_box,
    random_resized_crop_flip,
    to_tensor,
)


def smooth(width: int, height: int, detail: int = 8) -> Image.Image:
    """Random colours that change over `detail` pixels."""
    rng = np.random.default_rng(width * height)
    small = Image.fromarray(
        rng.integers(0, 256, (height // detail + 2, width // detail + 2, 3), dtype=np.uint8)
    )
    return small.resize((width, height), Image.Resampling.BICUBIC)


def crop_of(path: Path, size: tuple[int, int], index: int, flip: float = 0.0) -> torch.Tensor:
    with open_picture(path) as picture:
        draws = generator(0, 0, index, "crop")
        return random_resized_crop_flip(picture, size, min_scale=0.2, flip=flip, generator=draws)


def published_crop(image: Image.Image, size: tuple[int, int], index: int) -> torch.Tensor:
    left, top, width, height = random_crop_box(*image.size, 0.2, generator(0, 0, index, "crop"))
    crop = functional.resized_crop(image, top, left, height, width, list(size), InterpolationMode.BICUBIC)
    return to_tensor(crop)


@pytest.mark.parametrize(("width", "height"), [(120, 90), (40, 300), (8, 5), (1, 1), (1, 50)])
@pytest.mark.parametrize("size", [(32, 32), (16, 48)])
def test_crop_and_resize_is_torchvisions(
    tmp_path: Path, width: int, height: int, size: tuple[int, int]
) -> None:
    image = smooth(width, height)
    image.save(tmp_path / "x.png")
    for index in range(8):
        ours, theirs = crop_of(tmp_path / "x.png", size, index), published_crop(image, size, index)
        difference = (ours.int() - theirs.int()).abs()
        # Weights of 16 bits, of torch and of Pillow.
        assert difference.max() <= 2 and difference.float().mean() < 0.3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_scaled_jpeg_looks_the_same(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    smooth(1001, 747, detail=50).save(tmp_path / "x.jpg", quality=95, exif=exif)
    with open_picture(tmp_path / "x.jpg") as picture:
        image = picture.decode()
    for index in range(8):
        ours, theirs = crop_of(tmp_path / "x.jpg", (64, 64), index), published_crop(image, (64, 64), index)
        assert (ours.float() - theirs.float()).abs().mean() < 1.0


def test_flipping_mirrors_the_same_crop(tmp_path: Path) -> None:
    smooth(60, 40).save(tmp_path / "x.png")
    plain, mirrored = (crop_of(tmp_path / "x.png", (16, 16), 3, flip=flip) for flip in (0.0, 1.0))
    assert torch.equal(plain.flip(-1), mirrored) and not torch.equal(plain, mirrored)
    flips = [
        torch.equal(crop_of(tmp_path / "x.png", (4, 4), i), crop_of(tmp_path / "x.png", (4, 4), i, 0.5))
        for i in range(400)
    ]
    assert 0.4 < sum(flips) / 400 < 0.6


@given(st.integers(1, 300), st.integers(1, 300), st.floats(0.01, 1.0), st.integers(0, 1000))
def test_a_crop_lies_in_the_image(width: int, height: int, min_scale: float, index: int) -> None:
    left, top, w, h = random_crop_box(width, height, min_scale, generator(0, 0, index, "crop"))
    assert left >= 0 and top >= 0 and w > 0 and h > 0
    assert left + w <= width and top + h <= height


@pytest.mark.parametrize(("width", "height"), [(400, 10), (10, 400), (1, 100), (57, 3)])
def test_the_fallback_is_torchvisions(width: int, height: int) -> None:
    image = torch.empty(3, height, width)
    params = v2.RandomResizedCrop(8, (0.2, 1.0)).make_params([image])
    expected = (params["left"], params["top"], params["width"], params["height"])
    assert random_crop_box(width, height, 0.2, generator(0, 0, 0, "crop")) == expected


def test_crops_are_distributed_as_torchvisions() -> None:
    width, height, n = 500, 375, 3000
    torch.manual_seed(0)
    published = v2.RandomResizedCrop(224, (0.2, 1.0))
    image = torch.empty(3, height, width)
    params = [published.make_params([image]) for _ in range(n)]
    theirs = np.array([[p["left"], p["top"], p["width"], p["height"]] for p in params], dtype=float)
    ours = np.array(
        [random_crop_box(width, height, 0.2, generator(1, 0, i, "crop")) for i in range(n)], dtype=float
    )
    for a, b in zip(described(ours), described(theirs), strict=True):
        assert kolmogorov_smirnov(a, b) < 1.95 * (2 / n) ** 0.5  # the 0.1 % quantile


def described(boxes: np.ndarray) -> list[np.ndarray]:
    left, top, width, height = boxes.T
    return [left, top, width * height, width / height]


def kolmogorov_smirnov(a: np.ndarray, b: np.ndarray) -> float:
    points = np.concatenate([a, b])
    below = [np.searchsorted(np.sort(values), points, side="right") / len(values) for values in (a, b)]
    return float(np.abs(below[0] - below[1]).max())


@pytest.mark.parametrize(("width", "height"), [(500, 375), (333, 500), (96, 96), (20, 31), (1, 1), (3, 500)])
@pytest.mark.parametrize("size", [224, 96])
def test_the_central_crop_is_torchvisions(width: int, height: int, size: int) -> None:
    image = smooth(width, height)
    resize = v2.Resize(size * 256 // 224, InterpolationMode.BICUBIC)
    expected = to_tensor(v2.CenterCrop(size)(resize(image)))
    difference = (center_crop(image, (size, size)).int() - expected.int()).abs()
    # Pillow rounds to 8 bits between its two passes, whose order may be another for a part of an image.
    assert difference.max() <= 2 and difference.float().mean() < 0.2


@pytest.mark.parametrize(("width", "height"), [(500, 375), (333, 500), (20, 31), (1, 1), (3, 500)])
@pytest.mark.parametrize("size", [(96, 224), (224, 96), (64, 64)])
@pytest.mark.parametrize("crop_ratio", [CROP_RATIO, 1.0])
def test_the_central_crop_of_any_size_covers_it(
    width: int, height: int, size: tuple[int, int], crop_ratio: float
) -> None:
    """As timm's ResizeKeepRatio does it, but that sides are rounded down, as torchvision does."""
    image = smooth(width, height)
    covered = [int(side / crop_ratio) for side in size]
    scale = max(covered[0] / height, covered[1] / width)
    scaled = image.resize((int(width * scale + 1e-6), int(height * scale + 1e-6)), Image.Resampling.BICUBIC)
    expected = to_tensor(v2.CenterCrop(size)(scaled))
    found = center_crop(image, size, crop_ratio)
    difference = (found.int() - expected.int()).abs()
    assert found.shape == (3, *size)
    assert difference.max() <= 2 and difference.float().mean() < 0.2


def test_the_published_crop_ratios() -> None:
    sizes = [(96, 96), (224, 224), (256, 256), (384, 384), (224, 448)]
    assert [crop_ratio_of(size) for size in sizes] == [0.875, 0.875, 1.0, 1.0, 1.0]


def test_the_central_crop_of_a_very_long_image_needs_little_memory() -> None:
    assert center_crop(Image.new("RGB", (1, 40_000), "red"), (224, 224))[0].min() == 255


def test_to_tensor_keeps_every_pixel_in_place() -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    tensor = to_tensor(Image.fromarray(pixels))
    assert tensor.dtype == torch.uint8 and tensor.shape == (3, 2, 4) and tensor.is_contiguous()
    assert torch.equal(tensor, torch.from_numpy(pixels).permute(2, 0, 1))


def test_jitter_is_torchvisions() -> None:
    """The same factors in the same order give what torchvision's functions give one after the other."""
    pixels = to_tensor(smooth(40, 30))
    outcomes = set()
    for index in range(30):
        found = jittered(pixels, 0.4, generator(0, 0, index, "colour"))
        draws = generator(0, 0, index, "colour")
        factors = (0.6 + 0.8 * torch.rand(3, generator=draws, dtype=torch.float64)).tolist()
        order = torch.randperm(3, generator=draws).tolist()
        assert found.dtype == torch.uint8 and found.shape == pixels.shape
        expected = pixels
        for i in order:
            name = ("adjust_brightness", "adjust_contrast", "adjust_saturation")[i]
            expected = getattr(functional, name)(expected, factors[i])
        assert (found.int() - expected.int()).abs().max() <= 1  # factors may differ in the last bit
        outcomes.add(tuple(order))
    assert len(outcomes) == 6
    assert torch.equal(
        jittered(pixels, 0.4, generator(0, 0, 1, "x")), jittered(pixels, 0.4, generator(0, 0, 1, "x"))
    )


def test_jitter_is_distributed_as_torchvisions() -> None:
    """Mean brightness over many draws, of a grey picture, against ColorJitter's own."""
    pixels = torch.full((3, 2, 2), 100, dtype=torch.uint8)
    ours = torch.stack([jittered(pixels, 0.4, generator(0, 0, i, "c")).float().mean() for i in range(400)])
    torch.manual_seed(0)
    theirs = v2.ColorJitter(0.4, 0.4, 0.4)
    others = torch.stack([theirs(pixels).float().mean() for _ in range(400)])
    assert abs(ours.mean() - others.mean()) < 4
    assert abs(ours.std() - others.std()) < 3
