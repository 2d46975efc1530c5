"""What is said of a data set before training, from a few of its images."""

from dataclasses import replace
from pathlib import Path

from PIL import Image

from itpn.data.check import NUM_SAMPLED, Tally, sampled
from itpn.data.check_labels import warnings_of
from itpn.data.images import find_images


def test_a_few_images_are_looked_at_from_the_first_to_the_last(tmp_path: Path) -> None:
    for i in range(NUM_SAMPLED + 10):
        Image.new("RGB", (8 + i, 8)).save(tmp_path / f"{i:03}.png")
    tally = sampled(Tally(find_images(tmp_path)))
    assert tally.num_read == NUM_SAMPLED
    smallest, _, largest = tally.sizes()
    assert (smallest.width, largest.width) == (8, 8 + NUM_SAMPLED + 9)


def test_what_was_odd_about_the_files_is_warned_of(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    images = find_images(tmp_path)
    assert warnings_of(images) == []
    assert warnings_of(replace(images, notes=("9 files are left out",))) == ["9 files are left out"]


def test_a_class_without_a_readable_image_is_warned_of(tmp_path: Path) -> None:
    for name in ("cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    (tmp_path / "dog/0.png").write_bytes(b"broken")
    assert warnings_of(find_images(tmp_path)) == []
    (tmp_path / "dog/1.png").write_bytes(b"broken")
    (line,) = warnings_of(find_images(tmp_path))
    assert line == "no image of class dog can be read, of 2; replace them, or remove the class"
