import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from itpn.commands import sample_data as command
from itpn.data import sample_data
from itpn.data.sample_cutouts import SAMPLE, Cutout, index, load_cutouts
from itpn.data.sample_data import write_imagefolder, write_sample
from itpn.data.textures import PATTERNS, STUFF, paint
from itpn.errors import UserError


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("sample")
    write_sample(directory, seed=3, num_train_scenes=12, num_val_scenes=5)
    return directory


@pytest.fixture
def few(monkeypatch) -> Callable[[str], list[Cutout]]:
    """Makes the sample of two cut-outs of each class and split, where more would show no more."""

    def load(split: str) -> list[Cutout]:
        of_label = defaultdict(list)
        for cutout in load_cutouts(split):
            of_label[cutout.label].append(cutout)
        return [cutout for cutouts in of_label.values() for cutout in cutouts[:2]]

    monkeypatch.setattr(sample_data, "load_cutouts", load)
    return load


def digests(directory: Path) -> dict[str, str]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_bundled_files_are_small():
    assert sum(path.stat().st_size for path in SAMPLE.iterdir()) <= 6_000_000


def test_every_cutout_is_what_the_index_says():
    images = index()["images"]
    assert len({entry["sha256"] for entry in images}) == len(images)
    cutouts = load_cutouts("train") + load_cutouts("val")
    assert sorted(cutout.name + ".webp" for cutout in cutouts) == [entry["file"] for entry in images]
    assert all(max(cutout.image.size) == 96 and cutout.image.mode == "RGBA" for cutout in cutouts)
    # a cut-out without anything opaque could be neither recognised nor annotated
    assert all(np.asarray(cutout.image)[..., 3].max() > 127 for cutout in cutouts)


def test_splits_share_no_group_of_near_duplicates():
    splits = defaultdict(set)
    for entry in index()["images"]:
        splits[entry["group"]].add(entry["split"])
    assert all(len(sides) == 1 for sides in splits.values())
    assert {side for sides in splits.values() for side in sides} == {"train", "val"}


def test_image_folder_holds_every_cutout_of_its_split_once(sample):
    found = Counter(
        (path.parts[-3], path.parts[-2], path.stem[:4]) for path in (sample / "imagefolder").rglob("*.jpg")
    )
    expected = Counter(
        (entry["split"], entry["class"], Path(entry["file"]).stem) for entry in index()["images"]
    )
    assert found == expected


def test_image_folder_has_texture_in_every_patch(sample):
    for path in sorted((sample / "imagefolder").rglob("*.jpg"))[::40]:
        pixels = np.asarray(Image.open(path), np.float32)
        assert pixels.shape == (96, 96, 3)
        patches = pixels.reshape(6, 16, 6, 16, 3).transpose(0, 2, 1, 3, 4).reshape(36, -1, 3)
        assert patches.std(1).max(-1).min() > 0.7, path


def test_repeats_show_a_train_cutout_on_several_backgrounds(few, tmp_path):
    counts = write_imagefolder(tmp_path, seed=3, repeats=2)
    assert counts == {"train": 2 * len(few("train")), "val": len(few("val"))}
    first, second = sorted((tmp_path / "train" / "bird").iterdir())[:2]
    assert first.stem[:4] == second.stem[:4]
    assert first.read_bytes() != second.read_bytes()


def test_same_seed_same_bytes(few, tmp_path):
    for name in ("once", "again"):
        write_sample(tmp_path / name, seed=3, num_train_scenes=3, num_val_scenes=2)
    assert digests(tmp_path / "once") == digests(tmp_path / "again")


def test_another_seed_is_another_data_set(few, tmp_path):
    for seed in (3, 4):
        write_imagefolder(tmp_path / str(seed), seed=seed)
    before, after = digests(tmp_path / "3"), digests(tmp_path / "4")
    assert before.keys() == after.keys()
    assert all(before[name] != after[name] for name in before)


