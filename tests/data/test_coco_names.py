"""The files that a COCO file names, as other systems and other folders have them."""

import json
import os
import unicodedata
from pathlib import Path

import pytest

from itpn.data.coco_file import read_coco
from itpn.data.coco_names import located
from itpn.errors import UserError
from tests.data.coco import content, thing, written


def made(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def found(folder: Path, *names: str) -> list[str | None]:
    return [name if real else None for name, real in located(folder, names)]


@pytest.mark.parametrize(
    "name",
    [
        "a.jpg",
        "./a.jpg",
        "images/a.jpg",
        "data\\images\\a.jpg",
        "C:\\data\\a.jpg",
        "/elsewhere/images/a.jpg",
        "http://host/a.jpg",
        "A.JPG",
        "a.JPG",
        "a.jpeg",
        "a.png",
        "a",
    ],
)
def test_a_file_is_found_however_it_is_written(tmp_path: Path, name: str) -> None:
    folder = made(tmp_path / "images", "a.jpg", "b.jpg")
    ((written, real),) = located(folder, [name])
    assert (folder / written).samefile(folder / "a.jpg") and real == os.path.realpath(folder / "a.jpg")


def test_unicode_forms_and_folders_below_do_not_matter(tmp_path: Path) -> None:
    names = [unicodedata.normalize(form, "é.jpg") for form in ("NFC", "NFD")]
    for ours, theirs in (names, names[::-1]):
        assert found(made(tmp_path / str(len(ours)), f"deep/{ours}"), theirs) == [f"deep/{ours}"]


def test_a_name_that_is_right_stays_as_it_is(tmp_path: Path) -> None:
    folder = made(tmp_path, "a.jpg", "A.jpg", "x/a.jpg", "notes.txt")
    for name in ("a.jpg", "A.jpg", "x/a.jpg", "./x/../a.jpg", "notes.txt", str(tmp_path / "A.jpg")):
        assert found(folder, name) == [name]


def test_a_name_that_may_mean_several_files_is_not_found(tmp_path: Path) -> None:
    folder = made(tmp_path, "x/a.jpg", "y/a.jpg", "b.jpg", "c.png", "c.gif")
    assert found(folder, "a.jpg", "z/a.jpg", "c.jpg") == [None, None, None]
    assert found(folder, "z\\x\\a.jpg", "missing.jpg", "bad\0name", "x/") == ["x/a.jpg", None, None, None]


def test_different_images_do_not_become_one(tmp_path: Path) -> None:
    folder = made(tmp_path / "train", "a.jpg", "b.jpg")
    assert found(folder, "p/a.jpg", "q/a.jpg") == [None, None]
    assert found(folder, "b.jpg", "b.png") == ["b.jpg", None]
    assert found(folder, "train/a.jpg", "val/a.jpg", "train\\A.jpg") == ["a.jpg", None, "a.jpg"]


TWICE = ["1.png", "./1.png", "1.PNG", "f/1.png", "f\\1.png", "link.png", "F/./1.png"]


@pytest.mark.parametrize("name", TWICE)
def test_a_file_listed_twice_is_one_image_with_the_objects_of_both(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "f"
    data = content([(48, 64), (48, 64)], annotations=[thing(1, 1), thing(2, 2), thing(3, 9)])
    file = written(folder, data, "good.json")
    (folder / "link.png").symlink_to("1.png")
    data["images"].append({"id": 9, "file_name": name, "height": 48, "width": 64})
    coco = read_coco(_rewritten(file, data), folder)
    assert [coco.names[i] for i in range(2)] == ["1.png", "2.png"] and len(coco) == 2
    assert [coco.objects.ids[list(coco.objects.of(i))].tolist() for i in range(2)] == [[1, 3], [2]]
    (note,) = coco.notes
    assert note.startswith("1 entries of 'images' name a file that an earlier one names, such as ")
    data["images"].pop()
    data["annotations"][2]["image_id"] = 1
    again = read_coco(_rewritten(file, data), folder)
    assert not again.notes and again.fingerprint == coco.fingerprint


def _rewritten(file: Path, data: object) -> Path:
    file.write_text(json.dumps(data))
    return file


def test_a_file_listed_twice_with_other_sides_is_an_error(tmp_path: Path) -> None:
    data = content([(48, 64)])
    file = written(tmp_path, data)
    data["images"].append({"id": 2, "file_name": "1.png", "height": 64, "width": 48})
    with pytest.raises(UserError, match=r"entry 1 of 'images': 1\.png is listed before, with another height"):
        read_coco(_rewritten(file, data), tmp_path)


def test_files_that_are_missing_are_counted_and_a_folder_without_any_is_named(tmp_path: Path) -> None:
    data = content([(48, 64)] * 3)
    file = written(tmp_path / "right", data)
    (tmp_path / "right/3.png").unlink()
    (note,) = read_coco(file, tmp_path / "right").notes
    assert "1 of 3 images are not in" in note and "such as 3.png" in note
    wrong = made(tmp_path / "wrong", "other.jpg")
    with pytest.raises(
        UserError, match=r"none of the 3 images of .*such as 1\.png; that folder has other\.jpg"
    ):
        read_coco(file, wrong)
    (tmp_path / "wrong/other.jpg").unlink()
    assert len(read_coco(file, tmp_path)) == 3, "a folder around it, as the message says"
