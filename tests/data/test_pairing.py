import shutil
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from itpn.data.labelled import find_masks
from itpn.data.pairing import partners
from itpn.data.segmentation import SegmentationDataConfig, find_labelled, find_splits, has_split
from itpn.errors import UserError
from tests.data.segmented import write_masks

ACCENT = unicodedata.normalize("NFC", "café")


@pytest.mark.parametrize(
    "pairs",
    [
        {"a/1": "a/1", "a/2": "a/2"},
        {"p0": "p0_mask", "p1": "p1_mask"},
        {"p0": "p0.jpg", "p1": "p1.JPG"},
        {"p0": "p0.jpg_mask", "p1": "p1.jpg_mask"},
        {"IMG_1": "img_1", "img_2": "img_2"},
        {ACCENT: unicodedata.normalize("NFD", ACCENT), "b": "b"},
        {"img_001": "mask_001", "img_002": "mask_002", "img_010": "mask_010"},
        {"10_sat": "10_mask", "20_sat": "20_mask"},
        {"1": "batch/1", "2": "batch/2"},
        {"rgb/1": "1", "rgb/2": "2"},
        {"aachen/1_leftImg8bit": "aachen/1_gtFine_labelIds", "bonn/1_leftImg8bit": "bonn/1_gtFine_labelIds"},
        {"0001TP_1": "0001TP_1_L", "0016E5_2": "0016E5_2_L"},
        {"21_training": "21_manual1", "22_training": "22_manual1"},
    ],
    ids=lambda pairs: " ".join(pairs.values()),
)
def test_names_that_belong_together(pairs: dict[str, str]) -> None:
    assert partners(pairs.keys(), [*pairs.values()]) == pairs


@pytest.mark.parametrize(
    ("images", "labels", "found"),
    [
        (["p0", "p1", "p2"], ["p0_mask", "p1_mask"], {"p0": "p0_mask", "p1": "p1_mask"}),
        (["cat_1", "dog_1"], ["cat_2", "dog_2"], {}),
        (["cat_1"], ["cat_2"], {}),
        (["cat"], ["dog"], {}),
        (["2021/1", "2021/2"], ["2022/1", "2022/2"], {}),
        (["a", "A", "b"], ["Á", "b"], {"b": "b"}),
        (["x", "y"], ["X", "x"], {"x": "x"}),
        (["ab", "AB"], ["Ab"], {}),
        (["s1/1", "s2/1"], ["s3_mask/1"], {}),
        (["1", "2", "3"], ["1_a_mask", "2_b_mask"], {}),
    ],
)
def test_names_that_may_not_belong_together_have_no_partner(
    images: list[str], labels: list[str], found: dict[str, str]
) -> None:
    assert partners(images, labels) == found


@given(st.sets(st.text("aB/_0é", min_size=1, max_size=4)), st.sets(st.text("aB/_0é", min_size=1, max_size=4)))
def test_equal_names_are_partners_whatever_else_there_is(images: set[str], labels: set[str]) -> None:
    found = partners(images, labels)
    assert all(found[name] == name for name in images & labels)
    assert len({*found.values()}) == len(found) and found.keys() <= images and {*found.values()} <= labels


def moved(root: Path, *names: tuple[str, str]) -> Path:
    for old, new in names:
        (root / new).parent.mkdir(parents=True, exist_ok=True)
        (root / old).rename(root / new)
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_masks(tmp_path / "masks", {"train": 4, "val": 2})


@pytest.mark.parametrize(
    "names",
    [
        [("labels", "masks")],
        [("images", "Images"), ("labels", "SegmentationClass")],
        [("images/train", "images/Training"), ("labels/train", "labels/Training")],
        [("images/val", "images/valid"), ("labels/val", "labels/validation")],
        [
            (f"{kind}/{split}", f"{split}/{kind}")
            for kind in ("images", "labels")
            for split in ("train", "val")
        ],
        [(f"{kind}/val", f"Valid/{name}") for kind, name in (("images", "imgs"), ("labels", "Masks"))]
        + [(f"{kind}/train", f"Train/{name}") for kind, name in (("images", "imgs"), ("labels", "Masks"))],
    ],
    ids=lambda names: " ".join(new for _, new in names),
)
def test_usual_layouts_are_found(root: Path, names: list[tuple[str, str]]) -> None:
    moved(root, *names)
    for kind in ("images", "labels"):
        if (root / kind).is_dir() and not any((root / kind).iterdir()):
            (root / kind).rmdir()
    assert (len(find_masks(root)), len(find_masks(root, "val"))) == (4, 2)
    assert has_split(SegmentationDataConfig(root=root, format="masks"), "val")


