import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from itpn import cli
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
    assert status == 0
    train, val = printed.split("\ntrain:")[1].split("\nval:")
    assert "4 of 4 images can be read" in train and "2 of 2 images" in val
    assert "98.21% of 8,960 pixels have a label" in train
    assert "1 of 5 classes never occur: mauve\n" in train
    counts = {row.split()[0]: row for row in train.splitlines() if " pixels " in row and "%  in" in row}
    stored = np.stack([np.asarray(Image.open(path)) for path in (root / "labels/train").iterdir()])
    for label, name in enumerate(("red", "green", "blue", "yellow")):
        here = stored == label
        assert f" {here.sum():,} pixels " in counts[name]
        assert f"in {here.any((1, 2)).sum()} images" in counts[name]
    assert "no image of val is in train" in printed


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
    assert status == 0 and "50.00% of 128 pixels have a label" in printed and "class 149" in printed
    assert "149 of 150 classes never occur: class 0, class 1, class 2, class 3, class 4, …" in printed
    Image.new("L", (8, 8), 151).save(folder / "1.png")
    assert "labels 151 are no class: those are 1 to 150, and 0, 255 is no label" in check_data(
        capsys, tmp_path, "--format", "ade20k"
    )[1]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "--format", "masks"], "there is no folder nowhere/images/train"),
        ([".", "--format", "ade20k"], "there is no folder images/training"),
        ([".", "--format", "masks", "--list", "x"], "does not go with --format masks"),
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
