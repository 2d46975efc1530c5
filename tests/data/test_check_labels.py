import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from itpn import cli
from itpn.data.check_labels import check_classes, classes_met, warnings_of
from itpn.data.labelled import find_masks
from itpn.errors import UserError
from tests.data.dirty import encoded, flat, png
from tests.data.segmented import write_masks, write_pair


def check_data(
    capsys: pytest.CaptureFixture[str], *arguments: str | Path
) -> tuple[int | str | None, str, str]:
    """Exit status and what is printed on stdout and stderr."""
    try:
        status: int | str | None = cli.main(["check-data", *map(str, arguments), "--workers", "1"])
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_masks(tmp_path / "masks", {"train": 4, "val": 2})


def test_sound_masks_are_summed_up(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "classes.txt").write_text("red\ngreen\nblue\nyellow\nmauve\n")
    status, printed, _ = check_data(capsys, root, "--format", "masks")
    assert status == 1
    assert (
        printed.count(" 1 of 5 classes never occur: mauve; 255 marks no label, for 1.79% of the pixels") == 2
    )
    train, val = printed.split("\ntrain:")[1].split("\nval:")
    assert "4 of 4 images can be read" in train and "2 of 2 images" in val
    assert "98.21% of 8,960 pixels have a label" in train
    counts = {row.split()[0]: row for row in train.splitlines() if " pixels " in row and "%  in" in row}
    stored = np.stack([np.asarray(Image.open(path)) for path in (root / "labels/train").iterdir()])
    for label, name in enumerate(("red", "green", "blue", "yellow")):
        here = stored == label
        assert f" {here.sum():,} pixels " in counts[name]
        assert f"in {here.any((1, 2)).sum()} images" in counts[name]
    assert "no image of val is in train" in printed
    (root / "classes.txt").write_text("red\ngreen\nblue\nyellow\n")
    assert check_data(capsys, root, "--format", "masks")[0] == 0


def test_every_fault_is_counted_and_listed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sound = np.zeros((40, 56), np.uint8)
    faults = {
        "wrong": (sound + 9, "labels 9 are no class"),
        "size": (np.zeros((40, 57), np.uint8), "57 x 40 labels for an image of 56 x 40 pixels"),
        "colour": (
            np.full((40, 56, 3), (0, 0, 9), np.uint8),
            "mode RGB holds colours, not labels",
        ),
        "huge": (sound, "limit"),
        "jpeg": (sound, "labels are read from PNG, TIFF, BMP or GIF files"),
        "image": (sound, "not an image"),
    }
    for name, (stored, _) in faults.items():
        write_pair(root, "train", name, sound, stored)
    (root / "labels/train/huge.png").write_bytes(png(40_000, 40_000, 8, 0, b""))
    (root / "labels/train/jpeg.png").write_bytes(encoded(flat("L"), "JPEG"))
    (root / "images/train/image.png").write_bytes(b"<html>")
    (root / "labels/train/03.png").unlink()
    (root / "images/val/01.png").unlink()
    out = root / "bad.jsonl"
    status, printed, _ = check_data(capsys, root, "--format", "masks", "--out", out)
    assert status == 1
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == len(faults) + 2 and {line["split"] for line in lines} == {"train", "val"}
    told = {Path(line["file"]).stem: line["reason"] for line in lines if line["split"] == "train"}
    for name, (_, reason) in faults.items():
        assert reason in told[name] and f"train/{name}.png: " in printed
    assert "no label picture of this name" in told["03"]
    assert (
        "3 of 9 images can be read" in printed
        and "6 cannot (66.67%; training needs --data.skip-bad)" in printed
    )
    assert printed.count("  1 files without a partner\n") == 2
    assert "val/01.png: no image of this name" in printed


def test_without_a_number_of_classes_the_labels_are_told(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "classes.txt").unlink()
    status, printed, _ = check_data(capsys, root, "--format", "masks")
    assert status == 0 and "not known; the labels found are 0 to 3, 255\n" in printed
    status, printed, _ = check_data(capsys, root, "--format", "masks", "--num-classes", "3")
    assert status == 1 and "labels 3 are no class: those are 0 to 2, and 255 is no label" in printed
    status, printed, _ = check_data(
        capsys, root, "--format", "masks", "--num-classes", "3", "--zero-is-no-label", "--ignored", "None"
    )
    assert status == 1 and "labels 255 are no class: those are 1 to 3, and 0 is no label" in printed


