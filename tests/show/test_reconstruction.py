import numpy as np
import pytest
import torch
from PIL import Image

from itpn.show.pca import pca_colours
from itpn.show.reconstruction import distillation_picture, reconstruction_picture
from itpn.show.sheet import GAP, MARGIN


def plain(value: float, batch: int = 2, height: int = 96, width: int = 96) -> torch.Tensor:
    return torch.full((batch, 3, height, width), value)


def cells_of(picture: Image.Image, top: int, size: int, columns: int) -> list[np.ndarray]:
    """The pictures of the row that begins at `top`."""
    starts = [MARGIN + column * (size + GAP) for column in range(columns)]
    return [np.asarray(picture)[top : top + size, x : x + size] for x in starts]


def test_without_levels_there_are_three_columns_in_order():
    picture = reconstruction_picture(plain(0.2), plain(0.4), plain(0.6))
    assert picture.width == 3 * 192 + 2 * GAP + 2 * MARGIN
    bottom = picture.height - MARGIN
    for top in (bottom - 192, bottom - 192 - GAP - 192):
        shown = cells_of(picture, top, 192, 3)
        assert [np.unique(cell).tolist() for cell in shown] == [[51], [102], [153]]


def test_levels_are_shown_cell_by_cell_without_blur():
    levels = [
        (f"p{s}", torch.randn(2, 8, 96 // s, 96 // s, generator=torch.Generator().manual_seed(s)))
        for s in (4, 8, 16)
    ]
    picture = reconstruction_picture(plain(0.2), plain(0.4), plain(0.6), levels)
    assert picture.width == 6 * 192 + 5 * GAP + 2 * MARGIN
    for stride, cell in zip(
        (4, 8, 16), cells_of(picture, picture.height - MARGIN - 192, 192, 6)[3:], strict=True
    ):
        side = 2 * stride  # 96 pixels are shown as 192
        blocks = cell.reshape(192 // side, side, 192 // side, side, 3)
        assert (blocks == blocks[:, :1, :, :1]).all()
        assert len(np.unique(blocks[:, 0, :, 0].reshape(-1, 3), axis=0)) > 20


def test_picture_is_repeatable():
    images, maps = torch.rand(2, 3, 32, 32), [("p4", torch.randn(2, 4, 8, 8))]
    pictures = [reconstruction_picture(images, images, images, maps, ["a", "b"]).tobytes() for _ in range(2)]
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize(
    ("height", "width", "shown"),
    [
        (224, 224, (224, 224)),
        (96, 96, (192, 192)),
        (512, 384, (256, 192)),
        (32, 64, (128, 256)),
        (640, 16, (160, 4)),
        (8, 3, (256, 96)),
    ],
)
def test_images_are_shown_at_powers_of_two(height: int, width: int, shown: tuple[int, int]):
    images = plain(0.0, 1, height, width)
    picture = np.asarray(reconstruction_picture(images, images, images))
    black_columns = (picture[-MARGIN - 1] == 0).all(1).sum()
    black_rows = (picture[:, MARGIN] == 0).all(1).sum()
    assert (black_rows, black_columns) == (shown[0], 3 * shown[1])


def test_captions_make_room_below_each_row():
    images = plain(0.5)
    without = reconstruction_picture(images, images, images)
    captioned = reconstruction_picture(images, images, images, captions=["cat.png", "dog.png"])
    assert captioned.width == without.width and captioned.height > without.height


def test_what_does_not_belong_together_is_refused():
    images = plain(0.5)
    with pytest.raises(ValueError, match="must be alike"):
        reconstruction_picture(images, images, plain(0.5, 1))
    with pytest.raises(ValueError, match="not empty"):
        reconstruction_picture(images[:0], images[:0], images[:0])
    with pytest.raises(ValueError, match="one per image"):
        reconstruction_picture(images, images, images, [("p4", torch.zeros(1, 4, 2, 2))])
    with pytest.raises(ValueError, match="one per image"):
        reconstruction_picture(images, images, images, captions=["only one"])


def test_student_and_teacher_share_colours_and_similarity_is_grey():
    images = plain(0.2, 1, 64, 64)
    target, prediction = torch.randn(2, 1, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    similarity = torch.linspace(-1, 1, 16).view(1, 1, 4, 4)
    levels = [("p16", target)]
    picture = distillation_picture(images, images, levels, target, prediction, similarity)
    *_, taught, learned, grey = cells_of(picture, picture.height - MARGIN - 256, 256, 6)
    for cell, colours in (
        (taught, pca_colours(target)),
        (learned, pca_colours(prediction, fitted_to=target)),
        (grey, similarity.clamp(0, 1).expand(-1, 3, -1, -1)),
    ):
        shown = cell[32::64, 32::64].transpose(2, 0, 1)  # the middles of the 4 x 4 cells
        assert (shown == (colours[0] * 255).round().numpy()).all()
