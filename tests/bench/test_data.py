import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from itpn.bench.data import PlainWay, drawn, run
from itpn.bench.photographs import photograph, sizes_of
from itpn.data.picture import open_picture
from itpn.data.transforms import random_resized_crop_flip
from itpn.errors import UserError


def written(path: Path, size: tuple[int, int] = (120, 90), **options: object) -> Path:
    photograph(np.random.default_rng(0), size).save(path, **options)
    return path


def test_both_ways_load_the_crops_that_training_draws(tmp_path: Path) -> None:
    path = written(tmp_path / "x.png")
    plain_way = PlainWay((32, 32))
    for index in range(8):
        sample = drawn(path, 1, index)
        with open_picture(path) as picture:
            ours = random_resized_crop_flip(
                picture, (32, 32), min_scale=0.2, flip=0.5, generator=sample.generator()
            )
        plain = plain_way(sample)
        assert plain.shape == ours.shape and plain.dtype == ours.dtype == torch.uint8
        assert (ours.int() - plain.int()).abs().max() <= 1


def test_the_plain_way_is_torchvisions_transform(tmp_path: Path) -> None:
    path = written(tmp_path / "x.jpg")
    sample = drawn(path, 0, 0)
    left, top, width, height = sample.box
    image = v2.functional.resized_crop(
        Image.open(path), top, left, height, width, [16, 16], InterpolationMode.BICUBIC
    )
    image = v2.functional.horizontal_flip(image) if sample.mirrored else image
    assert torch.equal(PlainWay((16, 16))(sample), v2.functional.pil_to_tensor(image))


def test_figures_of_made_up_photographs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    run(
        [
            "--synthetic",
            "60x40,90x70",
            "--image-size",
            "16",
            "--num",
            "3",
            "--rounds",
            "1",
            "--json",
            str(out),
        ]
    )
    figures = json.loads(out.read_text())
    assert list(figures) == ["60 x 40", "90 x 70"]
    for result in figures.values():
        assert result["num_images"] == 3 and result["mean_difference"] < 1
        assert result["ratio"] == pytest.approx(result["ours"] / result["plain"])
    assert "Synthetic JPEGs" in capsys.readouterr().out


def test_a_folder_of_all_sorts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path / "small.jpg")
    written(tmp_path / "large.png", (900, 700))
    exif = Image.Exif()
    exif[0x0112] = 6
    written(tmp_path / "turned.jpg", exif=exif)
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    text = struct.pack("<HHI4s", 0x0112, 2, 4, b"abc")  # as the orientation
    written(tmp_path / "broken-exif.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\1\0" + text + bytes(4))
    out = tmp_path / "figures.json"
    run([str(tmp_path), "--image-size", "16", "--rounds", "1", "--json", str(out)])
    figures = json.loads(out.read_text())
    assert {name: result["num_images"] for name, result in figures.items()} == {
        "below 0.5 megapixels": 2,
        "0.5 to 2 megapixels": 1,
    }
    assert "2 images left out" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["500", "500x", "0x10", "500x400,", "9999999x10"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="WIDTHxHEIGHT"):
        sizes_of(text)


def test_made_up_images_have_a_largest_size(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="134,217,728 pixels at most"):
        run(["--synthetic", "60x40,99999x99999"])
    assert not capsys.readouterr().out


def test_a_file_that_cannot_be_written_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("itpn.bench.data.measure_all", lambda *arguments: pytest.fail("measured"))
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(UserError, match=r"cannot write .*Not a directory.*--json"):
        run(["--synthetic", "60x40", "--json", str(tmp_path / "mine.json" / "x.json")])
    with pytest.raises(UserError, match=r"mine.json is not replaced.*--json"):
        run(["--synthetic", "60x40", "--json", str(tmp_path / "mine.json")])


def test_a_folder_without_a_usable_file(tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match="none of 1 images can be compared"):
        run([str(tmp_path)])


def test_a_folder_or_made_up_images(tmp_path: Path) -> None:
    for arguments in ([], [str(tmp_path), "--synthetic", "60x40"]):
        with pytest.raises(UserError, match="--synthetic"):
            run(arguments)


def test_made_up_photographs_cost_what_photographs_do(tmp_path: Path) -> None:
    """Photographs have some two bits a pixel at this quality; flat drawings a tenth, white noise four."""
    path = written(tmp_path / "x.jpg", (500, 400), quality=88)
    assert 1.5 < path.stat().st_size * 8 / (500 * 400) < 3
