import shutil
from pathlib import Path

import pytest

from itpn.data.classes import check_same_classes, class_names_of
from itpn.data.folders import split_folder
from itpn.data.images import find_images
from itpn.data.loader import DataConfig
from itpn.errors import UserError
from itpn.tasks.classify import splits

TWO = ("ant", "bee")


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"not looked into")


def classes(root: Path, *names: str, num: int = 2) -> None:
    touch(root, *(f"{name}/{i}.jpg" for name in names for i in range(num)))


def divided(root: Path) -> tuple[int, int]:
    """How many images a classifier is trained on and validated on."""
    train, val = splits(DataConfig(root=root), 0.5)
    assert check_same_classes(train, val) == TWO
    return len(train), len(val)


def refused(root: Path) -> str:
    with pytest.raises(UserError) as caught:
        divided(root)
    return str(caught.value)


@pytest.mark.parametrize(
    "names",
    [
        ("train", "valid"),
        ("Train", "Val"),
        ("TRAIN", "TEST", "Dev"),
        ("training", "Eval"),
        ("training", "validation"),
        ("training_set", "validation_set"),
        ("Train Data", "val data"),
        ("train", "val", "test"),
        ("zip/data/Train", "zip/data/Valid"),
    ],
)
def test_splits_by_usual_names_are_found(tmp_path: Path, names: tuple[str, ...]) -> None:
    classes(tmp_path / names[0], *TWO, num=3)
    for name in names[1:]:
        classes(tmp_path / name, *TWO, num=2)
    assert divided(tmp_path) == (6, 4)


@pytest.mark.parametrize("names", [("Training", "Testing"), ("train", "test")])
def test_a_folder_to_test_on_is_not_trained_on_and_a_share_is_held_out(
    tmp_path: Path, names: tuple[str, str]
) -> None:
    for name in names:
        classes(tmp_path / name, *TWO)
    assert divided(tmp_path) == (2, 2)
    assert f"; {names[1]} is not used: name it val to validate on it" in find_images(tmp_path).description
    (tmp_path / names[1]).rename(tmp_path / "val")
    assert divided(tmp_path) == (4, 4)


@pytest.mark.parametrize(
    "names", [("training", "resting"), ("valid", "invalid"), ("Train", "Bus"), ("test", "best")]
)
def test_classes_called_like_one_split_stay_classes(tmp_path: Path, names: tuple[str, str]) -> None:
    classes(tmp_path, *names)
    train, val = splits(DataConfig(root=tmp_path), 0.5)
    assert train.class_names == val.class_names == tuple(sorted(names)) and len(train) == 2


def test_two_folders_that_may_be_meant_are_an_error(tmp_path: Path) -> None:
    for name in ("train", "Train", "val"):
        classes(tmp_path / name, *TWO)
    if (tmp_path / "train").samefile(tmp_path / "Train"):
        pytest.skip("names differ by more than case here")
    assert "has Train and train; rename the one to use to train" in refused(tmp_path)
    (tmp_path / "Train").rename(tmp_path / "older")
    assert divided(tmp_path) == (4, 4)


