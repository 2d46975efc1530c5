"""Dirty data through the whole way: found, read or refused, replaced in training, wrong in evaluation."""

import json
import os
import shutil
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from itpn import cli
from itpn.data.images import find_images
from itpn.data.loader import DataConfig, eval_loader, train_loader
from itpn.data.picture import BadImageError, load_image, open_picture, read_file
from itpn.errors import printable
from tests.data.dirty import READABLE, UNREADABLE, encoded, flat, jpeg_scans, noise

NAMES = [
    "новый год/кошка.jpg",
    "图像/猫.jpg",
    "عربي/قطة.jpg",
    "emoji/🐈‍⬛.jpg",
    "spaces/ a  b .jpg",
    "line\nbreak/a\nb.jpg",
    "escapes/\x1b]0;owned\x07\x1b[31mred.jpg",
    "override/\u202egpj.exe.jpg",
    "markup/[red]x[/nothing].jpg",
    "options/-rf --out=x.jpg",
    "dots/a...jpg",
    os.fsdecode(b"no utf-8 \xff\xfe/\xe9t\xe9.jpg"),
    "long/" + "x" * 250 + ".jpg",
]


@pytest.fixture(scope="session")
def dirty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One class of readable and one of unreadable files."""
    root = tmp_path_factory.mktemp("dirty")
    (root / "readable").mkdir()
    (root / "unreadable").mkdir()
    for name, file in READABLE.items():
        (root / "readable" / name).write_bytes(file.data)
    for name, (data, _) in UNREADABLE.items():
        (root / "unreadable" / name).write_bytes(data)
    return root


@pytest.mark.parametrize("name", READABLE)
def test_what_can_be_read_is_read_as_documented(dirty: Path, name: str) -> None:
    path, expected = dirty / "readable" / name, READABLE[name]
    image = load_image(path)
    assert image.mode == "RGB" and image.size == expected.size
    assert np.abs(np.asarray(image).astype(int) - expected.colour).max() <= 10
    with open_picture(path) as picture:
        assert picture.size == expected.size
        cut = picture.cut((0, 0, *picture.size), (8, 8))
    assert cut.shape == (3, 8, 8) and cut.dtype == torch.uint8
    assert (cut - torch.tensor(expected.colour)[:, None, None]).abs().max() <= 10


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_says_why(dirty: Path, name: str) -> None:
    path = dirty / "unreadable" / name

    def cut() -> None:
        with open_picture(path) as picture:
            picture.cut((0, 0, 1, 1), (8, 8))

    for attempt in (partial(load_image, path), cut):
        with pytest.raises(BadImageError) as caught:
            attempt()
        assert UNREADABLE[name][1] in caught.value.reason and caught.value.path == path
        assert "\n" not in str(caught.value)


def test_small_files_that_decode_for_minutes_are_refused_before_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.jpg"
    for progressive in (True, False):
        monkeypatch.undo()
        path.write_bytes(jpeg_scans(progressive, num_more=60))
        load_image(path)
        data = jpeg_scans(progressive, num_more=520)
        monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.load", lambda self: pytest.fail("decoded"))
        head, first, scans = data.partition(b"\xff\xda")
        # Nor do scans hide behind bytes that the decoder skips.
        covered = scans.replace(b"\xff\xda", b"\0\xff\x01\xff\xff\xff\xff\xda")
        for hidden in (data, head + first + covered):
            path.write_bytes(hidden)
            with pytest.raises(BadImageError, match="scans"):
                load_image(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    def reason(path: Path) -> str:
        with pytest.raises(BadImageError) as caught:
            load_image(path)
        with pytest.raises(BadImageError) as again:
            read_file(path)
        assert again.value.reason == caught.value.reason and path.name not in caught.value.reason
        return caught.value.reason

    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "self.jpg").symlink_to("self.jpg")
    with open(tmp_path / "long.jpg", "wb") as sparse:
        sparse.truncate(1 << 40)
    assert reason(tmp_path / "folder.jpg") == reason(tmp_path / "pipe.jpg") == "not a regular file"
    assert reason(tmp_path / "gone.jpg") == "No such file or directory"
    assert reason(tmp_path / "self.jpg") == "Too many levels of symbolic links"
    assert "1,099,511,627,776 bytes are more" in reason(tmp_path / "long.jpg")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(encoded(flat(), "JPEG"))
    path.chmod(0)
    with pytest.raises(BadImageError, match="Permission denied"):
        load_image(path)


def test_links_into_nothing_and_in_circles_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded(flat(), "JPEG"))
    (tmp_path / "self.jpg").symlink_to("self.jpg")
    (tmp_path / "ping.jpg").symlink_to("pong.jpg")
    (tmp_path / "pong.jpg").symlink_to("ping.jpg")
    (tmp_path / "here").symlink_to(".")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.jpg").symlink_to("../a.jpg")
    (tmp_path / "sub" / "up").symlink_to("..")
    assert list(find_images(tmp_path).names) == ["a.jpg", "sub/b.jpg"]


def nothing(generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {}


def test_training_replaces_them_and_evaluation_counts_them_wrong(dirty: Path) -> None:
    images = find_images(dirty)
    bad = {i for i in range(len(images)) if images.names[i].startswith("unreadable/")}
    assert len(bad) == len(UNREADABLE)
    shown = []
    for workers in (0, 2):
        met: set[Path] = set()
        loader = train_loader(
            images,
            DataConfig(workers=workers),
            image_size=(8, 8),
            draw=nothing,
            seed=1,
            batch_size=len(images),
            micro_batch=len(images),
            on_bad=lambda error, met=met: met.add(error.path),  # type: ignore[misc]
        )
        shown.append(list(islice(loader, 2)))
        assert met == {images.name(i) for i in bad}
    for alone, apart in zip(*shown, strict=True):
        assert all(torch.equal(alone[key], apart[key]) for key in alone)
        assert bad.isdisjoint(alone["index"].tolist())
    labels = {}
    for batch in eval_loader(images, image_size=(8, 8), batch_size=16, workers=0, on_bad=lambda error: None):
        labels |= dict(zip(batch["index"].tolist(), batch["labels"].tolist(), strict=True))
    assert {i for i, label in labels.items() if label == -1} == bad and len(labels) == len(images)


def test_a_file_that_vanishes_is_replaced(tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / f"{i}.jpg").write_bytes(encoded(noise(), "JPEG"))
    images = find_images(tmp_path)
    (tmp_path / "2.jpg").unlink()
    met: list[str] = []
    loader = train_loader(
        images,
        DataConfig(workers=0),
        image_size=(8, 8),
        draw=nothing,
        seed=0,
        batch_size=4,
        micro_batch=4,
        on_bad=lambda error: met.append(error.reason),
    )
    assert 2 not in next(loader)["index"].tolist()
    assert met == ["No such file or directory"]


def check_data(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int | str | None, str]:
    """Exit status and what is printed."""
    try:
        status: int | str | None = cli.main(["check-data", *map(str, arguments)])
    except SystemExit as stop:
        status = stop.code
    return status, capsys.readouterr().out


def test_check_data_finds_what_training_would(
    dirty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bad.jsonl"
    status, printed = check_data(capsys, dirty, "--workers", "2", "--out", out)
    assert status == 1
    entries = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(entry["file"] for entry in entries) == sorted(
        str(dirty / "unreadable" / name) for name in UNREADABLE
    )
    for entry in entries:
        assert UNREADABLE[Path(entry["file"]).name][1] in entry["reason"] and entry["split"] == "train"
        assert f"{entry['file']}: {entry['reason']}\n" in printed
    assert f"{len(READABLE)} of {len(READABLE) + len(UNREADABLE)} images can be read" in printed
    assert "training stops at 5%" in printed
    assert "smallest 1 x 1, median 24 x 16, largest 2,048 x 2,048" in printed
    assert f"2 classes of {len(UNREADABLE)} (unreadable) to {len(READABLE)} (readable)" in printed
    for trait in (
        "3 CMYK",
        "7 turned by EXIF",
        "6 with a palette",
        "4 of more than 8 bits",
        "5 of several frames or pages",
        "2 named as another format",
    ):
        assert trait in printed


def test_a_name_without_a_known_ending_names_no_format(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list").write_text("plain\nplain.old\nplain.gif\n")
    for name in ("plain", "plain.old", "plain.gif"):
        (tmp_path / name).write_bytes(encoded(flat(), "PNG"))
    assert "1 named as another format" in check_data(capsys, tmp_path, "--list", tmp_path / "list")[1]


def test_check_data_compares_the_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train/a/1.png", "train/a/2.png", "train/b/3.png", "val/a/4.png", "val/b/5.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(flat() if name[-5] in "124" else noise(), "PNG"))
    status, printed = check_data(capsys, tmp_path, "--image-size", "40")
    assert status == 1
    train, val = printed.split("train:")[1].split("val:")
    assert "3 of 3 images can be read" in train and "exact copies of others: 1" in train
    assert "with a side shorter than 40 pixels: 2" in train and "2 of 2 images" in val and "copies" not in val
    assert "warning: 2 images of val are in train" in val
    (tmp_path / "val/a/4.png").write_bytes(encoded(flat("L"), "PNG"))
    (tmp_path / "val/b/5.png").write_bytes(encoded(flat("RGBA"), "PNG"))
    status, printed = check_data(capsys, tmp_path)
    assert status == 0 and "no image of val is in train" in printed


def test_check_data_warns_of_classes_that_no_classifier_can_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("train/a/1.png", "train/b/2.png", "val/a/3.png", "val/c/4.png", "val/b/5.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(noise(), "PNG", dpi=(len(name), int(name[-5]))))
    status, printed = check_data(capsys, tmp_path)
    assert status == 1 and "only in train: none; only in val: c" in printed
    shutil.rmtree(tmp_path / "val/c")
    assert check_data(capsys, tmp_path)[0] == 0
    (tmp_path / "train").rename(tmp_path / "my_train")
    (tmp_path / "val").rename(tmp_path / "my_test")
    status, printed = check_data(capsys, tmp_path)
    assert status == 1 and "look like splits and not like classes: my_test, my_train" in printed


def test_names_of_any_kind_are_found_and_shown_in_one_harmless_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in NAMES:
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_bytes(b"nothing to see")
    out = tmp_path / "bad.jsonl"
    status, printed = check_data(capsys, tmp_path, "--workers", "1", "--out", out)
    assert status == 1
    assert all(line.isprintable() for line in printed.splitlines())
    assert all(f"\n{printable(tmp_path / name)}: not an image" in printed for name in NAMES)
    listed = {json.loads(line)["file"] for line in out.read_text().splitlines()}
    assert listed == {str(tmp_path / name) for name in NAMES}
    images = find_images(tmp_path)
    errors: list[str] = []
    list(
        eval_loader(
            images,
            image_size=(8, 8),
            batch_size=4,
            workers=2,
            on_bad=lambda error: errors.append(error.path.name),
        )
    )
    assert sorted(errors) == sorted(Path(name).name for name in NAMES)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "does not exist"),
        (["."], "is empty"),
        ([".", "--workers", "0"], "--workers is 0"),
        ([".", "--image-size", "-4"], "--image-size is -4"),
        (["data", "--out", "none/x"], "cannot write none/x"),
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
    if "data" in arguments:
        (tmp_path / "data").mkdir()
        (tmp_path / "data/a.png").write_bytes(encoded(flat(), "PNG"))
    assert cli.main(["check-data", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
