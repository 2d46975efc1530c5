"""Masks against pycocotools, and what hostile ones are refused for."""

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as reference

from itpn.data.masks import (
    Mask,
    checked,
    compressed,
    cropped,
    drawn,
    fill,
    packed,
    region_of,
    run_lengths,
    runs_of_text,
    unpacked,
)

SIZE = 200, 240
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")


@st.composite
def masks(draw: st.DrawFn) -> Mask:
    """Any mask that is not empty, of a few runs or of many."""
    height, width, seed = (draw(st.integers(low, high)) for low, high in ((1, 60), (1, 60), (0, 1 << 30)))
    rng = np.random.default_rng(seed)
    mask = rng.random((height, width)) < draw(st.sampled_from([0.02, 0.5, 0.98]))
    if draw(st.booleans()):
        mask[: height // 2 + 1, : width // 3 + 1] = True
    mask[rng.integers(height), rng.integers(width)] = True
    return mask


def star(seed: int, points: int = 30) -> np.ndarray:
    rng = np.random.default_rng(seed)
    angles, radii = np.sort(rng.random(points) * 2 * np.pi), 40 + 40 * rng.random(points)
    return np.stack([120 + radii * np.cos(angles), 100 + radii * np.sin(angles)], axis=1)


def test_run_lengths_begin_outside_and_go_down_the_columns() -> None:
    mask = np.array([[True, False, True], [True, False, False]])
    assert run_lengths(mask).tolist() == [0, 2, 2, 1, 1]
    assert run_lengths(np.zeros((2, 2), bool)).tolist() == [4]


@settings(max_examples=200, deadline=None)
@given(mask=masks())
def test_run_lengths_are_those_of_pycocotools(mask: Mask) -> None:
    expected = reference.encode(np.asfortranarray(mask, np.uint8))
    runs = run_lengths(mask)
    assert compressed(runs) == expected["counts"]
    assert np.array_equal(runs_of_text(expected["counts"]), runs)
    assert np.array_equal(drawn(runs, mask.shape), mask)
    x, y, width, height = reference.toBbox(expected)
    assert region_of(runs, mask.shape) == (x, y, x + width, y + height)


def test_long_run_lengths_too() -> None:
    mask = np.zeros((3000, 5000), np.uint8)
    mask[10:2900, 20:4900] = 1
    assert compressed(run_lengths(mask.astype(bool))) == reference.encode(np.asfortranarray(mask))["counts"]


@pytest.mark.parametrize("seed", range(20))
def test_polygons_are_filled_as_by_pycocotools(seed: int) -> None:
    points = star(seed)
    ours = fill(points, SIZE)
    theirs = reference.decode(reference.frPyObjects([points.ravel().tolist()], *SIZE))[..., 0].astype(bool)
    assert (ours & theirs).sum() / (ours | theirs).sum() > 0.97  # but for pixels on the rim


def test_a_pixel_is_inside_if_its_centre_is() -> None:
    square = np.array([[1.4, 0.6], [3.6, 0.6], [3.6, 2.4], [1.4, 2.4]])
    expected = np.zeros((4, 5), bool)
    expected[1:2, 1:4] = True
    assert np.array_equal(fill(square, (4, 5)), expected)
    assert np.array_equal(fill(square[::-1], (4, 5)), expected)
    far = square + np.array([1000, -2000])
    assert not fill(far, (4, 5)).any()


def test_what_is_packed_comes_back() -> None:
    outlines: list[Any] = [
        None,
        [[1, 2, 3, 4, 5, 7.5]],
        [[0.5, 0, 9, 0, 9, 9], [20, 20, 30, 20, 30, 30, 20, 30]],
        {"size": [2, 3], "counts": [1, 2, 3]},
        {"size": [2, 3], "counts": "123"},
    ]
    for segmentation in outlines:
        outline, _ = checked(segmentation, (2, 3))
        again = unpacked(packed(outline))
        if isinstance(outline, list):
            assert again is not None and len(again) == len(outline)
            assert all(np.array_equal(a, b) for a, b in zip(again, outline, strict=True))
            assert [points.ravel().tolist() for points in again] == segmentation
        else:
            assert outline is None if again is None else np.array_equal(again, outline)


@pytest.mark.parametrize("seed", range(5))
def test_polygons_and_run_lengths_are_cut_out_alike(seed: int) -> None:
    points = star(seed)
    runs = run_lengths(fill(points, SIZE))
    for region in (region_of([points], SIZE), (60.5, 50.25, 140.0, 180.0)):
        one, other = (cropped(outline, SIZE, region, 112) for outline in ([points], runs))
        assert one.shape == other.shape == (112, 112)
        assert (one & other).sum() / (one | other).sum() > 0.95


def zigzag(points: int) -> list[float]:
    return [float(v) for i in range(points) for v in (i % 2 * 150, i % 199)]


UNUSABLE: dict[str, tuple[Any, str]] = {
    "text": ("polygon", "neither polygons nor run lengths"),
    "number": (7, "neither polygons nor run lengths"),
    "fields": ({"counts": [1]}, "neither polygons nor run lengths"),
    "words": ([["a"] * 6], "no list of numbers"),
    "truth": ([[True] * 6], "no list of numbers"),
    "numbers that are none": ([[None] * 6], "no list of numbers"),
    "huge integers": ([[10**400] * 6], "no list of numbers"),
    "odd": ([[1, 2, 3, 4, 5, 6, 7]], "a polygon of 7 numbers"),
    "line": ([[1, 2, 3, 4]], "a polygon of 4 numbers"),
    "two without enough": ([[1, 2, 3], []], "a polygon of 3 numbers"),
    "pairs of too few": ([[1, 2], [3, 4]], "a polygon of 4 numbers"),
    "words in pairs": ([["a", "b"]] * 3, "no list of numbers"),
    "not a number": ([[1, 2, 3, float("nan"), 5, 6]], "not finite"),
    "infinite": ([[1, 2, 3, float("inf"), 5, 6]], "not finite"),
    "far": ([[1, 2, 3, 1e300, 5, 6]], "too large"),
    "long side": ([[0, 0, 1e9, 0, 5, 6]], "longer than the limit"),
    "many long sides": ([zigzag(60_000)], "longer than the limit"),
    "many points": ([zigzag(1_000_000)], "more points than the limit"),
    "many polygons": ([[1, 2, 3, 4, 5, 7]] * 50_000, "more points than the limit"),
    "flattened": ([[1, 1, 5, 5, 9, 9]], "without area"),
    "other size": ({"size": [100_000, 100_000], "counts": [10**10]}, "run lengths of size [100000, 100000]"),
    "turned": (
        {"size": [240, 200], "counts": [48_000]},
        "but the image has [200, 240]; its height goes before",
    ),
    "short": ({"size": [200, 240], "counts": [1, 2]}, "do not add up to the image's 48,000 pixels"),
    "negative": ({"size": [200, 240], "counts": [48_001, -1]}, "do not add up"),
    "overflowing": ({"size": [200, 240], "counts": [2**62, 2**62, 2**62, 2**62]}, "do not add up"),
    "fractions": ({"size": [200, 240], "counts": [0.5, 1]}, "neither text nor a list"),
    "empty list": ({"size": [200, 240], "counts": []}, "neither text nor a list"),
    "empty text": ({"size": [200, 240], "counts": ""}, "no compressed text"),
    "cut text": ({"size": [200, 240], "counts": "oo"}, "no compressed text"),
    "other text": ({"size": [200, 240], "counts": "é\x00 "}, "no compressed text"),
    "long number": ({"size": [200, 240], "counts": "o" * 9 + "0"}, "longer than any image"),
    "decompression bomb": ({"size": [200, 240], "counts": "ooooo0" * 1000}, "do not add up"),
    "empty mask": ({"size": [200, 240], "counts": [48_000]}, "without pixels"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_mask_that_cannot_be_used_says_why(name: str) -> None:
    segmentation, words = UNUSABLE[name]
    tracemalloc.start()
    try:
        with pytest.raises(ValueError) as caught:
            checked(segmentation, SIZE)
        assert words in str(caught.value) and len(str(caught.value)) < 200
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(min_codepoint=48, max_codepoint=111), max_size=40))
def test_no_compressed_text_makes_a_mask_of_another_size(text: str) -> None:
    try:
        outline, _ = checked({"size": [5, 7], "counts": text}, (5, 7))
    except ValueError:
        return
    assert outline is not None and drawn(outline, (5, 7)).shape == (5, 7)


SQUARE = [1, 1, 4, 1, 4, 4, 1, 4]
PAIRS = [[1, 1], [4, 1], [4, 4], [1, 4]]


@pytest.mark.parametrize("written", [SQUARE, PAIRS, [PAIRS], [SQUARE]])
def test_polygons_are_read_without_a_list_around_them_and_as_pairs(written: Any) -> None:
    outline, odd = checked(written, (6, 5))
    assert isinstance(outline, list) and [points.ravel().tolist() for points in outline] == [SQUARE]
    assert not odd


@pytest.mark.parametrize("bad", [[3, 3, 4, 4], [], ["a"] * 6, [1, 2, 3, float("nan"), 5, 6], None])
def test_a_bad_polygon_alone_is_left_out(bad: Any) -> None:
    for polygons in ([SQUARE, bad], [bad, SQUARE]):
        outline, odd = checked(polygons, (6, 5))
        assert isinstance(outline, list) and [points.ravel().tolist() for points in outline] == [SQUARE]
        assert odd.startswith("1 of 2 polygons left out: a polygon ")


def test_run_lengths_are_read_in_a_list_and_as_bytes_that_python_shows() -> None:
    runs = run_lengths(fill(star(0), SIZE))
    text = compressed(runs)
    for counts in (text.decode(), str(text)):
        for written in ({"size": [*SIZE], "counts": counts}, [{"size": [*SIZE], "counts": counts}]):
            outline, odd = checked(written, SIZE)
            assert np.array_equal(outline, runs) and not odd  # type: ignore[arg-type]
    assert b"\\" in compressed(np.array([0, 44])), "so that what Python escapes occurs"
