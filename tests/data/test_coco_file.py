"""COCO files as they should not be: what is an error, what is left out, what is odd and kept."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from itpn.data.coco import Coco, check_categories
from itpn.data.coco_file import find_coco, read_coco
from itpn.data.picture import BadImageError
from itpn.errors import UserError
from tests.data.coco import TRIANGLE, Content, content, thing, written

RUNS = {"size": [48, 64], "counts": [48 * 10 + 10, 30, 48 * 53 + 8]}


def read(folder: Path, *annotations: Any, sizes: tuple[tuple[int, int], ...] = ((48, 64), (48, 64))) -> Coco:
    return read_coco(written(folder, content([*sizes], annotations=[*annotations])), folder)


def test_all_of_a_file_is_read(tmp_path: Path) -> None:
    crowd = thing(5, 2, iscrowd=1, segmentation=RUNS, bbox=[10, 10, 1, 30])
    coco = read(tmp_path, thing(9, 2, category_id=7), crowd, thing(4, area=12.5))
    assert [coco.path(i).name for i in range(2)] == ["1.png", "2.png"]
    assert coco.sizes.tolist() == [[48, 64]] * 2 and coco.image_ids.tolist() == [1, 2]
    assert coco.categories == ((3, "cat"), (7, "dog"))
    objects = coco.objects
    assert objects.ids.tolist() == [4, 9, 5] and objects.labels.tolist() == [0, 1, 0]
    assert [list(objects.of(i)) for i in range(2)] == [[0], [1, 2]] and objects.counts().tolist() == [1, 1]
    assert objects.boxes.tolist() == [[10, 10, 20, 30]] * 2 + [[10, 10, 1, 30]]
    assert objects.areas.tolist() == [12.5, 300, 300] and objects.crowd.tolist() == [False, False, True]
    outline, runs = objects.outline(0), objects.outline(2)
    assert isinstance(outline, list) and outline[0].ravel().tolist() == TRIANGLE[0]
    assert isinstance(runs, np.ndarray) and runs.tolist() == RUNS["counts"]
    assert not coco.findings and "2 images with 2 objects of 2 classes and 1 crowds" in coco.description
    assert coco.labels is None and coco.class_names is None and coco.has_masks


def test_a_place_for_each_split_or_explicit_ones(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        file = written(tmp_path / f"{split}2017", content([(8, 8)], annotations=[]))
        file.rename(tmp_path / f"annotations/instances_{split}2017.json")
    assert len(find_coco(tmp_path, "train")) == len(find_coco(tmp_path, "val")) == 1
    own = written(tmp_path / "own", content([(8, 8)] * 3))
    assert len(find_coco(tmp_path, "train", tmp_path / "own", own)) == 3
    with pytest.raises(
        UserError, match=r"there is no nowhere/val2017; --data.root takes .*--data.val-images"
    ):
        find_coco(Path("nowhere"), "val")
    with pytest.raises(UserError, match=r"there is no .*none.json; .*--data.train-annotations"):
        find_coco(tmp_path, "train", None, tmp_path / "none.json")


@pytest.mark.parametrize("around", ["", "export/"])
@pytest.mark.parametrize("val", ["valid", "val", "Validation"])
def test_annotations_beside_the_images_of_each_split(tmp_path: Path, val: str, around: str) -> None:
    for name, num in (("train", 3), (val, 2), ("test", 1)):
        (tmp_path / around).mkdir(exist_ok=True)
        data = content([(8, 8)] * num, annotations=[])
        written(tmp_path / around / name, data, "_annotations.coco.json")
    assert [len(find_coco(tmp_path, split)) for split in ("train", "val")] == [3, 2]


def test_a_folder_may_lie_around_coco(tmp_path: Path) -> None:
    (tmp_path / "coco/annotations").mkdir(parents=True)
    file = written(tmp_path / "coco/train2017", content([(8, 8)]))
    file.rename(tmp_path / "coco/annotations/instances_train2017.json")
    assert len(find_coco(tmp_path, "train")) == 1


LEFT_OUT: dict[str, tuple[Any, str]] = {
    "no object": (5, "it is 5, not an object"),
    "no field": ({}, "image_id: it is missing"),
    "unknown image": (thing(1, 99), "image_id: no such image, 99"),
    "image in a list": (thing(1, image_id=[1]), "image_id: [1] is no id"),
    "unknown category": (thing(1, category_id=4), "category_id: no such category, 4"),
    "no category": (thing(1, category_id=None), "category_id: None is no id"),
    "truth as category": (thing(1, category_id=True), "category_id: True is no id"),
    "crowd of many": (thing(1, iscrowd=2), "iscrowd: 2 is neither 0 nor 1"),
    "neither box nor mask": (
        thing(1, bbox=None, segmentation=[]),
        "bbox: None, and there is no segmentation",
    ),
    "turned box": (thing(1, bbox=[10, 10, 20, 30, 45.0]), "of a turned box, write the upright one around it"),
    "three numbers": (thing(1, bbox=[1, 2, 3]), "bbox: [1, 2, 3] is not x, y, width, height"),
    "words": (thing(1, bbox=["one", 2, 3, 4]), "bbox: 'one' is not a number"),
    "not a number": (thing(1, bbox=[float("nan"), 2, 3, 4]), "bbox: nan is not finite"),
    "huge": (thing(1, bbox=[10**400, 2, 3, 4]), "is not finite or too large"),
    "zero width": (thing(1, bbox=[10, 10, 0, 30]), "bbox: width or height is not above 0"),
    "negative height": (thing(1, bbox=[10, 10, 5, -3]), "bbox: width or height is not above 0"),
    "right of the image": (thing(1, bbox=[64, 0, 5, 5]), "bbox: it lies outside the image"),
    "above the image": (thing(1, bbox=[0, -9, 5, 9]), "bbox: it lies outside the image"),
    "around the image": (thing(1, bbox=[-9, -9, 900, 90]), "several times its size"),
    "box apart from mask": (thing(1, bbox=[40, 20, 9, 9]), "bbox: it does not meet the segmentation"),
    "negative area": (thing(1, area=-1), "area: it is below 0"),
    "infinite area": (thing(1, area=float("inf")), "area: inf is not finite"),
    "bad polygon": (thing(1, segmentation=[[1, 2, 3, 4]]), "segmentation: a polygon of 4 numbers"),
    "run lengths of another size": (
        thing(1, segmentation={"size": [64, 48], "counts": [3072]}),
        "segmentation: run lengths of size [64, 48], but the image has [48, 64]",
    ),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_bad_annotation_is_left_out_and_told(tmp_path: Path, name: str) -> None:
    bad, words = LEFT_OUT[name]
    coco = read(tmp_path, thing(100), bad, thing(101, 2))
    assert coco.objects.ids.tolist() == [100, 101] and coco.num_annotations == 3
    (finding,) = coco.findings
    assert words in finding.reason and finding.place == 1 and finding.left_out
    assert any("1 of 3 annotations cannot be used" in note and words in note for note in coco.notes)
    assert "1 annotations left out and 0 odd ones kept: see itpn check-data" in coco.description


ODD: dict[str, tuple[Content, str]] = {
    "beyond": (thing(1, bbox=[10, 10, 60, 30]), "bbox: it is not the segmentation's"),
    "a little beyond": (thing(1, bbox=[-3, 10, 33, 30]), "bbox: it reaches outside the image"),
    "same id": (thing(100, 2), "id: that of an earlier annotation"),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_annotation_is_kept_as_it_is_and_told(tmp_path: Path, name: str) -> None:
    odd, words = ODD[name]
    coco = read(tmp_path, thing(100), odd)
    assert coco.objects.boxes[1].tolist() == odd["bbox"] and len(coco.objects) == 2
    (finding,) = coco.findings
    assert words in finding.reason and not finding.left_out
    assert finding.annotation == str(odd["id"]) and finding.image == f"{odd['image_id']}.png"


def test_what_is_missing_and_harmless(tmp_path: Path) -> None:
    plain = {
        name: value for name, value in thing(1).items() if name not in ("iscrowd", "area", "segmentation")
    }
    coco = read(tmp_path, plain, thing(2, segmentation=[], id=2.0), thing(3, bbox=[-0.5, 10, 30.5, 30]))
    assert not coco.findings and coco.objects.areas.tolist() == [600, 300, 300]
    assert coco.objects.crowd.tolist() == [False] * 3 and coco.objects.ids.tolist() == [1, 2, 3]
    assert coco.objects.outline(0) is None and coco.objects.outline(1) is None and coco.has_masks
    (tmp_path / "boxes").mkdir()
    assert not read(tmp_path / "boxes", plain).has_masks


def test_an_exact_copy_is_left_out(tmp_path: Path) -> None:
    coco = read(tmp_path, thing(1), thing(2), thing(1))
    assert coco.objects.ids.tolist() == [1, 2]
    assert [finding.reason for finding in coco.findings] == ["id: an exact copy of an earlier annotation"]


def without(data: Content, name: str) -> Content:
    return {key: value for key, value in data.items() if key != name}


def changed(kind: str, field: str, value: Any) -> Content:
    data = content([(8, 8), (8, 8)], annotations=[thing(1)])
    data[kind][1 if len(data[kind]) > 1 else 0][field] = value
    return data


GOOD = content([(48, 64)], annotations=[thing(1)])
WRONG: dict[str, tuple[Any, str]] = {
    "empty": ("", "is not JSON"),
    "web page": ("<!doctype html>", "is not JSON"),
    "cut off": (json.dumps(GOOD)[:-9], "is not JSON"),
    "deep": ("[" * 100_000, "is not JSON"),
    "huge integer": ('{"images": ' + "9" * 5000 + "}", "is not JSON"),
    "number": ("5", "holds no object with images, annotations and categories"),
    "detections": ([{"image_id": 1, "bbox": [1, 2, 3, 4]}], "is a list, as files of detections are"),
    "other fields": ({"licenses": [], "info": {}}, "has no list 'images', but 'licenses', 'info'"),
    "images by id": ({**GOOD, "images": {"1": {}}}, "'images' is {'1': {}}, not a list; write a list"),
    "no images": ({**GOOD, "images": []}, "has no images"),
    "no annotations": (without(GOOD, "annotations"), "has no list 'annotations'"),
    "no categories": (without(GOOD, "categories"), "has no list 'categories'"),
    "empty categories": ({**GOOD, "categories": []}, "has no categories"),
    "image that is none": ({**GOOD, "images": [3]}, "entry 0 of 'images': it is 3, not an object"),
    "image id": (changed("images", "id", None), "entry 1 of 'images': id: None is no id"),
    "same image id": (
        changed("images", "id", 1),
        "entry 1 of 'images': id 1 is that of another image, 1.png",
    ),
    "no width": (changed("images", "width", None), "entry 1 of 'images': width: None is not a whole number"),
    "no height": (changed("images", "height", 0), "entry 1 of 'images': height: 0 is not in 1 to"),
    "no name": (changed("images", "file_name", ""), "entry 1 of 'images': file_name: '' is not a text"),
    "category id": (changed("categories", "id", 7), "entry 1 of 'categories': id 7 is that of another"),
    "category name": (changed("categories", "name", [5]), "1 of 'categories': name: [5] is not a text"),
    "half a character": (changed("images", "file_name", "\ud800"), "file_name: '\\ud800' is not a text"),
    "labelme": ({"shapes": [], "imagePath": "1.png"}, "it looks like a file of LabelMe"),
    "compressed": ("PK\x03\x04", "is compressed; unpack it"),
    "panoptic": (
        {**GOOD, "annotations": [{"image_id": 1, "file_name": "1.png", "segments_info": []}]},
        "it looks like a panoptic file; name the instances file",
    ),
    "captions": (
        {**GOOD, "annotations": [{"id": 1, "image_id": 1, "caption": "a cat"}]},
        "category_id: it is missing; it looks like a file of captions; name the instances file",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    data, words = WRONG[name]
    written(tmp_path, GOOD)
    file = tmp_path / "wrong.json"
    file.write_text(data if isinstance(data, str) else json.dumps(data))
    with pytest.raises(UserError) as caught:
        read_coco(file, tmp_path)
    message = str(caught.value)
    assert words in message and message.startswith(str(file)) and "\n" not in message and len(message) < 400


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"cannot read .*: Is a directory"):
        read_coco(tmp_path, tmp_path)
    file = written(tmp_path, GOOD)
    monkeypatch.setattr("itpn.data.coco_json.MAX_JSON_BYTES", 100)
    with pytest.raises(UserError, match="bytes are more than the limit of 100; split it"):
        read_coco(file, tmp_path)


def test_an_image_of_very_many_objects_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("itpn.data.coco_file.MAX_OBJECTS", 3)
    things = [thing(number) for number in range(3)]
    assert len(read(tmp_path, *things, thing(3, 2)).objects) == 4
    with pytest.raises(UserError, match=r"image 1.png has 4 annotations, more than the limit of 3"):
        read(tmp_path, *things, thing(3))


def test_another_folder_is_an_error_but_some_missing_files_are_unreadable_images(tmp_path: Path) -> None:
    file = written(tmp_path, content([(8, 8), (8, 8)]))
    (tmp_path / "other").mkdir()
    with pytest.raises(
        UserError,
        match=r"none of the 2 images of .* is in .*other, such as 1.png; that folder has no image; name",
    ):
        read_coco(file, tmp_path / "other")
    (tmp_path / "1.png").unlink()
    coco = read_coco(file, tmp_path)
    with pytest.raises(BadImageError, match="No such file"), coco.open(0):
        pass
    with coco.open(1) as picture:
        assert picture.size == (8, 8)


@pytest.mark.parametrize("turned", [False, True])
def test_an_image_of_another_size_is_unreadable(tmp_path: Path, turned: bool) -> None:
    data = content([(48, 64), (48, 64)], annotations=[thing(1)])
    file = written(tmp_path, data)
    other = copy.deepcopy(data)
    other["images"][0] |= {"height": 64 if turned else 47, "width": 48 if turned else 64}
    file.write_text(json.dumps(other))
    coco = read_coco(file, tmp_path)
    words = "64 x 48 pixels, but its annotations are for " + (
        "48 x 64; was it turned" if turned else "64 x 47"
    )
    with pytest.raises(BadImageError, match=words), coco.open(0):
        pass


def test_without_images_that_have_nothing_to_learn_from(tmp_path: Path) -> None:
    sizes = ((48, 64), (50, 64), (52, 64), (54, 64))
    coco = read(tmp_path, thing(1, 4), thing(2, 2), thing(3, 1, iscrowd=1), thing(4, 4), sizes=sizes)
    some = coco.with_objects()
    assert list(some.names) == ["2.png", "4.png"] and some.sizes[:, 0].tolist() == [50, 54]
    assert [some.objects.ids[list(some.objects.of(i))].tolist() for i in range(2)] == [[2], [1, 4]]
    assert some.image_ids.tolist() == [2, 4] and isinstance(some.objects.outline(2), list)
    assert some.fingerprint != coco.fingerprint and some.with_objects() is some


@pytest.mark.parametrize(
    "field", [{"bbox": [10, 10, 21, 30]}, {"category_id": 7}, {"iscrowd": 1}, {"segmentation": []}]
)
def test_the_fingerprint_knows_what_is_learnt(tmp_path: Path, field: Content) -> None:
    prints = [read(tmp_path, thing(1, **fields)).fingerprint for fields in ({}, {}, field)]
    assert prints[0] == prints[1] != prints[2]


def test_both_splits_need_the_same_categories(tmp_path: Path) -> None:
    one = read(tmp_path / "a", thing(1))
    check_categories(one, one)
    data = content([(48, 64)], annotations=[thing(1)])
    data["categories"][0]["name"] = "Dog"
    other = read_coco(written(tmp_path / "b", data), tmp_path / "b")
    with pytest.raises(UserError, match=r"only in the first: dog \(7\); only in the second: Dog \(7\)"):
        check_categories(one, other)


def test_the_fingerprint_of_sound_data_stays_what_it_was(tmp_path: Path) -> None:
    annotations = [
        thing(1, 2),
        thing(2, area=12.5),
        thing(5, 2, iscrowd=1, segmentation=RUNS, bbox=[10, 10, 1, 30]),
        thing(6, 3, bbox=[-3, 10, 33, 30], category_id=7),
        thing(7, segmentation=[]),
        thing(8, 99),
    ]
    coco = read(tmp_path, *annotations, sizes=((48, 64),) * 3)
    assert coco.fingerprint == "38fae9be4051e4ffe5581a79d708bd39aa37f4649b9b1ea3ad34d8cac10abb76"


SPELLED: dict[str, Content] = {
    "numbers in text": {
        "image_id": "1",
        "category_id": "3",
        "area": "300",
        "bbox": ["10", "10", "20", "30.0"],
    },
    "no id": {"id": None},
    "image by its name": {"image_id": "1.png"},
    "id in text": {"id": "9f-3"},
    "huge id": {"id": 10**30},
    "name as category": {"category_id": "cat"},
    "truth as crowd": {"iscrowd": False},
    "no crowd": {"iscrowd": None},
    "text as crowd": {"iscrowd": "0"},
    "no area": {"area": None},
    "box of the mask": {"bbox": None},
}


@pytest.mark.parametrize("name", SPELLED)
def test_what_is_spelled_otherwise_is_read_as_the_same(tmp_path: Path, name: str) -> None:
    plain, other = read(tmp_path, thing(1)), read(tmp_path, thing(1, **SPELLED[name]))
    assert other.fingerprint == plain.fingerprint and not other.findings
    assert other.objects.areas[0] == (300 if SPELLED[name].get("area", 1) else 600)


@pytest.mark.parametrize("ids", [["a1-x", "b2-y"], [10**20, 10**20 + 1], ["7", "x"], [8, "9" * 30]])
def test_ids_of_images_need_only_be_equal(tmp_path: Path, ids: list[Any]) -> None:
    data = content([(48, 64), (48, 64)], annotations=[thing(1, ids[1]), thing(2, ids[0])])
    for image, number in zip(data["images"], ids, strict=True):
        image["id"] = number
    coco = read_coco(written(tmp_path, data), tmp_path)
    assert coco.objects.ids.tolist() == [2, 1] and coco.image_ids.tolist() == [1, 2]
    assert "results count images from 1" in coco.description


def test_ids_of_categories_may_be_texts(tmp_path: Path) -> None:
    data = content([(48, 64)], annotations=[thing(1, category_id="n02"), thing(2, category_id="n01")])
    data["categories"] = [{"id": "n02", "name": "dog"}, {"id": "n01", "name": 7}]
    coco = read_coco(written(tmp_path, data), tmp_path)
    assert coco.categories == ((1, "7"), (2, "dog")) and coco.objects.labels.tolist() == [1, 0]


@pytest.mark.parametrize("sides", [{}, {"width": -1, "height": -1}, {"width": None, "height": 0}])
def test_sizes_that_are_not_told_are_those_of_the_files(tmp_path: Path, sides: Content) -> None:
    data = content([(48, 64), (20, 30)], annotations=[thing(1)])
    file = written(tmp_path, data)
    for image in data["images"]:
        del image["width"], image["height"]
        image |= sides
    file.write_text(json.dumps(data))
    assert read_coco(file, tmp_path).sizes.tolist() == [[48, 64], [20, 30]]
    (tmp_path / "2.png").write_bytes(b"none")
    with pytest.raises(UserError, match=r"entry 1 of 'images': no height and width, and .*2\.png"):
        read_coco(file, tmp_path)
    data["images"][1] |= {"width": "30", "height": 20.0}
    file.write_text(json.dumps(data))
    assert read_coco(file, tmp_path).sizes.tolist() == [[48, 64], [20, 30]]


def test_a_bad_polygon_alone_is_left_out_and_told(tmp_path: Path) -> None:
    parts = [*TRIANGLE, [3, 3, 4, 4]]
    coco = read(tmp_path, thing(1, segmentation=parts), thing(2, segmentation=parts, bbox=None))
    assert coco.objects.boxes.tolist() == [[10, 10, 20, 30]] * 2
    outline = coco.objects.outline(0)
    assert isinstance(outline, list) and [points.ravel().tolist() for points in outline] == TRIANGLE
    (note,) = coco.notes
    assert "2 of 2 annotations are odd and kept, such as annotation 1 (1.png): segmentation: 1 of 2 " in note
    assert [finding.left_out for finding in coco.findings] == [False, False]


def test_files_in_other_encodings_are_read_or_named(tmp_path: Path) -> None:
    data = json.dumps(GOOD | {"info": "Müller"}, ensure_ascii=False)
    file = written(tmp_path, GOOD)
    for encoding in ("utf-8-sig", "utf-16"):
        file.write_bytes(data.encode(encoding))
        assert len(read_coco(file, tmp_path).objects) == 1
    file.write_bytes(data.encode("latin-1"))
    with pytest.raises(UserError, match=r"byte \d+ is not UTF-8; save it as UTF-8, as with iconv"):
        read_coco(file, tmp_path)
    file.write_bytes(file.read_bytes().decode("latin-1").encode())
    assert len(read_coco(file, tmp_path).objects) == 1


def test_categories_that_are_missing_can_be_added_as_the_message_says(tmp_path: Path) -> None:
    file = written(tmp_path, without(GOOD, "categories"))
    with pytest.raises(
        UserError, match=r'as "categories": \[\{"id": 1, "name": "object"\}\], with'
    ) as caught:
        read_coco(file, tmp_path)
    added = json.loads(str(caught.value).split('"categories": ')[1].split(", with")[0])
    added[0]["id"] = 3
    file.write_text(json.dumps(GOOD | {"categories": added}))
    assert len(read_coco(file, tmp_path).objects) == 1


def test_run_lengths_of_exchanged_sides_are_read_once_they_are_put_right(tmp_path: Path) -> None:
    turned = RUNS | {"size": RUNS["size"][::-1]}  # type: ignore[index]
    with pytest.raises(UserError, match=r"no annotation can be used; .*its height goes before its width"):
        read(tmp_path, thing(1, bbox=[10, 10, 1, 30], segmentation=turned))
    assert len(read(tmp_path, thing(1, bbox=[10, 10, 1, 30], segmentation=RUNS)).objects) == 1


def test_masks_that_are_all_wrong_can_be_left_out_as_the_message_says(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a polygon of 4 numbers; .*or leave 'segmentation' out to train on"):
        read(tmp_path, thing(1, segmentation=[[1, 2, 3, 4]]))
    bare = without(thing(1), "segmentation")
    assert not read(tmp_path, bare).has_masks
