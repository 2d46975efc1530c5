import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from itpn.data.ade20k import find_ade20k
from itpn.data.labelled import LabelledImages, find_masks
from itpn.data.picture import BadImageError
from itpn.data.sample_cutouts import index, load_cutouts
from itpn.data.sample_data import write_ade20k
from itpn.data.sample_scenes import compose
from itpn.errors import UserError
from tests.data.dirty import encoded, exif, flat
from tests.data.segmented import COLOURS, write_masks, write_pair


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_masks(tmp_path / "masks", {"train": 3, "val": 2})


def test_generic_folders(root: Path) -> None:
    images = find_masks(root)
    assert len(images) == 3 and images.labelling.class_names == ("red", "green", "blue", "yellow")
    assert images.description == f"3 images with labels of 4 classes under {root / 'images/train'}"
    assert images.labels is None and images.class_names is None and images.unpaired == ()
    image, labels = images.pair(1)
    assert image.size == (56, 40) and labels.shape == (40, 56)
    assert (labels[:, 0] == 255).all()
    assert np.array_equal(np.asarray(image)[:, 1:], COLOURS[labels[:, 1:]])
    assert len(find_masks(root, "val")) == 2
    again = pickle.loads(pickle.dumps(images))  # as a spawned worker gets it
    assert np.array_equal(again.pair(1)[1], labels)


def test_pairs_go_by_the_path_without_ending(root: Path) -> None:
    for kind in ("images", "labels"):
        (root / kind / "train/deeper").mkdir()
    Image.new("RGB", (8, 8)).save(root / "images/train/deeper/a.b.JPG", "JPEG")
    Image.new("L", (8, 8)).save(root / "labels/train/deeper/a.b.png")
    images = find_masks(root)
    assert [images.label_names[i] for i in range(4)] == ["00.png", "01.png", "02.png", "deeper/a.b.png"]
    assert images.path(3).name == "a.b.JPG" and images.pair(3)[1].shape == (8, 8)


def test_images_of_other_endings_are_told(root: Path) -> None:
    (root / "images/train/04.jfif").write_bytes(encoded(flat(), "JPEG"))
    images = find_masks(root)
    assert images.description.endswith("; other files beside them: 1 .jfif")
    [note] = images.notes
    assert note.startswith("1 files look like images and are left out for their endings")


@pytest.mark.parametrize("skip_bad", [False, True])
def test_files_without_a_partner(root: Path, skip_bad: bool) -> None:
    (root / "labels/train/01.png").unlink()
    (root / "images/train/02.png").unlink()
    if not skip_bad:
        with pytest.raises(
            UserError, match=r"2 files have no partner: .*01\.png: no label .*02\.png: no image .*skip-bad"
        ):
            find_masks(root)
        return
    images = find_masks(root, skip_bad=True)
    assert [bad.path for bad in images.unpaired] == [
        root / "images/train/01.png",
        root / "labels/train/02.png",
    ]
    assert len(images) == 1 and "2 files without a partner are left out" in images.description


def test_many_files_without_a_partner_are_counted(root: Path) -> None:
    for i in range(10, 20):
        Image.new("RGB", (8, 8)).save(root / f"images/train/{i}.png")
    with pytest.raises(UserError, match=r"10 files have no partner: .*12\.png: [^;]* and 7 more"):
        find_masks(root)