@pytest.mark.parametrize(("split", "num_images"), [("train", 12), ("val", 5)])
def test_coco_masks_boxes_and_areas_agree(sample, split, num_images):
    coco = COCO(sample / "coco" / "annotations" / f"instances_{split}2017.json")
    assert len(coco.imgs) == num_images
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == index()["classes"]
    for image_id, image in coco.imgs.items():
        with Image.open(sample / "coco" / f"{split}2017" / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"])
        annotations = coco.imgToAnns[image_id]
        assert annotations
        masks = np.stack([coco.annToMask(annotation) for annotation in annotations])
        assert masks.sum(0).max() == 1  # what one thing hides does not belong to another
        for annotation, mask in zip(annotations, masks, strict=True):
            y, x = np.nonzero(mask)
            assert annotation["bbox"] == [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
            assert annotation["area"] == len(x) > 0
            assert annotation["iscrowd"] == 0


def test_coco_ids_are_unique_over_both_splits(sample):
    ids = defaultdict(list)
    for path in (sample / "coco" / "annotations").iterdir():
        content = json.loads(path.read_text())
        ids["images"] += [image["id"] for image in content["images"]]
        ids["annotations"] += [annotation["id"] for annotation in content["annotations"]]
    assert all(len(set(numbers)) == len(numbers) for numbers in ids.values())


@pytest.mark.parametrize(("split", "short"), [("training", "train"), ("validation", "val")])
def test_ade20k_labels_agree_with_coco_where_things_are(sample, split, short):
    root = sample / "ade20k" / "ADEChallengeData2016"
    num_things = len(index()["classes"])
    coco = COCO(sample / "coco" / "annotations" / f"instances_{short}2017.json")
    images = sorted((root / "images" / split).iterdir())
    assert len(images) == len(coco.imgs)
    for path, image_id in zip(images, sorted(coco.imgs), strict=True):
        labels = np.asarray(Image.open(root / "annotations" / split / f"{path.stem}.png"))
        assert labels.dtype == np.uint8
        assert Image.open(path).size == labels.shape[::-1]
        things = np.zeros_like(labels)
        for annotation in coco.imgToAnns[image_id]:
            things[coco.annToMask(annotation) > 0] = annotation["category_id"]
        assert (labels == things)[things > 0].all()
        elsewhere = set(np.unique(labels[things == 0]))
        assert elsewhere <= {0, *range(num_things + 1, num_things + len(STUFF) + 1)}


def test_ade20k_table_of_names_counts_what_was_written(sample):
    root = sample / "ade20k" / "ADEChallengeData2016"
    header, *rows = (line.split("\t") for line in (root / "objectInfo150.txt").read_text().splitlines())
    assert header == ["Idx", "Ratio", "Train", "Val", "Stuff", "Name"]
    assert [row[-1] for row in rows] == [*index()["classes"], *STUFF]
    labels = [np.asarray(Image.open(path)) for path in (root / "annotations" / "training").iterdir()]
    assert [int(row[2]) for row in rows] == [
        sum(i in label for label in labels) for i in range(1, len(rows) + 1)
    ]


@pytest.mark.parametrize("name", [*STUFF, *PATTERNS])
def test_textures_stay_in_range_and_are_nowhere_flat(name):
    for seed in range(5):
        pixels = paint((STUFF | PATTERNS)[name], np.random.default_rng(seed), (64, 80), light=seed % 2 == 0)
        assert pixels.shape == (64, 80, 3)
        assert pixels.min() >= 0
        assert pixels.max() <= 1
        patches = pixels.reshape(4, 16, 5, 16, 3).transpose(0, 2, 1, 3, 4).reshape(20, -1, 3)
        assert patches.std(1).max(-1).min() > 0.003


def test_a_file_in_the_way_is_a_user_error(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*taken"):
        write_sample(tmp_path / "taken")


def test_files_of_other_data_are_kept_and_the_same_command_again_works(few, tmp_path):
    for _ in range(2):
        write_sample(tmp_path, num_train_scenes=1, num_val_scenes=1)
    mine = tmp_path / "coco" / "annotations" / "instances_train2017.json"
    mine.write_text("mine")
    with pytest.raises(UserError, match=rf"{mine} is not replaced: .*DIR"):
        write_sample(tmp_path, num_train_scenes=1, num_val_scenes=1)
    assert mine.read_text() == "mine"


def test_a_seed_below_0_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="--seed is -1"):
        command.run([str(tmp_path), "--seed", "-1"])
    assert not any(tmp_path.iterdir())


def test_command_says_what_it_wrote_and_what_to_look_at(few, tmp_path, capsys, monkeypatch):
    wrote = write_sample(tmp_path, num_train_scenes=2, num_val_scenes=1)
    monkeypatch.setattr(command, "write_sample", lambda directory, seed: wrote)
    command.run([str(tmp_path), "--seed", "5"])
    said = capsys.readouterr().out
    assert f"{wrote.num_images['train']:,} train" in said
    assert "18 classes" in said
    assert said.splitlines()[-1] == f"Look at {tmp_path / 'contact-sheet.png'} first."
    assert wrote.contact_sheet.is_file()
