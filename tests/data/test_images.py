import os
import pickle
from pathlib import Path

import pytest

from itpn.data.images import find_all, find_images
from itpn.data.source import Names
from itpn.errors import UserError
from itpn.outputs import writing


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"not looked into")


def all_names(root: Path, **options: object) -> list[str]:
    return list(find_images(root, **options).names)  # type: ignore[arg-type]


def test_class_folders_become_labels(tmp_path: Path) -> None:
    touch(tmp_path, "train/dog/b.png", "train/cat/deep/a.JPG", "train/cat/c.webp", "train/cat/notes.txt")
    images = find_images(tmp_path)
    assert list(images.names) == ["cat/c.webp", "cat/deep/a.JPG", "dog/b.png"]
    assert images.class_names == ("cat", "dog")
    assert images.labels is not None and images.labels.tolist() == [0, 0, 1]
    assert images.path(2) == tmp_path / "train/dog/b.png"
    assert images.description == f"3 images in 2 class folders under {tmp_path / 'train'}; " + (
        "other files beside them: 1 .txt"
    )


@pytest.mark.parametrize("names", [["a.jpg", "cat/b.jpg", "dog/c.jpg"], ["all/a.jpg", "all/b.jpg"]])
def test_an_image_outside_or_a_single_folder_means_no_labels(tmp_path: Path, names: list[str]) -> None:
    touch(tmp_path, *names)
    images = find_images(tmp_path)
    assert images.labels is None and images.class_names is None
    assert images.description.startswith(f"{len(names)} images without class folders under {tmp_path}")


def test_the_folder_is_chosen_in_the_documented_order(tmp_path: Path) -> None:
    touch(tmp_path, "other/x.jpg")
    assert all_names(tmp_path) == ["other/x.jpg"]
    touch(tmp_path, "ILSVRC/Data/CLS-LOC/train/n01/y.jpg", "ILSVRC/Data/CLS-LOC/val/w.jpg")
    assert all_names(tmp_path) == ["n01/y.jpg"]
    touch(tmp_path, "train/z.jpg", "val/v.jpg")
    assert all_names(tmp_path) == ["z.jpg"]
    assert all_names(tmp_path, split="val") == ["v.jpg"]


def test_hidden_and_special_files_are_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", ".hidden.jpg", ".thumbnails/b.jpg", "folder.jpg/c.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere.jpg")
    assert all_names(tmp_path) == ["a.jpg", "folder.jpg/c.jpg"]


def written(*paths: Path) -> None:
    for path in paths:
        with writing(path) as file:
            file.write_bytes(b"drawn")


def test_run_directories_are_not_data(tmp_path: Path) -> None:
    touch(tmp_path, "cat/a.jpg", "dog/b.jpg", "runs/notes.jpg/c.txt")
    before = find_images(tmp_path)
    touch(
        tmp_path, "runs/x/run.json", "runs/x/checkpoints/last", "runs/x/pictures/curves.png", "runs/x/z.jpg"
    )
    images = find_images(tmp_path)
    assert images.class_names == ("cat", "dog") and images.fingerprint == before.fingerprint
    assert images.description == f"{before.description}; 1 left out that itpn wrote (runs/x/)"


def test_a_run_directory_that_is_the_data_folder_keeps_its_images(tmp_path: Path) -> None:
    touch(tmp_path, "cat/a.jpg", "dog/b.jpg", "c.jpg")
    before = all_names(tmp_path)
    touch(tmp_path, "run.json", "metrics.jsonl", "lock", "checkpoints/last", "pictures/curves.png")
    assert all_names(tmp_path) == before
    for path in tmp_path.glob("**/*.jpg"):
        path.unlink()
    assert "holds no image; 5 left out that itpn wrote (run.json, " in error_of(tmp_path)


def test_folders_that_only_resemble_a_run_are_data(tmp_path: Path) -> None:
    touch(tmp_path, "a/run.json", "a/x.jpg", "b/checkpoints/y.jpg", "b/y.jpg")
    assert all_names(tmp_path) == ["a/x.jpg", "b/checkpoints/y.jpg", "b/y.jpg"]


def test_outputs_are_not_data_but_what_a_user_made_of_them_is(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "out/mine.png")
    before = find_images(tmp_path)
    written(tmp_path / "a.png", tmp_path / "out" / "a.png", tmp_path / "out" / "labels" / "a.png")
    images = find_images(tmp_path)
    assert images.fingerprint == before.fingerprint
    assert images.description.endswith("; 3 left out that itpn wrote (a.png, out/a.png, out/labels/a.png)")
    (tmp_path / "out" / "a.png").write_bytes(b"drawn over")
    assert all_names(tmp_path) == ["a.jpg", "out/a.png", "out/mine.png"]


def test_a_folder_of_outputs_alone_says_so(tmp_path: Path) -> None:
    written(*(tmp_path / f"{name}.png" for name in "dcba"))
    assert "holds no image; 4 left out that itpn wrote (a.png, b.png, c.png, …)" in error_of(tmp_path)


def test_all_images_of_a_folder_are_found_whatever_its_folders_are_called(tmp_path: Path) -> None:
    touch(tmp_path, "train/a.jpg", "val/b.jpg", "c.jpg", "test/d.jpg", "x/run.json", "x/checkpoints/e.jpg")
    (images,) = find_all(tmp_path)
    assert list(images.names) == ["c.jpg", "test/d.jpg", "train/a.jpg", "val/b.jpg"] and images.labels is None
    assert images.description.endswith("; 1 left out that itpn wrote (x/)")


