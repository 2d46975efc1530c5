import numpy as np
import pytest
from PIL import Image

from itpn.show import segment
from itpn.show.segment import (
    LEAST_TILE,
    LEGEND_WIDTH,
    RIGHT,
    UNLABELLED,
    WRONG,
    class_colours,
    comparison_picture,
    legend,
    mistakes,
    overlay,
    segmentation_picture,
    shares_of,
)
from itpn.show.sheet import MARGIN

GREY = Image.new("RGB", (40, 30), (128, 128, 128))
NAMES = ("sky", "sea", "a name that is far too long to fit into the column of a legend", "fog")


def halves(left: int, right: int) -> np.ndarray:
    labels = np.full((30, 40), left, np.uint8)
    labels[:, 20:] = right
    return labels


def has(picture: Image.Image, colour: np.ndarray) -> bool:
    return bool((np.asarray(picture) == colour).all(2).any())


def test_an_overlay_tints_classes_and_leaves_the_rest() -> None:
    colours = class_colours(4)
    pixels = np.asarray(overlay(GREY, halves(1, 255), colours, 0.5)).astype(int)
    assert np.abs(pixels[:, :19] - (128.0 + colours[1]) / 2).max() <= 1
    assert (pixels[:, 19] < pixels[:, 18]).any()  # a line where they meet
    assert (pixels[:, 20:] == 128).all()
    with pytest.raises(ValueError, match="labels"):
        overlay(GREY, halves(0, 1).T, colours)


def test_colours_are_the_same_however_many_classes_there_are() -> None:
    few, many = class_colours(5), class_colours(150)
    assert np.array_equal(few, many[:5]) and many.shape == (150, 3) and many.dtype == np.uint8
    assert len({tuple(colour) for colour in many.tolist()}) == 150


def test_the_legend_has_the_classes_that_are_present_and_no_others() -> None:
    labels = halves(2, 255)
    labels[:10] = 0
    assert shares_of([labels], 4) == [(0, 0.5), (2, 0.5)]
    labels[:20] = 0
    shares = shares_of([labels, labels], 4)
    assert [label for label, _ in shares] == [0, 2] and shares[0][1] == pytest.approx(0.8)
    picture = segmentation_picture(GREY, labels, NAMES, "a caption", cell=80)
    colours = class_colours(4)
    assert [has(picture, colour) for colour in colours] == [True, False, True, False]
    assert shares_of([np.full((3, 3), 255, np.uint8)], 4) == []


def test_a_long_legend_gets_columns() -> None:
    colours = class_colours(150)
    shares = [(i, 1 / 150) for i in range(150)]
    names = [f"class {i}" for i in range(150)]
    picture = legend(shares, "shares", names, colours, 300)
    assert picture.height == 300 and all(has(picture, colour) for colour in colours)


def test_the_shares_beside_a_comparison_are_of_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    monkeypatch.setattr(segment, "legend", lambda shares, *rest: told.append(shares) or legend(shares, *rest))
    truth, prediction = halves(0, 1), halves(2, 0)
    truth[:, 30:] = 0
    comparison_picture([GREY], [truth], [prediction], NAMES)
    assert told == [[(0, 0.75), (1, 0.25), (2, 0.0)]]


def test_a_narrow_picture_has_room_for_its_headings() -> None:
    picture = segmentation_picture(Image.new("RGB", (12, 300)), np.zeros((300, 12), np.uint8), ["sky"])
    assert picture.width > 2 * LEAST_TILE + LEGEND_WIDTH
    second = np.asarray(picture)[:60, LEAST_TILE + MARGIN : -LEGEND_WIDTH]
    assert (second.min(-1) < 128).any(0).nonzero()[0].max() > 70, "prediction is written out"


def test_mistakes() -> None:
    found = np.asarray(mistakes(halves(1, 255), halves(0, 0), 4))
    assert (found[:, :20] == WRONG).all() and (found[:, 20:] == UNLABELLED).all()
    assert (np.asarray(mistakes(halves(1, 1), halves(1, 1), 4)) == RIGHT).all()


def test_comparison() -> None:
    images = [GREY, GREY.rotate(90, expand=True), GREY]
    truths = [halves(0, 255), halves(1, 1).T, halves(0, 3)]
    predictions = [halves(0, 1), halves(1, 0).T, halves(0, 3)]
    picture = comparison_picture(images, truths, predictions, NAMES, ["a", "b", "c"], cell=60)
    wide = comparison_picture(images[:1], truths[:1], predictions[:1], NAMES, cell=60)
    assert picture.width == wide.width and picture.height > 2 * wide.height
    assert has(picture, np.array(WRONG)) and has(picture, class_colours(4)[3])
    assert not has(picture, class_colours(4)[2])
    many = halves(0, 3).astype(np.int32)
    many[0, 0] = 65_535
    comparison_picture([GREY], [many], [halves(0, 3).astype(np.int64)], NAMES)
    with pytest.raises(ValueError, match="predicted ones"):
        comparison_picture([GREY], [halves(0, 1)], [halves(0, 1)[:-1]], NAMES)
    with pytest.raises(ValueError, match="zip"):
        comparison_picture([GREY], [halves(0, 1)], [], NAMES)
