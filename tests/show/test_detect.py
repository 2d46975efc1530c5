from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from itpn.data.coco_file import read_coco
from itpn.data.masks import compressed, run_lengths
from itpn.show.colours import class_colour
from itpn.show.detect import SIDES, Shown, annotated, comparison_picture, detected, objects_picture
from tests.data.coco import content, thing, written

GREY = (90, 90, 90)


def grey(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), GREY)


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def close(values: np.ndarray, colour: tuple[int, int, int], tolerance: int = 6) -> np.ndarray:
    return np.abs(values - colour).max(-1) <= tolerance


@pytest.mark.parametrize("size", [(1, 1), (48, 36), (640, 480), (4000, 3000), (3000, 10), (10, 3000)])
def test_a_picture_is_of_a_size_to_look_at(size: tuple[int, int]) -> None:
    everything = Shown((0, 0, *size), 3, "something", 0.5, np.ones(size[::-1], bool))
    beyond = Shown((-50, -50, size[0] + 50, size[1] + 50), 1, "a long name " * 20, 1.0)
    outside = Shown((size[0] + 5, 0, size[0] + 9, 5), 2, "away")
    picture = objects_picture(grey(*size), [everything, beyond, outside])
    assert SIDES[0] <= max(picture.size) <= SIDES[1]
    assert abs(np.log(picture.width / picture.height) - np.log(size[0] / size[1])) < 0.5


def test_boxes_masks_and_labels_have_the_colour_of_the_class() -> None:
    mask = np.zeros((400, 600), bool)
    mask[150:250, 200:300] = True
    colour = class_colour(4)
    shown = pixels(objects_picture(grey(600, 400), [Shown((100, 100, 400, 350), 4, "thing", 0.87, mask)]))
    assert close(shown[100:102, 250:400], colour).all() and close(shown[200:340, 100:102], colour).all()
    tint = tuple(round(0.6 * 90 + 0.4 * value) for value in colour)
    assert close(shown[160:240, 210:290], tint).all()  # type: ignore[arg-type]
    assert close(shown[260:330, 210:290], GREY).all() and close(shown[:60], GREY).all()
    label = shown[84:98, 101:160]
    assert close(label, colour).mean() > 0.3 and not close(label, colour).all()


def test_labels_stay_apart_and_the_better_one_has_the_first_place() -> None:
    objects = [
        Shown((50, 100, 300, 300), label, "name", score) for label, score in ((0, 0.6), (1, 0.9), (2, 0.7))
    ]
    shown = pixels(objects_picture(grey(600, 400), objects))
    assert close(shown[86:98, 52:120], class_colour(1)).sum() > 200
    for label in (0, 2):
        assert close(shown, class_colour(label)).sum() > 500  # its label is not covered


def test_labels_of_a_dozen_objects_in_one_place_can_all_be_read() -> None:
    objects = [Shown((250, 150, 420, 300), label, "electronics", 0.5) for label in range(12)]
    shown = pixels(objects_picture(grey(600, 400), objects))
    least = 16 * 100 / 2  # half of a label's place; the rest are letters
    assert all(close(shown, class_colour(label), 3).sum() > least for label in range(12))


@pytest.mark.parametrize(("score", "least"), [(0.97, 100), (None, 60)])
def test_a_name_can_be_read_in_a_narrow_picture(score: float | None, least: int) -> None:
    shown = pixels(objects_picture(grey(120, 1200), [Shown((80, 300, 118, 420), 1, "mammal", score)]))
    assert close(shown[280:299], class_colour(1)).any(0).sum() >= least


def test_of_objects_that_overlap_the_smaller_is_above() -> None:
    whole, part = np.ones((400, 600), bool), np.zeros((400, 600), bool)
    part[100:200, 100:200] = True
    objects = [
        Shown((100, 100, 200, 200), 1, "small", None, part),
        Shown((0, 0, 600, 400), 0, "large", None, whole),
    ]
    pictures = [pixels(objects_picture(grey(600, 400), some)) for some in (objects, objects[::-1])]
    assert (pictures[0] == pictures[1]).all()
    assert not close(pictures[0][110:190, 110:190], tuple(pictures[0][300, 300])).any()


def test_found_objects_beside_those_that_are_there() -> None:
    box = (10.0, 10.0, 60.0, 60.0)
    rows = [[Shown(box, 0, "a")], []], [[], [Shown(box, 1, "b\n\x00", 0.5)]]
    picture = comparison_picture(
        [grey(100, 80), grey(80, 100)], *rows, captions=["one", "two"], note="0.5 or more"
    )
    assert picture.width > 2 * 480 and picture.height > 480 + 384
    left, right = pixels(picture)[:, : picture.width // 2], pixels(picture)[:, picture.width // 2 :]
    assert close(left, class_colour(0)).sum() > 500 and not close(left, class_colour(1)).any()
    assert close(right, class_colour(1)).sum() > 500
    with pytest.raises(ValueError, match="2 images with 1 truths"):
        comparison_picture([grey(9, 9)] * 2, [[]], [[], []])
    with pytest.raises(ValueError, match="0 images"):
        comparison_picture([], [], [])


def test_annotations_and_results_can_be_shown(tmp_path: Path) -> None:
    things = [thing(1), thing(2, iscrowd=1, category_id=7), thing(3, segmentation=[])]
    coco = read_coco(written(tmp_path, content([(48, 64)], annotations=things)), tmp_path)
    shown = annotated(coco, 0)
    assert [(one.name, one.label, one.box) for one in shown] == [
        ("cat", 0, (10, 10, 30, 40)),
        ("dog (crowd)", 1, (10, 10, 30, 40)),
        ("cat", 0, (10, 10, 30, 40)),
    ]
    assert shown[0].mask is not None and shown[0].mask.sum() == 300 and shown[2].mask is None
    runs = {"size": [48, 64], "counts": compressed(run_lengths(shown[0].mask)).decode()}
    result = {"image_id": 1, "category_id": 7, "bbox": [1, 2, 3, 4], "score": 0.75, "segmentation": runs}
    (found,) = detected(coco, [result, {**result, "score": 0.4}])
    assert found.box == (1, 2, 4, 6) and found.name == "dog" and found.score == 0.75
    assert found.mask is not None and np.array_equal(found.mask, shown[0].mask)
    del result["segmentation"]
    assert detected(coco, [result], 0.1)[0].mask is None
    objects_picture(grey(64, 48), [*shown, found])


def test_the_first_classes_have_colours_of_their_own() -> None:
    colours = np.array([class_colour(label) for label in range(21)])
    apart = np.abs(colours[:, None] - colours).sum(-1) + 999 * np.eye(21)
    assert apart.min() > 40 and class_colour(3) == class_colour(3)
