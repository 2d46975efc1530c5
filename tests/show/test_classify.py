from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from itpn.show.classify import BAR, BEST, OTHER, confusion_picture, prediction_picture
from itpn.show.sheet import MARGIN

LONG = "a class with quite a long name, also known as otherwise"


def reliability() -> torch.Tensor:
    bins = torch.arange(15).double()
    return torch.stack([bins, (bins + 0.5) / 15, bins / 15], dim=1)


def drawn(confusion: torch.Tensor, names: list[str], out: Path) -> np.ndarray:
    confusion_picture(confusion, reliability(), names, out)
    return np.asarray(Image.open(out).convert("RGB"))


def area(picture: np.ndarray, colour: str) -> int:
    return int((picture == ImageColor.getrgb(colour)).all(2).sum())


@pytest.mark.parametrize(
    ("num_classes", "name"), [(1, ""), (2, LONG), (18, ""), (40, LONG), (41, LONG), (1000, LONG)]
)
def test_nothing_is_cut_off_for_any_number_of_classes(tmp_path: Path, num_classes: int, name: str) -> None:
    confusion = torch.randint(0, 9, (num_classes, num_classes))
    confusion[-1] = 0  # a class without images
    picture = drawn(confusion, [f"{i} {name}" for i in range(num_classes)], tmp_path / "new/picture.png")
    for edge in (picture[:10], picture[-10:], picture[:, :10], picture[:, -10:]):
        assert (edge == 255).all()
    assert (picture < 128).any() and max(picture.shape) < 3000


def test_the_diagonal_is_dark_and_the_rest_is_light(tmp_path: Path) -> None:
    right = drawn(9 * torch.eye(5, dtype=torch.long), list("abcde"), tmp_path / "right.png")
    wrong = drawn(9 - 9 * torch.eye(5, dtype=torch.long), list("abcde"), tmp_path / "wrong.png")
    assert area(right, "#0a3069") > 20_000 > area(wrong, "#0a3069")


def test_a_single_mistake_among_thousands_of_classes_is_seen(tmp_path: Path) -> None:
    confusion = torch.eye(2000, dtype=torch.long)
    without = drawn(confusion, ["name"] * 2000, tmp_path / "without.png")
    confusion[1500, 300] = 1
    changed = (drawn(confusion, ["name"] * 2000, tmp_path / "with.png") != without).any(2)
    assert changed[:, : changed.shape[1] // 2].sum() >= 9  # in the matrix, not in the list of mistakes


@pytest.mark.parametrize("name", ["$x$", "$\\frac{$", "two\nlines", "\udcff\0", "_^{}\\"])
def test_any_name_can_be_drawn(tmp_path: Path, name: str) -> None:
    drawn(torch.ones(3, 3, dtype=torch.long), [name, "b", name], tmp_path / "picture.png")
    prediction_picture(torch.rand(1, 3, 32, 32), [[name]], [[0.5]], [name])


def test_a_matrix_of_other_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="for 2 classes"):
        drawn(torch.ones(3, 3, dtype=torch.long), ["a", "b"], tmp_path / "picture.png")


def test_bars_are_as_long_as_the_scores() -> None:
    picture = np.asarray(prediction_picture(torch.ones(1, 3, 64, 64), [["", ""]], [[0.75, 0.125]], cell=200))
    for colour, share in ((BEST, 0.75), (OTHER, 0.125)):
        assert area(picture, colour) == BAR * round(200 * share)
    assert picture.shape[1] == 200 + 2 * MARGIN


def test_bars_have_room_below_narrow_images_and_rows_are_filled_in_order() -> None:
    images = torch.linspace(0, 1, 5).view(5, 1, 1, 1).expand(5, 3, 96, 32)
    labels, scores = [["cat", "dog"]] * 5, [[1.0, 0.0]] * 5
    picture = prediction_picture(images, labels, scores, ["a.png"] * 5, columns=3, cell=192)
    assert area(np.asarray(picture), BEST) > 5 * BAR * 150  # less the letters
    one_row = prediction_picture(images[:3], labels[:3], scores[:3], ["a.png"] * 3, columns=3, cell=192)
    assert picture.width == one_row.width and picture.height > 1.8 * one_row.height


def test_predictions_that_do_not_belong_together_are_refused() -> None:
    images = torch.rand(2, 3, 32, 32)
    for labels, scores, captions in (([["a"]], [[1.0]] * 2, ()), ([["a"]] * 2, [[1.0]] * 2, ["one"])):
        with pytest.raises(ValueError, match="2 images"):
            prediction_picture(images, labels, scores, captions)
    with pytest.raises(ValueError, match="0 images"):
        prediction_picture(images[:0], [], [])