def test_numbers_and_names_of_classes(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "names"
    other.write_bytes("\ufeffa b\r\n é \r\nc\r\nd\r\n\r\n".encode())
    assert find_masks(root, names=other).labelling.class_names == ("a b", "é", "c", "d")
    (root / "classes.txt").unlink()
    assert find_masks(root, num_classes=2).labelling.class_names == ("class 0", "class 1")
    labelling = find_masks(root, num_classes=300, ignored=None, zero_is_no_label=True).labelling
    assert (labelling.first, labelling.ignored, labelling.unlabelled) == (1, (0,), 65_535)


@pytest.mark.parametrize(
    ("options", "names", "words"),
    [
        ({}, None, "the number of classes is not known: write their names to .*classes.txt"),
        ({"num_classes": 3}, "a\nb\n", "names 2 classes, but --data.num-classes says 3"),
        ({}, "a\n\nb\n", "line without a name"),
        ({}, "a\nb\na\n", "a name twice"),
        ({}, "x" * (1 << 20 | 1), "longer than 1,048,576 bytes"),
        ({"names": Path("nowhere")}, "a\nb\n", "cannot read nowhere: No such file"),
        (
            {"num_classes": 256},
            None,
            "255 cannot mark unlabelled pixels, .* one of the 256 classes, 'class 255'",
        ),
        ({"num_classes": 255, "zero_is_no_label": True}, None, "255 cannot mark"),
    ],
)
def test_mistakes_about_classes_are_named(root: Path, options: dict, names: str | None, words: str) -> None:
    (root / "classes.txt").unlink()
    if names is not None:
        (root / "classes.txt").write_text(names)
    with pytest.raises(UserError, match=words):
        find_masks(root, **options)


def test_missing_and_ambiguous_files(root: Path) -> None:
    with pytest.raises(UserError, match=r"there is no folder .*nowhere/images/train"):
        find_masks(root / "nowhere", num_classes=3)
    (root / "images/train/00.jpg").write_bytes(encoded(flat(), "JPEG"))
    with pytest.raises(UserError, match=r"00\.jpg and .*00\.png share a name"):
        find_masks(root)
    shutil.rmtree(root / "labels/val")
    (root / "labels/val").mkdir()
    with pytest.raises(UserError, match=r"labels/val holds no picture; .*labels/val is empty"):
        find_masks(root, "val", skip_bad=True)
    Image.new("L", (8, 8)).save(root / "labels/val/odd.png")
    with pytest.raises(UserError, match=r"no image in .* has a label picture .* as 00.png and odd.png there"):
        find_masks(root, "val", skip_bad=True)


def test_a_bad_file_of_a_pair_is_named(root: Path) -> None:
    write_pair(root, "train", "00", np.zeros((8, 8), np.uint8), np.full((8, 8), 9, np.uint8))
    write_pair(root, "train", "01", np.zeros((8, 8), np.uint8), np.zeros((8, 9), np.uint8))
    (root / "images/train/02.png").write_bytes(b"nothing")
    images = find_masks(root)
    for i, words in enumerate(
        ("its labels .*labels/train/00.png: labels 9 are no class: those are 0 to 3, and 255 is no label",
         "its labels .*labels/train/01.png: 9 x 8 labels for an image of 8 x 8 pixels", "not an image")
    ):  # fmt: skip
        with pytest.raises(BadImageError, match=words) as error:
            images.pair(i)
        assert error.value.path == root / f"images/train/0{i}.png"


def test_labels_fit_the_image_as_exif_turns_it(root: Path) -> None:
    (root / "images/train/00.png").write_bytes(exif(6))
    Image.new("L", (16, 24)).save(root / "labels/train/00.png")
    image, labels = find_masks(root).pair(0)
    assert image.size == (16, 24) and labels.shape == (24, 16)
    Image.new("L", (24, 16)).save(root / "labels/train/00.png")
    with pytest.raises(BadImageError, match="24 x 16 labels for an image of 16 x 24 pixels"):
        find_masks(root).pair(0)


def test_the_fingerprint_knows_labels_and_their_meaning(root: Path) -> None:
    first = find_masks(root).fingerprint
    assert find_masks(root).fingerprint == first
    (root / "classes.txt").write_text("red\ngreen\nblue\norange\n")
    changed = find_masks(root).fingerprint
    for kind in ("images", "labels"):
        (root / kind / "train/00.png").rename(root / kind / "train/07.png")
    assert len({first, changed, find_masks(root).fingerprint, find_masks(root, ignored=254).fingerprint}) == 4


def test_data_sets_keep_the_fingerprint_that_earlier_versions_gave_them(tmp_path: Path) -> None:
    """So that runs that began with these go on."""
    for kind in ("images", "labels"):
        for name in ("a", "B", "deeper/é.1"):
            path = tmp_path / kind / "train" / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (4, 4)).save(path)
    assert find_masks(tmp_path, num_classes=3).fingerprint == (
        "065165148448d984ae7869a2960f391799584e679a8ae72431da161630f037b9"
    )
    assert find_masks(tmp_path, num_classes=3, ignored=None, zero_is_no_label=True).fingerprint == (
        "27613e45f3f08b04a72201f041bd793ca4854265e06de7e3eeb353907ddde2ea"
    )


@pytest.fixture(scope="module")
def ade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("ade"), np.random.default_rng(0)
    cutouts = load_cutouts("val")
    by_label = [[c for c in cutouts if c.label == label] for label in range(18)]
    scenes = [compose(by_label, rng) for _ in range(3)]
    write_ade20k(root, {"train": scenes[:2], "val": scenes[2:]}, index()["classes"])
    return root


def test_the_sample_as_ade20k(ade: Path) -> None:
    images = find_ade20k(ade)
    assert isinstance(images, LabelledImages) and len(images) == 2
    assert images.labelling.num_classes == 23 and images.labelling.class_names[18] == "sky"
    stored = np.asarray(Image.open(images.label_path(0)))
    labels = images.pair(0)[1]
    assert np.array_equal(labels, np.where(stored == 0, 255, stored - 1))
    assert find_ade20k(ade / "ADEChallengeData2016").fingerprint == images.fingerprint
    assert len(find_ade20k(ade, "val")) == 1


REAL = """Idx\tRatio\tTrain\tVal\tStuff\tName
1\t0.1576\t11664\t1172\t1\twall
2\t0.1072\t6046\t612\t1\tbuilding, edifice
3\t0.0878\t8265\t796\t\tsky
"""


def test_the_table_of_names(ade: Path, tmp_path: Path) -> None:
    root = shutil.copytree(ade, tmp_path / "ade")
    table = root / "ADEChallengeData2016/objectInfo150.txt"
    table.write_text(REAL)
    assert find_ade20k(root).labelling.class_names == ("wall", "building", "sky")
    for damaged in ("", "Idx\n", REAL.replace("\n2\t", "\n4\t"), "x" * (1 << 21)):
        table.write_text(damaged)
        with pytest.raises(UserError, match="objectInfo150"):
            find_ade20k(root)
    table.unlink()
    names = find_ade20k(root).labelling.class_names
    assert len(names) == 150 and names[:2] == ("class 0", "class 1")
