"""Boxes that are in other units than COCO's."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from itpn.data.coco import Coco
from itpn.data.coco_file import read_coco
from itpn.errors import UserError
from tests.data.coco import Content, content, thing, written

H, W = 48, 64
Box = list[float]


def shares(box: Box) -> Box:
    return [box[0] / W, box[1] / H, box[2] / W, box[3] / H]


def corners(box: Box) -> Box:
    return [box[0], box[1], box[0] + box[2], box[1] + box[3]]


def centre(box: Box) -> Box:
    return [box[0] + box[2] / 2, box[1] + box[3] / 2, box[2], box[3]]


WRITTEN: dict[str, tuple[Callable[[Box], Box], Callable[[Box], Box]]] = {
    "x1, y1, x2, y2:": (corners, lambda b: [b[0], b[1], b[2] - b[0], b[3] - b[1]]),
    "the centre's x, y, then width, height:": (centre, lambda b: [b[0] - b[2] / 2, b[1] - b[3] / 2, *b[2:]]),
    "x, y, width, height in shares of the image": (
        shares,
        lambda b: [b[0] * W, b[1] * H, b[2] * W, b[3] * H],
    ),
}
"""By what they look like: how boxes are written, and what the message says to do."""


def boxes(num: int, seed: int = 0) -> list[Box]:
    rng = np.random.default_rng(seed)
    extent = rng.uniform(6, 20, (num, 2))
    return np.concatenate([rng.uniform(0, 1, (num, 2)) * ([W, H] - extent), extent], axis=1).tolist()


def polygon(box: Box) -> list[Box]:
    x, y, right, bottom = corners(box)
    return [[x, y, right, y, right, bottom, x, bottom]]


def read(folder: Path, annotations: list[Content]) -> Coco:
    return read_coco(written(folder, content([(H, W)], annotations=annotations)), folder)


def things(written: Callable[[Box], Box], masks: bool, num: int = 40, **fields: Any) -> list[Content]:
    return [
        thing(i, bbox=written(box), segmentation=polygon(box) if masks else [], area=None, **fields)
        for i, box in enumerate(boxes(num))
    ]


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("units", WRITTEN)
def test_boxes_in_other_units_are_named_and_read_once_they_are_put_right(
    tmp_path: Path, units: str, masks: bool
) -> None:
    write, cure = WRITTEN[units]
    annotations = things(write, masks)
    if write is centre and not masks:  # few reach out of the image
        coco = read(tmp_path, annotations)
        assert any(f"they look like {units}" in note for note in coco.notes)
    else:
        with pytest.raises(UserError, match=f"40 boxes looked at do not fit .*they look like {units}"):
            read(tmp_path, annotations)
    right = [each | {"bbox": cure(each["bbox"])} for each in annotations]
    coco = read(tmp_path, right)
    assert not coco.notes and np.allclose(coco.objects.boxes, boxes(40))


@pytest.mark.parametrize("units", [corners, centre])
def test_boxes_in_shares_of_other_corners_are_named_as_well(
    tmp_path: Path, units: Callable[[Box], Box]
) -> None:
    words = {corners: "x1, y1, x2, y2 in shares", centre: "the centre's x, y, then width, height, in shares"}
    with pytest.raises(UserError, match=f"40 of 40 boxes .*they look like {words[units]}"):
        read(tmp_path, things(lambda box: shares(units(box)), False))


def test_corners_inside_the_image_are_told_by_the_areas(tmp_path: Path) -> None:
    annotations = [thing(i, bbox=[1 + i, 2 + i, 11 + i, 22 + i], segmentation=[], area=200) for i in range(5)]
    with pytest.raises(UserError, match="they look like x1, y1, x2, y2: write x1, y1, x2 - x1, y2 - y1"):
        read(tmp_path, annotations)


def test_boxes_beside_their_masks_are_an_error_and_a_few_are_not(tmp_path: Path) -> None:
    good, wild = (
        things(list, True, 10),
        things(lambda box: [box[1], box[0] / 4, box[3] / 3, box[2] / 3], True),
    )
    with pytest.raises(UserError, match=r"boxes looked at do not fit .*correct them"):
        read(tmp_path / "most", wild[:12] + good)
    coco = read(tmp_path / "few", [*good, wild[0] | {"id": 99}])
    assert len(coco.findings) == 1 and "annotation 99" in coco.notes[0]


def test_sound_boxes_of_any_kind_are_never_taken_for_others(tmp_path: Path) -> None:
    for seed in range(5):
        annotations = [thing(i, bbox=box, segmentation=[]) for i, box in enumerate(boxes(3, seed))]
        assert not read(tmp_path / str(seed), annotations).notes
    whole = thing(1, bbox=[0, 0, W, H], segmentation=[])
    beyond = thing(2, bbox=[-4, -4, W + 8, H + 8], segmentation=[])
    assert len(read(tmp_path / "whole", [whole, beyond]).objects) == 2


def test_a_box_within_a_pixel_is_odd(tmp_path: Path) -> None:
    annotations = [*things(list, False, 3), thing(9, bbox=[0.1, 0.2, 0.3, 0.3], segmentation=[])]
    (finding,) = read(tmp_path, annotations).findings
    assert finding.annotation == "9" and "within a single pixel, as shares" in finding.reason


def test_shares_in_polygons_as_well_are_named(tmp_path: Path) -> None:
    annotations = things(shares, True)
    for each in annotations:
        each["segmentation"] = [
            [value / (H if i % 2 else W) for i, value in enumerate(each["segmentation"][0])]
        ]
    with pytest.raises(UserError, match=r"in shares of the image: .*and polygons alike"):
        read(tmp_path, annotations)


def test_few_of_many_annotations_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("itpn.data.coco_units.NUM_BOXES", 8)
    file = written(tmp_path, content([(H, W)], annotations=things(shares, False)))
    with pytest.raises(UserError, match="8 of 8 boxes looked at"):
        read_coco(file, tmp_path)
    file.write_text(json.dumps(content([(H, W)], annotations=["nonsense", *things(list, True, 7)])))
    assert len(read_coco(file, tmp_path).objects) == 7


def test_shares_that_may_begin_with_the_centre_are_told_as_both(tmp_path: Path) -> None:
    box = centre([20, 12, 20, 24])
    with pytest.raises(
        UserError, match=r"x, y, width, height in shares .*if x, y are the centre's, as YOLO has"
    ):
        read(tmp_path, [thing(1, bbox=shares(box), segmentation=[])])