def test_ade20k(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(2):
        for kind, colours in (("images", "RGB"), ("annotations", "L")):
            folder = tmp_path / "ADEChallengeData2016" / kind / "training"
            folder.mkdir(parents=True, exist_ok=True)
            Image.new(colours, (8, 8), 150 * i).save(folder / f"{i}.png")
    status, printed, _ = check_data(capsys, tmp_path, "--format", "ade20k")
    assert status == 1 and "50.00% of 128 pixels have a label" in printed and "class 149" in printed
    assert "warning: train: all labels are of one class, 'class 149', in the 2 label pictures" in printed
    Image.new("L", (8, 8), 151).save(folder / "1.png")
    assert "labels 151 are no class: those are 1 to 150, and 0, 255 is no label" in check_data(
        capsys, tmp_path, "--format", "ade20k"
    )[1]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "--format", "masks"], "there is no folder nowhere/images/train"),
        ([".", "--format", "ade20k"], "there is no folder images/training"),
        ([".", "--format", "masks", "--list", "x"], "leave out --format masks"),
        ([".", "--format", "masks", "--num-classes", "0"], "data.num_classes is 0"),
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
    status, _, error = check_data(capsys, *arguments)
    assert status == 2 and words in error and error.count("\n") == 1


def write_numbers(root: Path, *pictures: list[int]) -> Path:
    """A label picture for each list, with these numbers, and names of two classes."""
    for i, numbers in enumerate(pictures):
        labels = np.zeros((8, 8), np.uint8)
        labels.flat[: len(numbers)] = numbers
        labels.flat[len(numbers) :] = numbers[-1]
        write_pair(root, "train", f"{i:04d}", np.zeros((8, 8), np.uint8), labels)
    (root / "classes.txt").write_text("background\nbuilding\n")
    return root


def test_masks_of_0_and_255_are_refused_and_the_option_that_is_named_cures_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_numbers(tmp_path, [0, 255], [0, 0, 255])
    said = (
        r"all labels are of one class, 'background', .* 255 marks no label, for 97.66% .* if it is a class, "
    )
    with pytest.raises(UserError, match=f"{said}give --data.values 0 255, in the order of the names$"):
        check_classes(find_masks(root))
    status, printed, _ = check_data(capsys, root, "--format", "masks")
    assert status == 1 and "warning: train: all labels are of one class" in printed
    images = find_masks(root, values=(0, 255))
    check_classes(images)
    assert warnings_of(images) == [] and images.pair(0)[1].ravel()[:2].tolist() == [0, 1]
    assert check_data(capsys, root, "--format", "masks", "--data.values", "0", "255")[0] == 0