def test_links_are_followed_but_not_around(tmp_path: Path) -> None:
    touch(tmp_path, "elsewhere/b.jpg", "root/in/a.jpg")
    root = tmp_path / "root"
    (root / "in" / "loop").symlink_to(root)
    (root / "out").symlink_to(tmp_path / "elsewhere")
    (root / "link.jpg").symlink_to(root / "in" / "a.jpg")
    assert all_names(root) == ["in/a.jpg", "link.jpg", "out/b.jpg"]


def test_names_in_any_alphabet(tmp_path: Path) -> None:
    names = ["图像/猫.jpg", "ñandú/été 1.png", "кот/🙂.jpg", os.fsdecode(b"bad\xff\xfe/x.jpg")]
    touch(tmp_path, *names)
    images = find_images(tmp_path)
    assert sorted(images.names) == sorted(names)
    assert all(images.path(i).is_file() for i in range(4))


def test_packed_names_read_like_a_list() -> None:
    names = ["a", "", "čč/d", "e"]
    packed = pickle.loads(pickle.dumps(Names(names)))
    assert list(packed) == names and packed[-1] == "e" and len(packed) == 4
    with pytest.raises(IndexError):
        packed[4]


def test_a_list_of_paths_relative_to_the_root_or_to_itself(tmp_path: Path) -> None:
    touch(tmp_path, "root/train/dog/b.jpg", "root/train/cat/a.jpg")
    lines = "train/dog/b.jpg\r\n\n  train/cat/a.jpg\n"
    for place, root in (("elsewhere.txt", tmp_path / "root"), ("root/list.txt", tmp_path / "missing")):
        list_file = tmp_path / place
        list_file.write_text("\ufeff" + lines, encoding="utf-8")
        images = find_images(root, list_file=list_file)
        assert list(images.names) == ["train/dog/b.jpg", "train/cat/a.jpg"]
        assert images.class_names == ("cat", "dog")
        assert images.labels is not None and images.labels.tolist() == [1, 0]
        assert images.path(0).samefile(tmp_path / "root/train/dog/b.jpg")


@pytest.mark.parametrize(
    "listed", ["cat\\A.jpg", "Cat/a.JPG", "cat/A.jpeg", "photos/cat/A.jpg", "cat/caf\u00e9.jpg"]
)
def test_a_list_may_name_files_as_other_systems_do(tmp_path: Path, listed: str) -> None:
    touch(tmp_path, "cat/A.jpg", "cat/cafe\u0301.jpg", "dog/b.jpg")
    (tmp_path / "list.txt").write_text(f"dog/b.jpg\n{listed}\n")
    first, second = find_images(tmp_path, list_file=tmp_path / "list.txt").names
    assert first == "dog/b.jpg" and second == ("cat/cafe\u0301.jpg" if "caf" in listed else "cat/A.jpg")


@pytest.mark.parametrize("line", ["cat/a b.jpg 3", "cat/a b.jpg,cat", "cat/a b.jpg\t0"])
def test_a_list_with_labels_is_told_and_cured(tmp_path: Path, line: str) -> None:
    touch(tmp_path, "cat/a b.jpg")
    (tmp_path / "list.txt").write_text(f"path,label\n{line}\n")
    with pytest.raises(UserError, match=r"write nothing but the path on a line, as cat/a b\.jpg$"):
        find_images(tmp_path, list_file=tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text("cat/a b.jpg")
    assert len(find_images(tmp_path, list_file=tmp_path / "list.txt")) == 1


def test_a_list_may_name_absolute_paths(tmp_path: Path) -> None:
    touch(tmp_path, "x/a.jpg", "b.jpg")
    list_file = tmp_path / "list.txt"
    list_file.write_text(f"{tmp_path / 'x/a.jpg'}\nb.jpg\n")
    images = find_images(tmp_path / "none", list_file=list_file)
    assert all(images.path(i).is_file() for i in range(2))
    assert images.labels is None


def error_of(root: Path, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        find_images(root, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_errors_name_the_cause_and_the_cure(tmp_path: Path) -> None:
    touch(tmp_path, "file", "notes/readme.txt")
    (tmp_path / "empty").mkdir()
    assert "does not exist" in (message := error_of(tmp_path / "gone")) and "--data.root" in message
    assert "is a file" in (message := error_of(tmp_path / "file")) and "--data.list" in message
    assert "is empty" in error_of(tmp_path / "empty")
    assert "holds no image" in (message := error_of(tmp_path / "notes")) and ".jpg" in message
    assert "has no folder 'val'" in error_of(tmp_path, split="val")


def test_errors_of_a_list(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    list_file = tmp_path / "list.txt"
    assert "does not exist" in error_of(tmp_path, list_file=list_file)
    list_file.write_text("\n \n")
    assert "is empty" in error_of(tmp_path, list_file=list_file)
    list_file.write_text("a.jpg\nb.jpg\nc.jpg\nd.jpg\ne.jpg\n")
    message = error_of(tmp_path, list_file=list_file)
    assert "4 of 5 files that do not exist: b.jpg, c.jpg, d.jpg, …" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_folder_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "locked/a.jpg")
    (tmp_path / "locked").chmod(0)
    try:
        assert f"cannot read {tmp_path / 'locked'}" in error_of(tmp_path)
    finally:
        (tmp_path / "locked").chmod(0o700)