@pytest.mark.parametrize("names", [("seg_train", "seg_test"), ("val", "test"), ("Dev", "Testing")])
def test_classes_that_are_all_splits_are_refused_with_a_cure(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        classes(tmp_path / name, *TWO)
    message = refused(tmp_path)
    assert all(name in message for name in names) and "look like splits" in message
    for name, better in zip(names, ("train", "val"), strict=True):
        (tmp_path / name).rename(tmp_path / f"new {better}")
        (tmp_path / f"new {better}").rename(tmp_path / better)
    assert divided(tmp_path) == (4, 4)


def test_a_class_called_train_names_its_siblings(tmp_path: Path) -> None:
    classes(tmp_path, "bus", "car", "train")
    images = find_images(tmp_path)
    assert len(images) == 2 and "not 2 folders of images beside it: bus, car" in images.notes[0]
    with pytest.raises(
        UserError, match="bus, car; if train is a class as they are, give that folder another"
    ):
        class_names_of(images)
    (tmp_path / "train").rename(tmp_path / "rail")
    assert find_images(tmp_path).class_names == ("bus", "car", "rail") and not find_images(tmp_path).notes


def test_folders_beside_splits_are_told_but_not_warned_of(tmp_path: Path) -> None:
    for name in ("train", "val", "extra"):
        classes(tmp_path / name, *TWO)
    touch(tmp_path, "notes/a.txt")
    images = find_images(tmp_path)
    assert images.description.endswith("; extra beside it not taken") and not images.notes


def test_a_root_with_a_folder_to_validate_on_alone_says_that_all_is_trained_on(tmp_path: Path) -> None:
    classes(tmp_path / "val", *TWO)
    classes(tmp_path, *TWO)
    images = find_images(tmp_path)
    assert len(images) == 8 and "so all of it is taken, val too" in images.notes[0]
    assert "look like splits and not like classes: val" in refused(tmp_path)
    (tmp_path / "train").mkdir()
    for name in TWO:
        (tmp_path / name).rename(tmp_path / "train" / name)
    assert divided(tmp_path) == (4, 4)


def test_classes_are_found_in_folders_around_them_with_the_fingerprint_of_before(tmp_path: Path) -> None:
    classes(tmp_path / "zip" / "data", *TWO)
    images = find_images(tmp_path)
    assert images.class_names == TWO and f"under {tmp_path / 'zip' / 'data'}" in images.description
    # Of the names alone, as when no class was found there.
    assert images.fingerprint == "9a3aac9db7fa46180a0d97d364eaafe7edcb0d46c66886b6fbd6db4eeb74b699"


def test_fingerprints_stay_so_that_runs_go_on(tmp_path: Path) -> None:
    classes(tmp_path / "a", *TWO)
    classes(tmp_path / "b" / "train", *TWO)
    classes(tmp_path / "c" / "ILSVRC/Data/CLS-LOC/train", *TWO)
    touch(tmp_path / "d", "x.jpg", "ant/0.jpg", "notes.txt")
    assert {find_images(tmp_path / name).fingerprint for name in "abc"} == {
        "b506404fcd4c8668cd3c2a1214343587d1e53d15535273980cba9f509d182717"
    }
    assert find_images(tmp_path / "d").fingerprint == (
        "841668cb5fa13867a3d8141a1de83806d2def08bb648aa130ef059507651b1dd"
    )


def test_folders_that_the_system_makes_are_no_classes(tmp_path: Path) -> None:
    classes(tmp_path, *TWO)
    before = find_images(tmp_path)
    system = ("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found", "System Volume Information")
    touch(
        tmp_path, ".ipynb_checkpoints/a.jpg", "ant/Thumbs.db", "ant/.DS_Store", "ant/@eaDir/0.jpg/thumb.jpg"
    )
    touch(tmp_path, *(f"{name}/ant/x.jpg" for name in system))
    images = find_images(tmp_path)
    assert images.class_names == TWO and images.fingerprint == before.fingerprint and not images.notes
    assert "; 7 left out that the system made (#recycle/, $RECYCLE.BIN/, @eaDir/, …)" in images.description


def test_files_of_other_endings_are_counted_and_images_among_them_warned_of(tmp_path: Path) -> None:
    classes(tmp_path, *TWO)
    touch(tmp_path, "ant/a.HEIC", "ant/b.heic", "bee/c.jfif", "bee/d.txt", "readme")
    (tmp_path / "bee" / "e.dat").write_bytes(b"\x89PNG\r\n\x1a\n")
    images = find_images(tmp_path)
    assert (
        "; other files beside them: 2 .heic, 1 without ending, 1 .jfif, 1 .txt, 1 .dat" in images.description
    )
    (note,) = images.notes
    assert note.startswith("4 files look like images and are left out for their endings: 2 .heic, ")
    assert "such as ant/a.HEIC" in note and "JPEG, PNG" not in note
    assert "; HEIC: convert such a file, as with ImageMagick: magick IN OUT.png" in note
    assert "; JPEG: name such a file to end in .jpg; PNG: name such a file to end in .png" in note


def test_images_of_other_endings_alone_are_told(tmp_path: Path) -> None:
    touch(tmp_path, "a/x.heic")
    with pytest.raises(UserError, match=r"no image; .*1 files look like images.*a/x\.heic; HEIC: convert"):
        find_images(tmp_path)


def test_names_for_every_purpose_are_found_alike(tmp_path: Path) -> None:
    for name in ("Training", "Validation"):
        classes(tmp_path / "zip" / name, *TWO)
    assert split_folder(tmp_path, "val") == tmp_path / "zip" / "Validation"
    assert len(find_images(tmp_path, "val")) == 4


def test_one_class_is_told_and_cured(tmp_path: Path) -> None:
    classes(tmp_path, "ant")
    assert f"all lie in one folder, {tmp_path / 'ant'}, which would be the only class" in refused(tmp_path)
    classes(tmp_path, "bee")
    assert divided(tmp_path) == (2, 2)


def test_images_without_any_folder_are_told_and_cured(tmp_path: Path) -> None:
    touch(tmp_path, "a0.jpg", "a1.jpg", "b0.jpg", "b1.jpg")
    assert f"all lie in {tmp_path} itself: make a folder there for each class" in refused(tmp_path)
    for name in TWO:
        (tmp_path / name).mkdir()
        for i in range(2):
            (tmp_path / f"{name[0]}{i}.jpg").rename(tmp_path / name / f"{i}.jpg")
    assert divided(tmp_path) == (2, 2)


def test_an_image_beside_class_folders_is_named(tmp_path: Path) -> None:
    classes(tmp_path, *TWO)
    touch(tmp_path, "sheet.jpg")
    assert "beside the class folders ant, bee lie 1 of 5 images, such as sheet.jpg" in refused(tmp_path)
    (tmp_path / "sheet.jpg").rename(tmp_path / "ant" / "sheet.jpg")
    assert divided(tmp_path) == (2, 3)


@pytest.mark.parametrize("cure", ["add", "remove"])
def test_a_class_that_the_validation_lacks_is_told_and_cured(tmp_path: Path, cure: str) -> None:
    classes(tmp_path / "train", *TWO, "cat")
    classes(tmp_path / "val", *TWO)
    (tmp_path / "val" / "cat").mkdir()
    message = refused(tmp_path)
    assert "add images of missing classes, or remove those classes" in message
    assert message.endswith("only in train: cat; only in val: none")
    if cure == "remove":
        shutil.rmtree(tmp_path / "train" / "cat")
        assert divided(tmp_path) == (4, 4)
    else:
        touch(tmp_path, "val/cat/0.jpg")
        assert len(splits(DataConfig(root=tmp_path), 0.5)[1]) == 5


@pytest.mark.parametrize("other", ["CAFE\u0301", "Caf\u00e9", "cafe\u0301"])
def test_classes_that_differ_by_case_or_unicode_form_alone_are_told(tmp_path: Path, other: str) -> None:
    classes(tmp_path / "train", "ant", "caf\u00e9")
    classes(tmp_path / "val", "ant", other)
    assert refused(tmp_path).endswith(f"; these differ only in case or Unicode form: caf\u00e9 and {other}")


def test_a_class_called_val_is_refused_with_a_cure(tmp_path: Path) -> None:
    for split in ("train", "val"):
        classes(tmp_path / split, "ant", "val")
    assert refused(tmp_path).endswith("rename a class that is called so")
    for split in ("train", "val"):
        (tmp_path / split / "val").rename(tmp_path / split / "bee")
    assert divided(tmp_path) == (4, 4)


@pytest.mark.parametrize("cure", ["add", "remove"])
def test_an_empty_folder_to_validate_on_is_told_and_cured(tmp_path: Path, cure: str) -> None:
    classes(tmp_path / "train", *TWO)
    (tmp_path / "val").mkdir()
    assert refused(tmp_path).endswith("; add images, or remove it")
    if cure == "add":
        classes(tmp_path / "val", *TWO)
    else:
        (tmp_path / "val").rmdir()
    assert divided(tmp_path) == ((4, 4) if cure == "add" else (2, 2))


def test_a_class_folder_without_images_is_told(tmp_path: Path) -> None:
    classes(tmp_path, *TWO)
    (tmp_path / "dog").mkdir()
    touch(tmp_path, "runs/a/run.json", "runs/a/checkpoints/last", "cow/readme.txt")
    assert find_images(tmp_path).notes == (
        f"no classes, for want of images: cow, dog under {tmp_path}; add images, or remove such folders",
    )


def test_classes_one_level_deeper_are_told(tmp_path: Path) -> None:
    for site in ("site1", "site2"):
        classes(tmp_path / site, *TWO)
    (note,) = find_images(tmp_path).notes
    assert "has the same folders in it, ant, bee; if these are the classes and the others splits" in note
    assert note.endswith("as ant/site1")
    for name in TWO:
        for site in ("site1", "site2"):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / site / name).rename(tmp_path / name / site)
    shutil.rmtree(tmp_path / "site1")
    shutil.rmtree(tmp_path / "site2")
    assert find_images(tmp_path).class_names == TWO


def test_a_folder_s_name_is_harmless_to_a_terminal(tmp_path: Path) -> None:
    classes(tmp_path / "a\n\x1b[31m" / "train", *TWO)
    description = find_images(tmp_path).description
    assert description == f"4 images in 2 class folders under {tmp_path}/a\\n\\x1b[31m/train"


def test_a_hold_out_warns_once_of_what_was_found(tmp_path: Path) -> None:
    classes(tmp_path, *TWO)
    touch(tmp_path, "ant/a.heic")
    train, val = splits(DataConfig(root=tmp_path), 0.5)
    assert len(train.notes) == 1 and val.notes == ()
    assert train.description == (
        f"2 of 4 images in 2 class folders under {tmp_path}, to train on; other files beside them: 1 .heic"
    )


def test_numbers_behind_a_dot_are_no_endings(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", *(f"slice.{i:03}" for i in range(9)))
    assert "other files beside them: 9 without ending" in find_images(tmp_path).description
    (tmp_path / "slice.000").write_bytes(bytes(128) + b"DICM")
    assert "9 files look like images" in find_images(tmp_path).notes[0]
