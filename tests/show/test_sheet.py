import numpy as np
import pytest
import torch
from PIL import Image

from itpn.show.sheet import GAP, MARGIN, contact_sheet, grid, image_of


def solid(colour: str, size: tuple[int, int] = (30, 20)) -> Image.Image:
    return Image.new("RGB", size, colour)


def ink_boxes(picture: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Bounding box (left, top, right, bottom) of the pixels of exactly this colour."""
    rows, columns = np.nonzero((np.asarray(picture) == colour).all(2))
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def test_image_of_rounds_clips_and_blackens_nan():
    pixels = torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0, float("nan")]).expand(3, 1, 6)
    assert np.asarray(image_of(pixels))[0, :, 0].tolist() == [0, 0, 128, 255, 255, 0]


@pytest.mark.parametrize(
    ("channels", "shown"), [(1, (0, 0, 0)), (2, (0, 0, 0)), (3, (0, 51, 102)), (5, (0, 51, 102))]
)
def test_image_of_any_number_of_channels(channels: int, shown: tuple[int, int, int]):
    pixels = 0.2 * torch.arange(channels).view(-1, 1, 1).expand(-1, 4, 6).bfloat16()
    image = image_of(pixels)
    assert image.size == (6, 4) and image.mode == "RGB"
    assert np.abs(np.asarray(image)[0, 0].astype(int) - shown).max() <= 1  # bfloat16


def test_grid_places_cells_in_rows_and_columns():
    picture = grid([[solid("#ff0000"), solid("#00ff00")], [solid("#0000ff")]])
    assert picture.size == (2 * 30 + GAP + 2 * MARGIN, 2 * 20 + GAP + 2 * MARGIN)
    assert ink_boxes(picture, (255, 0, 0)) == (MARGIN, MARGIN, MARGIN + 30, MARGIN + 20)
    assert ink_boxes(picture, (0, 255, 0)) == (MARGIN + 30 + GAP, MARGIN, MARGIN + 60 + GAP, MARGIN + 20)
    assert ink_boxes(picture, (0, 0, 255)) == (MARGIN, MARGIN + 20 + GAP, MARGIN + 30, MARGIN + 40 + GAP)


def test_headings_and_captions_are_written_outside_the_images():
    plain = np.asarray(grid([[solid("#ff0000", (90, 60))]]))
    written = np.asarray(
        grid([[solid("#ff0000", (90, 60))]], headings=[("p4", "24 x 24")], captions=[["tabby"]])
    )
    assert written.shape[1] == plain.shape[1] and written.shape[0] > plain.shape[0]
    left, top, right, bottom = ink_boxes(Image.fromarray(written), (255, 0, 0))
    assert (right - left, bottom - top) == (90, 60)
    assert (written[:top] < 200).any() and (written[bottom:] < 200).any()


def test_contact_sheet_keeps_aspect_ratios_and_reading_order():
    images = [solid("#ff0000", (400, 200)), solid("#00ff00", (10, 20)), solid("#0000ff", (64, 64))]
    sheet = contact_sheet(images, ["a", "b", "c"], columns=2, cell=64)
    red, green, blue = (ink_boxes(sheet, colour) for colour in [(255, 0, 0), (0, 255, 0), (0, 0, 255)])
    assert [(box[2] - box[0], box[3] - box[1]) for box in (red, green, blue)] == [
        (64, 32),
        (32, 64),
        (64, 64),
    ]
    assert red[0] < green[0] and red[3] == green[3] < blue[1] and blue[0] == red[0]


def test_contact_sheet_takes_images_of_every_mode():
    modes = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "F"]
    assert contact_sheet([Image.new(mode, (8, 8)) for mode in modes], modes).mode == "RGB"


@pytest.mark.parametrize(
    "caption", ["", "x" * 10_000, "two\nlines\r\n", "caf\u00e9 \udcff", "\u6f22\u5b57", "\0\x1b"]
)
def test_any_file_name_is_a_caption_and_stays_in_its_slot(caption: str):
    image = solid("#ff0000", (60, 60))
    written = np.asarray(contact_sheet([image, image], [caption, ""], cell=60))
    blank = np.asarray(contact_sheet([image, image], ["", ""], cell=60))
    assert written.shape == blank.shape
    changed = np.nonzero((written != blank).any((0, 2)))[0]
    assert changed.size == 0 or (changed.min() >= MARGIN - 1 and changed.max() < MARGIN + 60 + GAP)


def test_a_caption_that_does_not_fit_is_cut_and_one_without_any_room_left_out():
    def width_of(caption: str, cell: int) -> int:
        image = solid("#ff0000", (cell, cell))
        below = np.asarray(contact_sheet([image], [caption], cell=cell))[MARGIN + cell :]
        return int(np.ptp(np.nonzero((below < 200).any((0, 2)))[0])) if (below < 200).any() else 0

    assert width_of("short", 120) < 60 < 100 < width_of("a caption much longer than its cell", 120) <= 120
    assert width_of("caption", 6) == 0


def test_contact_sheet_refuses_what_it_cannot_lay_out():
    with pytest.raises(ValueError, match="2 images but 1 captions"):
        contact_sheet([solid("red"), solid("red")], ["one"])
    with pytest.raises(ValueError, match="needs images"):
        contact_sheet([])
