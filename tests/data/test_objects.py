"""Boxes and masks under cut, scale and mirror, against drawing the whole picture."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from itpn.data.coco import Coco
from itpn.data.coco_file import read_coco
from itpn.data.masks import drawn, run_lengths
from itpn.data.objects import UNKNOWN, objects_seen
from tests.data.coco import content, thing, written

SIZE = 48, 64
RESOLUTION = 56


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Coco:
    """An image of an ellipse as a polygon and as run lengths, a triangle, a crowd, and an object that has no
    mask; an empty one; and one for each of the first three."""
    folder = tmp_path_factory.mktemp("objects")
    angles = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    ellipse = np.stack([40 + 16 * np.cos(angles), 24 + 12 * np.sin(angles)], axis=1)
    polygon, box = [ellipse.ravel().tolist()], [24, 12, 32, 24]
    runs = {"size": list(SIZE), "counts": run_lengths(drawn([ellipse], SIZE)).tolist()}
    annotations = [
        thing(1, bbox=box, segmentation=polygon),
        thing(2, bbox=box, segmentation=runs, category_id=7),
        thing(3),
        thing(4, iscrowd=1),
        thing(5, segmentation=[], bbox=[50, 2, 12, 40]),
    ]
    annotations += [
        {**annotation, "id": 10 + i, "image_id": 3 + i} for i, annotation in enumerate(annotations[:3])
    ]
    return read_coco(written(folder, content([SIZE] * 5, annotations=annotations)), folder)


@st.composite
def boxes(draw: st.DrawFn) -> tuple[int, int, int, int]:
    left, top = draw(st.integers(0, 60)), draw(st.integers(0, 44))
    return left, top, draw(st.integers(1, 64 - left)), draw(st.integers(1, 48 - top))


@settings(max_examples=300, deadline=None)
@given(
    index=st.sampled_from([2, 3, 4]),
    box=boxes(),
    size=st.tuples(st.integers(8, 200), st.integers(8, 200)),
    mirrored=st.booleans(),
)
def test_objects_follow_the_picture(
    coco: Coco, index: int, box: tuple[int, int, int, int], size: tuple[int, int], mirrored: bool
) -> None:
    seen = objects_seen(coco, index, box, size, mirrored=mirrored, resolution=RESOLUTION)
    assert seen.boxes.dtype == np.float32 and seen.labels.dtype == np.int64 and seen.masks.dtype == np.uint8
    assert len(seen.boxes) == len(seen.labels) == len(seen.masks) <= 1
    laid = np.zeros(size, bool)
    for (x1, y1, x2, y2), mask in zip(seen.boxes.tolist(), seen.masks, strict=True):
        assert 0 <= x1 <= x2 - 0.999 and x2 <= size[1] and 0 <= y1 <= y2 - 0.999 and y2 <= size[0]
        assert mask.any() and set(np.unique(mask)) <= {0, 1}
        # A pixel shows the mask at its centre.
        columns, rows = (np.arange(most) + 0.5 for most in size[::-1])
        across, down = (columns - x1) / (x2 - x1) * RESOLUTION, (rows - y1) / (y2 - y1) * RESOLUTION
        inside = np.logical_and.outer(
            (down >= 0) & (down < RESOLUTION), (across >= 0) & (across < RESOLUTION)
        )
        cells = mask[
            np.ix_(down.clip(0, RESOLUTION - 1).astype(int), across.clip(0, RESOLUTION - 1).astype(int))
        ]
        laid = (cells == 1) & inside
    outline = coco.objects.outline(coco.objects.of(index)[0])
    assert outline is not None
    expected = _laid(drawn(outline, SIZE), box, size, mirrored)
    scale = max(size[1] / box[2], size[0] / box[3], 1.0)  # a pixel of the image is so many of the view
    assert (laid != expected).sum() <= 2 * scale * sum(size)


def _laid(
    mask: np.ndarray, box: tuple[int, int, int, int], size: tuple[int, int], mirrored: bool
) -> np.ndarray:
    left, top, width, height = box
    part = Image.fromarray(mask[top : top + height, left : left + width].astype(np.uint8) * 255)
    view = np.asarray(part.resize(size[::-1], Image.Resampling.BILINEAR)) > 127
    return view[:, ::-1] if mirrored else view


@settings(max_examples=100, deadline=None)
@given(size=st.tuples(st.integers(32, 300), st.integers(32, 300)), mirrored=st.booleans())
def test_uncut_masks_fill_their_boxes(coco: Coco, size: tuple[int, int], mirrored: bool) -> None:
    seen = objects_seen(coco, 0, (0, 0, 64, 48), size, mirrored=mirrored, resolution=RESOLUTION)
    assert seen.labels.tolist() == [0, 1, 0, 0]
    scale = np.array([size[1] / 64, size[0] / 48] * 2)
    expected = np.array([(24, 12, 56, 36), (24, 12, 56, 36), (10, 10, 30, 40), (50, 2, 62, 42)]) * scale
    if mirrored:
        expected[:, [0, 2]] = size[1] - expected[:, [2, 0]]
    assert np.abs(seen.boxes - expected).max() < 1e-4
    for mask in seen.masks[:3]:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        edge = RESOLUTION // 14  # a pixel of the image
        assert rows[0] <= edge and columns[0] <= edge
        assert rows[-1] >= RESOLUTION - 1 - edge and columns[-1] >= RESOLUTION - 1 - edge
    assert abs(float((seen.masks[0] == 1).mean()) - np.pi / 4) < 0.02  # that of an ellipse
    assert abs(float((seen.masks[1] == 1).mean()) - np.pi / 4) < 0.05
    triangle = seen.masks[2]
    assert abs(float(triangle.mean()) - 0.5) < 0.02
    assert triangle[0].sum() > triangle[-1].sum()
    assert triangle[:, -1 if mirrored else 0].sum() > triangle[:, 0 if mirrored else -1].sum()
    assert (seen.masks[3] == UNKNOWN).all()


def test_objects_of_which_nothing_is_left_vanish(coco: Coco) -> None:
    assert len(objects_seen(coco, 1, (0, 0, 64, 48), (48, 64), mirrored=False, resolution=8).labels) == 0
    empty = objects_seen(coco, 0, (0, 0, 9, 9), (90, 90), mirrored=True, resolution=8)
    assert empty.boxes.shape == (0, 4) and empty.masks.shape == (0, 8, 8) and empty.labels.shape == (0,)
    # The lower right corner of the triangle's box, where the triangle is not.
    corner = objects_seen(coco, 0, (22, 32, 8, 8), (80, 80), mirrored=False, resolution=8)
    assert [box.tolist() for box in corner.boxes] == [[20, 0, 80, 40]] * len(corner.boxes)
    # Less than a pixel of the scaled picture.
    tiny = objects_seen(coco, 0, (0, 0, 64, 48), (2, 2), mirrored=False, resolution=8)
    assert tiny.labels.tolist() == [0, 1]


def test_boxes_that_reach_outside_are_cut_off(tmp_path: Path) -> None:
    annotations = [thing(1, bbox=[-10, 5, 90, 30], segmentation=[])]
    wide = read_coco(written(tmp_path, content([SIZE], annotations=annotations)), tmp_path)
    seen = objects_seen(wide, 0, (0, 0, 64, 48), (96, 128), mirrored=False, resolution=8)
    assert seen.boxes.tolist() == [[0, 10, 128, 70]] and wide.findings[0].reason.endswith("outside the image")
