"""`itpn check-data --format coco`."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from itpn import cli
from itpn.data.check_labels import warnings_of
from itpn.data.coco_file import read_coco
from tests.data.coco import content, thing, written


def check_data(
    capsys: pytest.CaptureFixture[str], *arguments: str | Path
) -> tuple[int | str | None, str, str]:
    """Exit status and what is printed."""
    try:
        status: int | str | None = cli.main(["check-data", *map(str, arguments)])
    except SystemExit as stop:
        status = stop.code
    printed = capsys.readouterr()
    return status, printed.out, printed.err


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "annotations").mkdir()
    for split, number in (("train", 3), ("val", 1)):
        annotations = [thing(i, 1 + i % number, category_id=7 if i == 2 else 3) for i in range(4)]
        file = written(
            tmp_path / f"{split}2017", content([(48, 64), (64, 48), (40, 40)], annotations=annotations)
        )
        file.rename(tmp_path / f"annotations/instances_{split}2017.json")
    return tmp_path


def test_sound_data_are_summed_up(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, printed, _ = check_data(capsys, root, "--format", "coco", "--workers", "1")
    assert status == 1, "for the images that both splits have"
    train, val = printed.split("\ntrain:")[1].split("\nval:")
    for line in (
        "3 of 3 images can be read",
        "4 objects and 0 crowds",
        "objects in an image: median 1, at most 2; none in 0 images",
        "small 4, medium 0, large 0",
        "2 classes of 1 (dog) to 3 (cat) objects",
    ):
        assert line in train
    assert "none in 2 images" in val and "warning: 3 images of val are in train" in val
    assert "left out" not in printed and "without a mask" not in printed
    for path in (root / "val2017").iterdir():
        with Image.open(path) as image:
            ImageOps.invert(image).save(path)
    status, printed, _ = check_data(capsys, root, "--format", "coco", "--workers", "1")
    assert status == 0 and "no image of val is in train" in printed


def test_what_is_bad_is_named_and_counted(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [
        thing(11, bbox=[10, 10, 0, 30]),
        thing(12, bbox=[10, 10, -2, 30]),
        thing(13, image_id=77),
        thing(14, segmentation=[[1, 2, 3, 4]]),
        thing(15, segmentation=[[1, 2, 3, 4, 5]]),
        "nonsense",
        thing(16, bbox=[-3, 10, 33, 30]),
        thing(17, segmentation=[], bbox=[5, 5, 500, 5]),
        thing(18, iscrowd=1),
        thing(19, segmentation=[]),
    ]
    folder = root / "own"
    file = written(folder, content([(48, 64), (48, 64), (48, 64)], annotations=[thing(1), *bad]))
    (folder / "2.png").unlink()
    data = json.loads(file.read_text())
    data["images"][2] |= {"width": 48, "height": 64}
    file.write_text(json.dumps(data))
    out = tmp_path / "bad.jsonl"
    status, printed, _ = check_data(capsys, folder, "--format", "coco", "--annotations", file, "--out", out)
    assert status == 1
    for line in (
        "annotation 11 (1.png): bbox: width or height is not above 0; left out",
        "annotation 13: image_id: no such image, 77; left out",
        "entry 6 of 'annotations': it is 'nonsense', not an object with fields; left out",
        "annotation 16 (1.png): bbox: it reaches outside the image; kept",
        f"{folder / '2.png'}: No such file or directory",
        f"{folder / '3.png'}: 64 x 48 pixels, but its annotations are for 48 x 64; was it turned",
        "1 of 3 images can be read",
        "3 objects and 1 crowds",
        "without a mask: 1",
        "7 annotations cannot be used and are left out:",
        "2 bbox: width or height is not above 0",
        "2 segmentation: a polygon of … numbers; x, y of three points or more are needed",
        "1 odd ones are kept:",
    ):
        assert line in printed, line
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len([line for line in lines if line.get("left_out")]) == 7 and len(lines) == 10
    assert lines[0] == {
        "split": "train",
        "place": 1,
        "annotation": "11",
        "image": "1.png",
        "reason": "bbox: width or height is not above 0",
        "left_out": True,
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--format", "coco", "--list", "x"], "leave out --format coco"),
        (["--annotations", "x"], "--annotations needs --format coco"),
        (["--format", "coco"], "there is no train2017"),
        (["--format", "coco", "--annotations", "none.json"], "cannot read none.json"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, error = check_data(capsys, ".", *arguments)
    assert status == 2 and words in error and error.count("\n") == 1


def test_classes_that_never_occur_are_named_in_each_split(tmp_path: Path) -> None:
    data = content([(48, 64)] * 2, annotations=[thing(1), thing(2, 2, category_id=7, iscrowd=1)])
    data["categories"].append({"id": 9, "name": "emu"})
    coco = read_coco(written(tmp_path, data), tmp_path)
    words = "2 of 3 classes have no object here: dog, emu; annotate some, or remove the classes"
    assert [line for line in warnings_of(coco) if words in line]
    data["annotations"] += [thing(3, 2, category_id=7), thing(4, category_id=9)]
    coco = read_coco(written(tmp_path, data), tmp_path)
    assert not warnings_of(coco)
    part = coco.of_images(np.array([1]), "of them")
    assert "2 of 3 classes have no object here: cat, emu" in warnings_of(part)[0]


def test_images_of_other_sizes_than_the_annotations_say_are_told(tmp_path: Path) -> None:
    data = content([(48, 64)] * 3, annotations=[thing(1), thing(2, category_id=7)])
    file = written(tmp_path, data)
    for image in data["images"][:2]:
        image |= {"width": 48, "height": 64}
    file.write_text(json.dumps(data))
    (warning,) = warnings_of(read_coco(file, tmp_path))
    assert warning.startswith(
        f"2 of 3 images have another size than {file} says, such as 1.png: 64 x 48 pixels"
    )
    assert "was it turned after it was annotated?; if they were scaled or turned, take" in warning
    for image in data["images"][:2]:
        image |= {"width": 64, "height": 48}
    file.write_text(json.dumps(data))
    assert not warnings_of(read_coco(file, tmp_path))


def test_what_training_says_is_what_check_data_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [thing(1), thing(2, category_id=7), thing(3, bbox=[-9, 10, 39, 30])]
    file = written(tmp_path, content([(48, 64)], annotations=bad))
    (said,) = warnings_of(read_coco(file, tmp_path))
    assert (
        "1 of 3 annotations are odd and kept, such as annotation 3 (1.png): bbox: it reaches outside" in said
    )
    status, printed, _ = check_data(capsys, tmp_path, "--format", "coco", "--annotations", file)
    assert status == 1 and f"warning: train: {said}" in printed