@pytest.mark.parametrize(
    ("pictures", "options", "said"),
    [
        ([[0], [0]], {}, "'background', in the 2 .* apart; add label pictures with the others$"),
        ([[255]], {}, "no pixel has a label in the 1 label pictures"),
        (
            [[0, 1]],
            {"zero_is_no_label": True},
            "'background', .* 0 marks no label, .* --data.values 0 1, in the order of the names$",
        ),
        ([[7, 0]], {"ignored": 7}, "7 marks no label"),
    ],
)
def test_labels_of_fewer_than_two_classes_are_refused(
    tmp_path: Path, pictures: list[list[int]], options: dict, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        check_classes(find_masks(write_numbers(tmp_path, *pictures), **options))


def test_the_one_class_of_a_data_set_is_not_enough(tmp_path: Path) -> None:
    root = write_numbers(tmp_path, [0, 1])
    (root / "classes.txt").write_text("building\n")
    with pytest.raises(
        UserError, match=r"name all classes and give their numbers, as in --data\.values 0 1$"
    ):
        check_classes(find_masks(root, zero_is_no_label=True))
    (root / "classes.txt").write_text("background\nbuilding\n")
    check_classes(find_masks(root, values=(0, 1)))


@pytest.mark.parametrize("place", [0, 5, 11])
def test_a_rare_class_is_looked_for_in_all_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    monkeypatch.setattr("itpn.data.check_labels.NUM_LABELS", 2)
    pictures = [[0]] * 12
    pictures[place] = [1]
    images = find_masks(write_numbers(tmp_path, *pictures))
    check_classes(images)
    assert classes_met(images).met == [0, 1]


def test_few_pictures_say_nothing_of_classes_that_are_rare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_numbers(tmp_path, *[[0, 1]] * 9)
    (root / "classes.txt").write_text("a\nb\nc\n")
    assert warnings_of(find_masks(root)) == ["1 of 3 classes never occur: c"]
    monkeypatch.setattr("itpn.data.check_labels.NUM_LABELS", 3)
    images = find_masks(root)
    assert warnings_of(images) == [] and classes_met(images).num_pictures == 3


def test_bad_label_pictures_do_not_hide_the_classes(tmp_path: Path) -> None:
    root = write_numbers(tmp_path, [0, 1], [99], [98])
    images = find_masks(root)
    check_classes(images)
    assert classes_met(images).num_pictures == 1
    (root / "labels/train/0000.png").write_bytes(b"")
    check_classes(find_masks(root))  # nothing is known, and training names a bad file


def test_palettes_that_give_one_number_two_colours_are_told(tmp_path: Path) -> None:
    root = write_numbers(tmp_path, [0, 1], [0, 1])
    for i, colour in enumerate((10, 20)):
        path = root / f"labels/train/{i:04d}.png"
        picture = Image.open(path)
        picture.putpalette([0, 0, 0, colour, 0, 0])
        picture.save(path)
    [told] = warnings_of(find_masks(root))
    assert "palettes of label pictures differ: 1 is #0a0000 in " in told and "and #140000 in " in told


@pytest.mark.parametrize(
    ("size", "orientation", "told"),
    [((8, 8), 6, True), ((8, 6), 3, True), ((8, 6), 6, False), ((8, 8), 1, False)],
)
def test_labels_of_turned_images_that_may_not_be_turned_are_told(
    tmp_path: Path, size: tuple[int, int], orientation: int, told: bool
) -> None:
    tags = Image.Exif()
    tags[0x0112] = orientation
    for kind in ("images", "labels"):
        (tmp_path / kind / "train").mkdir(parents=True)
    Image.new("RGB", size, "red").save(tmp_path / "images/train/a.jpg", exif=tags)
    upright = size[::-1] if orientation == 6 else size
    Image.fromarray(np.eye(upright[1], upright[0], dtype=np.uint8)).save(tmp_path / "labels/train/a.png")
    found = warnings_of(find_masks(tmp_path, num_classes=2))
    assert ["1 images are turned by EXIF" in line for line in found] == [True] * told


def smaller(image: Image.Image) -> Image.Image:
    return image.resize((6, 3), Image.Resampling.NEAREST)


@pytest.mark.parametrize(
    ("change", "said", "options"),
    [
        (
            lambda labels: labels.point(lambda value: value + 1),
            "--data.zero-is-no-label",
            ["--zero-is-no-label"],
        ),
        (lambda labels: labels.point(lambda value: value + 1), "with --data.values", ["--values", "1", "2"]),
        (
            lambda labels: labels.point(lambda value: 7 * value),
            "with --data.values",
            ["--data.values", "0", "7"],
        ),
        (smaller, "6 x 3 labels for an image of 12 x 6 pixels; scale the labels to that size", None),
        (lambda labels: labels.transpose(Image.Transpose.ROTATE_90), "turn the labels alike", None),
    ],
)
def test_what_is_said_of_bad_label_pictures_cures_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable, said: str, options: list[str] | None
) -> None:
    path = tmp_path / "labels/train/a.png"
    write_pair(tmp_path, "train", "a", np.eye(6, 12, dtype=np.uint8))
    change(Image.open(path)).save(path)
    (tmp_path / "classes.txt").write_text("background\nbuilding\n")
    status, printed, _ = check_data(capsys, tmp_path, "--format", "masks")
    assert status == 1 and said in printed
    if options is None:
        labels = Image.open(path)
        turned = labels.width < labels.height
        cured = labels.transpose(Image.Transpose.ROTATE_270) if turned else labels.resize((12, 6), 0)
        cured.save(path)
    status, printed, _ = check_data(capsys, tmp_path, "--format", "masks", *(options or []))
    assert status == 0, printed


def test_numbers_that_nobody_named_are_given_by_the_option_that_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_numbers(tmp_path, [0, 200, 255])
    (root / "classes.txt").unlink()
    _, printed, _ = check_data(capsys, root, "--format", "masks")
    assert "the labels found are 0, 200, 255\n" in printed and "give --data.values 0 200 255;" in printed
    assert check_data(capsys, root, "--format", "masks", "--data.values", "0", "200", "255")[0] == 0
    smooth = write_numbers(tmp_path / "smooth", [*range(64)])
    (smooth / "classes.txt").unlink()
    assert "edges were smoothed" in check_data(capsys, smooth, "--format", "masks")[1]