def test_without_split_folders_all_is_to_train_on_and_a_share_is_held_out(root: Path) -> None:
    before = find_masks(root).fingerprint
    for kind in ("images", "labels"):
        shutil.rmtree(root / kind / "val")
        for path in [*(root / kind / "train").iterdir()]:
            path.rename(root / kind / path.name)
        (root / kind / "train").rmdir()
    config = SegmentationDataConfig(root=root, format="masks")
    assert find_labelled(config, "train").fingerprint == before and not has_split(config, "val")
    assert [len(images) for images in find_splits(config, 0.25)] == [3, 1]


def test_folders_around_everything_are_looked_into(root: Path) -> None:
    around = root.parent.parent / "around"
    around.mkdir()
    (around / "__MACOSX").mkdir()
    before = find_masks(root)
    shutil.move(root, around / "export" / "masks")
    images = find_masks(around)
    assert images.fingerprint == before.fingerprint and images.labelling.class_names[0] == "red"
    assert has_split(SegmentationDataConfig(root=around, format="masks"), "val")
    (around / "export/other").mkdir()
    with pytest.raises(UserError, match=r"images/train; \S* has __MACOSX/, export/; images go to ROOT"):
        find_masks(around, num_classes=4)


def test_two_folders_that_may_be_meant_are_named(root: Path) -> None:
    moved(root, ("labels", "masks"))
    shutil.copytree(root / "masks", root / "annotations")
    with pytest.raises(UserError, match="annotations and masks; rename the one to use to labels"):
        find_masks(root)
    moved(root, ("masks", "labels"))
    assert len(find_masks(root)) == 4


def test_beside_label_pictures_a_folder_without_images_is_not_meant(root: Path) -> None:
    moved(root, ("images", "JPEGImages"), ("labels", "SegmentationClass"))
    (root / "Annotations").mkdir()
    (root / "Annotations" / "a.xml").write_text("<annotation/>")
    assert (len(find_masks(root)), len(find_masks(root, "val"))) == (4, 2)


def test_what_is_there_is_told_where_nothing_is_found(root: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match=r"images/train; \S* has masks/, other/; images go to ROOT/images/"):
        find_masks(tmp_path, num_classes=4)
    moved(root, ("labels", "truth"))
    with pytest.raises(UserError, match=r"labels/train; \S* has classes.txt, images/, truth/; images go"):
        find_masks(root)


def test_pairs_of_unlike_names_are_told_and_read(root: Path) -> None:
    for path in [*(root / "labels/train").iterdir()]:
        path.rename(path.with_name(f"{path.stem}_mask.png"))
    images = find_masks(root)
    assert "under " in images.description and images.description.endswith(", 00.png with 00_mask.png")
    assert [images.label_names[i] for i in range(2)] == ["00_mask.png", "01_mask.png"]
    assert images.pair(1)[1].shape == (40, 56)


def test_a_cure_for_labels_of_another_name(root: Path) -> None:
    (root / "labels/train/00.png").rename(root / "labels/train/odd.png")
    with pytest.raises(UserError, match=r"00.png: no label picture of this name.*odd.png: no image"):
        find_masks(root)
    (root / "labels/train/odd.png").rename(root / "labels/train/00.PNG")
    assert len(find_masks(root)) == 4


def test_an_option_says_what_each_class_is_stored_as(root: Path) -> None:
    (root / "classes.txt").unlink()
    Image.new("L", (56, 40), 255).save(root / "labels/train/00.png")
    labelling = find_masks(root, values=(0, 255)).labelling
    assert labelling.class_names == ("class 0", "class 255")
    assert (labelling.ignored, [*labelling.numbers]) == ((), [0, 255])
    assert find_masks(root, values=(0, 7)).labelling.ignored == (255,)
    fingerprints = {find_masks(root, values=values).fingerprint for values in ((0, 255), (255, 0))}
    assert len(fingerprints) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"values": (0, 0, 1, 2)}, "0, 0, 1, 2: give distinct numbers"),
        ({"values": (0, 1, 2, 65_536)}, "distinct numbers from 0 to 65,535"),
        ({"values": (0, 255)}, "has 2 numbers, but there are 4 classes, red, green, blue, yellow"),
        ({"values": (0, 1, 2, 9), "zero_is_no_label": True}, "has 0, which --data.zero-is-no-label marks"),
    ],
)
def test_mistakes_about_values(root: Path, options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        find_masks(root, **options)
