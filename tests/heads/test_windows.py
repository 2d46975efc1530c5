import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from itpn.errors import UserError
from itpn.heads import windows
from itpn.heads.windows import InferenceConfig, argmax_at, scores, slide, window_starts
from tests.heads.test_segment import toy_segmenter


def local(images: Tensor) -> Tensor:
    """Logits that depend on where in the window a pixel is, so that averaging shows."""
    _, _, h, w = images.shape
    ramp = torch.linspace(0, 1, h)[:, None] + torch.linspace(0, 1, w)
    return torch.cat([images.float(), images.float().mean(1, keepdim=True) * ramp], 1)


def config(**numbers) -> InferenceConfig:
    return InferenceConfig(**{"crop": (8, 8), "stride": (5, 5)} | numbers)


def image(height: int, width: int, size: int = 1) -> Tensor:
    draws = torch.Generator().manual_seed(height * 1000 + width)
    return torch.randint(0, 256, (size, 3, height, width), dtype=torch.uint8, generator=draws)


@given(st.integers(1, 3000), st.integers(1, 600), st.integers(1, 600))
def test_windows_are_the_published_ones(length: int, crop: int, stride: int) -> None:
    starts = window_starts(length, crop, min(stride, crop))
    step = min(stride, crop)
    published = []
    for i in range(max(length - crop + step - 1, 0) // step + 1):
        end = min(i * step + crop, length)
        published.append(max(end - crop, 0))
    assert starts == published
    seen = {x for start in starts for x in range(start, min(start + crop, length))}
    assert seen == set(range(length)) and starts == sorted(set(starts))


@pytest.mark.parametrize("size", [(8, 8), (5, 7), (8, 3)])
def test_one_window_that_covers_the_image_is_the_whole_image(size: tuple[int, int]) -> None:
    images = image(*size, size=2)
    assert torch.equal(slide(local, images, config()), local(images))
    assert torch.equal(scores(local, images, config()), scores(local, images, config(mode="whole")))


def test_one_window_is_the_whole_image_for_a_segmenter() -> None:
    objective = toy_segmenter().eval()
    images = image(64, 64, size=2)
    whole = objective.predict(images, InferenceConfig(mode="whole"))
    assert torch.equal(objective.predict(images, InferenceConfig(crop=(64, 64), stride=(43, 43))), whole)
    assert torch.equal(objective.segment(images, (64, 64)), whole.argmax(1))
    assert objective.segment(images, (100, 81)).shape == (2, 100, 81)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 3), st.integers(1, 9))
def test_overlapping_windows_are_averaged(height: int, width: int, size: int, at_once: int) -> None:
    images = image(height, width, size)
    found = slide(local, images, config(windows_at_once=at_once))
    h, w = min(height, 8), min(width, 8)
    corners = [
        (min(i * 5, max(0, height - 8)), min(j * 5, max(0, width - 8))) for i in range(10) for j in range(10)
    ]
    views = {
        corner: local(images[..., corner[0] : corner[0] + h, corner[1] : corner[1] + w]) for corner in corners
    }
    for y in range(height):
        for x in range(width):
            seen = [
                view[..., y - top, x - left]
                for (top, left), view in views.items()
                if 0 <= y - top < h and 0 <= x - left < w
            ]
            torch.testing.assert_close(found[..., y, x], torch.stack(seen).mean(0))


def test_a_mirrored_view_is_mirrored_back_and_probabilities_averaged() -> None:
    images = image(6, 7)
    found = scores(local, images, config(flip=True))
    expected = (local(images).softmax(1) + local(images.flip(-1)).flip(-1).softmax(1)) / 2
    torch.testing.assert_close(found, expected)


def test_scales_are_averaged_at_the_images_size() -> None:
    images = image(8, 6, 2)
    found = scores(local, images, config(mode="whole", scales=(0.5, 1.0, 2.0)))
    views = []
    for factor in (0.5, 1, 2):
        size = int(8 * factor), int(6 * factor)
        view = F.interpolate(images / 255, size, mode="bilinear", antialias=True) if factor != 1 else images
        views.append(F.interpolate(local(view).softmax(1), (8, 6), mode="bilinear", antialias=True))
    torch.testing.assert_close(found, torch.stack(views).mean(0))


def test_views_of_one_picture_agree_for_a_segmenter() -> None:
    """Mirrored and scaled views see 0..1 as the plain one sees 0..255."""
    objective = toy_segmenter().eval()
    images = image(64, 64)
    plain = objective.predict(images, InferenceConfig(mode="whole")).softmax(1)
    torch.testing.assert_close(objective.logits(images / 255).softmax(1), plain, rtol=1e-4, atol=1e-5)


def test_the_best_class_is_found_a_few_classes_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    found = torch.randn(2, 23, 5, 7)
    expected = F.interpolate(found, (11, 4), mode="bilinear", antialias=True).argmax(1)
    for limit in (1, 2 * 11 * 4 * 5, 1 << 26):
        monkeypatch.setattr(windows, "MAX_SCORES", limit)
        assert torch.equal(argmax_at(found, (11, 4)), expected)
    assert torch.equal(argmax_at(found, (5, 7)), found.argmax(1))


@pytest.mark.parametrize(
    "wrong", [{"crop": (0, 8)}, {"stride": (9, 5)}, {"stride": (0, 5)}, {"scales": ()}, {"scales": (0.0,)},
              {"windows_at_once": 0}]
)  # fmt: skip
def test_mistakes_are_named(wrong: dict) -> None:
    with pytest.raises(UserError, match=r"inference\."):
        config(**wrong)
