"""Batches of images with objects: the same for any workers, ranks and start; each image evaluated once."""

import json
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Generator, Tensor

from itpn.data.coco import Coco
from itpn.data.coco_file import read_coco
from itpn.data.detection import (
    DetectionDataConfig,
    eval_loader,
    find_objects,
    find_splits,
    find_validation,
    train_loader,
)
from itpn.data.loader import Batch
from itpn.data.views import MultiScale, paddings
from itpn.errors import UserError
from tests.data.coco import content, thing, written

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
SCALE = MultiScale(
    short_sides=(40, 56, 64), max_side=96, crop_short_sides=(40, 50), crop_sides=(24, 48), eval_short_side=64
)
SIZES = [(48, 64), (64, 48), (50, 50), (40, 70)] * 5 + [(20, 90)]
SEED, BATCH = 7, 4


def config(**fields: Any) -> DetectionDataConfig:
    return DetectionDataConfig(scale=SCALE, mask_size=14, **{"workers": 0, **fields})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-one images with one to three objects, but for the fifth and the sixth, which have none."""
    folder = tmp_path_factory.mktemp("coco")
    rng = np.random.default_rng(0)
    annotations = []
    for image, (height, width) in enumerate(SIZES, 1):
        for _ in range(0 if image in (5, 6) else 1 + image % 3):
            x, y = rng.uniform(0, width / 2), rng.uniform(0, height / 2)
            w, h = rng.uniform(6, width / 2), rng.uniform(6, height / 2)
            polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            box = {"bbox": [x, y, w, h], "segmentation": polygon, "category_id": (3, 7)[image % 2]}
            annotations.append(thing(len(annotations), image, **box))
    annotations.append(thing(1000, 5, iscrowd=1, segmentation=[], bbox=[1, 1, 20, 20]))
    written(folder, content(SIZES, annotations=annotations))
    return folder


@pytest.fixture(scope="module")
def coco(folder: Path) -> Coco:
    return read_coco(folder / "instances.json", folder).with_objects()


def draw(generator: Generator) -> Batch:
    return {"drop": torch.rand(2, generator=generator)}


def batches(coco: Coco, count: int, workers: int = 0, **options: int) -> list[Batch]:
    arguments = {"seed": SEED, "batch_size": BATCH, "micro_batch": BATCH} | options
    return list(islice(train_loader(coco, config(workers=workers), draw=draw, **arguments), count))


def rows(parts: list[Batch]) -> list[dict[str, Tensor]]:
    """Sample after sample, without the room for more objects."""
    samples = []
    for part in parts:
        for row in range(len(part["index"])):
            real = part["labels"][row] >= 0
            sample = {name: tensor[row] for name, tensor in part.items()}
            samples.append(sample | {name: sample[name][real] for name in ("boxes", "labels", "masks")})
    return samples


def assert_equal(ours: list[dict[str, Tensor]], theirs: list[dict[str, Tensor]]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def steps(coco: Coco) -> list[Batch]:
    """Ten steps, which is two epochs of four and two more."""
    return batches(coco, 10)


def test_a_batch_has_the_promised_tensors(coco: Coco, steps: list[Batch]) -> None:
    shapes = {tuple(shape) for shape in paddings(SCALE).tolist()}
    for batch in steps:
        b, most = batch["labels"].shape
        H, W = batch["images"].shape[2:]
        assert b == BATCH and (H, W) in shapes
        assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in batch.items()} == {
            "images": ((b, 3, H, W), torch.uint8),
            "sizes": ((b, 2), torch.int64),
            "boxes": ((b, most, 4), torch.float32),
            "labels": ((b, most), torch.int64),
            "masks": ((b, most, 14, 14), torch.uint8),
            "index": ((b,), torch.int64),
            "epoch": ((b,), torch.int64),
            "drop": ((b, 2), torch.float32),
        }
        for row in range(b):
            height, width = batch["sizes"][row].tolist()
            pixels, real = batch["images"][row], batch["labels"][row] >= 0
            assert (pixels[:, height:] == 0).all() and (pixels[:, :, width:] == 0).all()
            assert pixels[:, :height, :width].float().std() > 20  # of noise
            boxes, masks = batch["boxes"][row], batch["masks"][row]
            assert (boxes[~real] == 0).all() and (masks[~real] == 0).all()
            assert (boxes[real][:, 2] <= width).all() and (boxes[real][:, 3] <= height).all()
            assert (masks[real] == 1).float().mean(dim=(1, 2)).min() > 0.7 if real.any() else True
            label = int(coco.image_ids[batch["index"][row]]) % 2
            assert (batch["labels"][row][real] == label).all()


@pytest.mark.parametrize(
    ("workers", "world_size", "micro_batch", "start_step"),
    [(2, 1, 4, 0), (0, 2, 2, 0), (0, 1, 1, 3), (1, 2, 1, 5), (0, 4, 1, 8), (1, 1, 2, 9)],
)
def test_batches_are_the_same_for_any_workers_ranks_and_start(
    coco: Coco, steps: list[Batch], workers: int, world_size: int, micro_batch: int, start_step: int
) -> None:
    micro_steps = BATCH // (micro_batch * world_size)
    count = min(2, 10 - start_step)
    split = {"world_size": world_size, "micro_batch": micro_batch, "start_step": start_step}
    ranks = [batches(coco, count * micro_steps, workers, rank=rank, **split) for rank in range(world_size)]
    in_order = [batch for micro_step in zip(*ranks, strict=True) for batch in micro_step]
    assert_equal(rows(in_order), rows(steps[start_step : start_step + count]))


def test_an_epoch_shows_each_image_at_most_once_and_others_look_different(steps: list[Batch]) -> None:
    first, second = (torch.cat([batch["index"] for batch in steps[i : i + 4]]) for i in (0, 4))
    assert len(first.unique()) == len(second.unique()) == 16 and not torch.equal(first, second)
    assert steps[3]["epoch"].tolist() == [0] * BATCH and steps[4]["epoch"].tolist() == [1] * BATCH
    seen = [{int(row["index"]): row for row in rows(steps[i : i + 4])} for i in (0, 4)]
    both = seen[0].keys() & seen[1].keys()
    same = [i for i in both if torch.equal(seen[0][i]["images"], seen[1][i]["images"])]
    assert len(both) > 5 and not same


def test_the_global_random_state_is_left_alone(coco: Coco) -> None:
    before = torch.get_rng_state()
    batches(coco, 2)
    assert torch.equal(before, torch.get_rng_state())


def test_bad_images_are_replaced_and_still_fit(folder: Path, tmp_path: Path) -> None:
    data = json.loads((folder / "instances.json").read_text())
    written(tmp_path, data)
    for name in ("3.png", "8.png"):
        (tmp_path / name).write_bytes(b"nonsense")
    Image.new("RGB", (64, 48)).save(tmp_path / "10.png")  # a lying one where the annotations have it stand
    coco = read_coco(tmp_path / "instances.json", tmp_path).with_objects()
    bad = {index for index in range(len(coco)) if coco.name(index).name in ("3.png", "8.png", "10.png")}
    runs = []
    for workers in (0, 2):
        heard: list[str] = []
        loader = train_loader(
            coco,
            config(workers=workers),
            draw=draw,
            seed=SEED,
            batch_size=BATCH,
            micro_batch=BATCH,
            on_bad=lambda error, heard=heard: heard.append(error.path.name),  # type: ignore[misc]
        )
        runs.append(list(islice(loader, 12)))
        assert set(heard) == {"3.png", "8.png", "10.png"}
    assert_equal(rows(runs[0]), rows(runs[1]))
    assert bad.isdisjoint(torch.cat([batch["index"] for batch in runs[0]]).tolist())


def test_boxes_alone(tmp_path: Path) -> None:
    annotations = [thing(1, segmentation=[]), thing(2, segmentation=None)]
    coco = read_coco(written(tmp_path, content([(48, 64)], annotations=annotations)), tmp_path)
    batch = batches(coco, 1, batch_size=1, micro_batch=1)[0]
    assert "masks" not in batch and "boxes" in batch


def test_images_without_objects_have_room_for_one(tmp_path: Path) -> None:
    coco = read_coco(written(tmp_path, content([(48, 64)] * 2)), tmp_path)
    batch = batches(coco, 1, batch_size=2, micro_batch=2)[0]
    assert batch["labels"].tolist() == [[-1], [-1]] and batch["boxes"].shape == (2, 1, 4)


@pytest.mark.parametrize(
    ("world_size", "batch_size", "workers"), [(1, 4, 0), (1, 3, 2), (3, 2, 0), (40, 1, 0)]
)
def test_evaluation_sees_every_image_once(
    folder: Path, world_size: int, batch_size: int, workers: int
) -> None:
    coco = read_coco(folder / "instances.json", folder)
    options = {"batch_size": batch_size, "world_size": world_size}
    parts = [
        batch
        for rank in range(world_size)
        for batch in eval_loader(coco, config(workers=workers), rank=rank, **options)
    ]
    assert sorted(torch.cat([part["index"] for part in parts]).tolist()) == list(range(len(SIZES)))
    assert (
        all(part["readable"].all() for part in parts)
        and max(len(part["index"]) for part in parts) <= batch_size
    )
    for part in parts:
        assert (part["original"].numpy() == coco.sizes[part["index"]]).all()
        for pixels, size, original in zip(part["images"], part["sizes"], part["original"], strict=True):
            height, width = size.tolist()
            factor = min(64 / int(original.min()), 96 / int(original.max()))
            assert np.abs(np.array(original.tolist()) * factor - [height, width]).max() <= 0.5
            assert (pixels[:, height:] == 0).all() and (pixels[:, :, width:] == 0).all()
    alone = {int(i): tuple(part["images"].shape[2:]) for part in parts for i in part["index"]}
    others = {
        int(i): tuple(part["images"].shape[2:])
        for part in eval_loader(coco, config(), batch_size=21)
        for i in part["index"]
    }
    assert alone == others and len(set(alone.values())) <= len(paddings(SCALE))


def test_what_cannot_be_read_is_told_and_marked(tmp_path: Path) -> None:
    coco = read_coco(written(tmp_path, content([(48, 64)] * 3)), tmp_path)
    (tmp_path / "2.png").unlink()
    heard: list[str] = []
    (batch,) = eval_loader(coco, config(), batch_size=4, on_bad=lambda error: heard.append(error.path.name))
    assert heard == ["2.png"] and batch["readable"].tolist() == [True, False, True]
    assert (
        batch["images"][1].max() == 0 < batch["images"][0].max()
        and batch["original"].tolist() == [[48, 64]] * 3
    )


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 4), (3, 2)])
def test_a_bar_knows_how_many_batches_there_are(
    coco: Coco, world_size: int, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, int | None]] = []

    def watched(items: Iterable[Any], description: str, total: int | None = None) -> Iterable[Any]:
        told.append((description, total))
        return items

    monkeypatch.setattr("itpn.data.detection.watched", watched)
    options = {"batch_size": batch_size, "world_size": world_size}
    for rank in range(world_size):
        batches = list(eval_loader(coco, config(), rank=rank, progress="testing", **options))
        assert told.pop() == ("testing", len(batches))
    list(eval_loader(coco, config(), **options))
    assert not told, "beside a run's live line there is no bar"


def test_a_share_is_held_out_where_there_is_no_val(folder: Path, tmp_path: Path) -> None:
    own = config(root=tmp_path, train_images=folder, train_annotations=folder / "instances.json")
    train, val = find_splits(own, 0.2)
    every, _ = find_splits(replace(own, empty_images=True), 0.2)
    whole = find_objects(replace(own, empty_images=True), "train")
    ids, held_out = every.image_ids.tolist(), val.image_ids.tolist()
    assert (len(ids), len(held_out)) == (17, 4)
    assert sorted(ids + held_out) == whole.image_ids.tolist()
    assert train.image_ids.tolist() == [number for number in ids if number not in (5, 6)]
    assert val.description.startswith("4 of 21 images") and "held out for validation" in val.description
    for part in (train, val):
        for place, number in enumerate(part.image_ids.tolist()):
            there = whole.objects.of(number - 1)
            assert part.objects.boxes[part.objects.of(place)].tolist() == whole.objects.boxes[there].tolist()
    again = find_validation(own, 0.2)
    assert again.fingerprint == val.fingerprint != find_validation(own, 0.4).fingerprint


def test_nothing_is_held_out_where_there_is_something_to_validate_on(folder: Path, tmp_path: Path) -> None:
    file = folder / "instances.json"
    own = config(root=tmp_path, train_images=folder, train_annotations=file)
    named = replace(own, val_images=folder, val_annotations=file)
    assert [len(part) for part in find_splits(named, 0.2)] == [19, 21]
    with pytest.raises(UserError, match=r"--data\.val-annotations"):
        find_splits(replace(own, val_images=folder), 0.2)
    (tmp_path / "val2017").mkdir()
    with pytest.raises(UserError, match=r"instances_val2017\.json"):
        find_splits(own, 0.2)


def test_of_a_single_class_is_the_same_as_a_file_with_one_category(folder: Path, tmp_path: Path) -> None:
    said = json.loads((folder / "instances.json").read_text())
    merged = said | {
        "categories": [{"id": 1, "name": "object"}],
        "annotations": [each | {"category_id": 1} for each in said["annotations"]],
    }
    (tmp_path / "merged.json").write_text(json.dumps(merged))
    for split in ("train", "val"):
        classes, single, expected = (
            find_objects(
                config(**{f"{split}_images": folder, f"{split}_annotations": file}, **options), split
            )
            for file, options in (
                (folder / "instances.json", {}),
                (folder / "instances.json", {"single_class": True}),
                (tmp_path / "merged.json", {}),
            )
        )
        assert single.categories == expected.categories == ((1, "object"),) != classes.categories
        assert single.fingerprint == expected.fingerprint != classes.fingerprint


def test_splits_are_found_by_the_config(folder: Path, tmp_path: Path) -> None:
    file = folder / "instances.json"
    own = config(train_images=folder, train_annotations=file, val_images=folder, val_annotations=file)
    assert (len(find_objects(own, "train")), len(find_objects(own, "val"))) == (19, 21)
    every = config(train_images=folder, train_annotations=file, empty_images=True)
    assert len(find_objects(every, "train")) == 21
    with pytest.raises(UserError, match=r"there is no .*val2017"):
        find_objects(config(root=tmp_path), "val")
    things = [thing(i, category_id=3 if i else 99) for i in range(10)]
    bad = written(tmp_path, content([(48, 64)], annotations=things))
    with pytest.raises(
        UserError, match=r"1 of 10 annotations of .* cannot be used, more than data.max_bad_share"
    ):
        find_objects(config(train_images=tmp_path, train_annotations=bad), "train")
    lenient = config(train_images=tmp_path, train_annotations=bad, max_bad_share=0.1)
    assert len(find_objects(lenient, "train").objects) == 9


@pytest.mark.parametrize("fields", [{"mask_size": 0}, {"max_bad_share": 2}, {"workers": -1}])
def test_settings_out_of_range_are_named(fields: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"data.{next(iter(fields))}"):
        DetectionDataConfig(**fields)


def test_a_file_without_objects_is_an_error_until_there_are_some(tmp_path: Path) -> None:
    own = config(root=tmp_path, train_images=tmp_path, train_annotations=tmp_path / "instances.json")
    for empty_images in (False, True):
        written(tmp_path, content([(48, 64)] * 4))
        with pytest.raises(UserError, match=r"instances\.json has no object to learn from; annotate some"):
            find_splits(replace(own, empty_images=empty_images), 0.25)
    written(tmp_path, content([(48, 64)] * 4, annotations=[thing(i, i) for i in range(1, 5)]))
    assert [len(part) for part in find_splits(own, 0.25)] == [3, 1]


def test_objects_that_are_all_held_out_are_an_error_with_a_cure(tmp_path: Path) -> None:
    own = config(root=tmp_path, train_images=tmp_path, train_annotations=tmp_path / "instances.json")
    written(tmp_path, content([(48, 64)] * 4, annotations=[thing(1, 1)]))
    held_out = find_validation_names(own, tmp_path)
    written(tmp_path, content([(48, 64)] * 4, annotations=[thing(1, held_out)]))
    with pytest.raises(
        UserError, match=r"all images with objects of .* are held out for validation; annotate"
    ):
        find_splits(own, 0.25)
    named = replace(own, val_images=tmp_path, val_annotations=tmp_path / "instances.json")
    assert [len(part) for part in find_splits(named, 0.25)] == [1, 4]


def find_validation_names(own: DetectionDataConfig, folder: Path) -> int:
    """The id of the only image that is held out of four."""
    written(folder, content([(48, 64)] * 4, annotations=[thing(i, i) for i in range(1, 5)]))
    return int(find_validation(own, 0.25).image_ids[0])


def test_a_file_listed_twice_is_not_in_both_halves(tmp_path: Path) -> None:
    data = content([(48, 64)] * 6, annotations=[thing(i, i) for i in range(1, 12)])
    file = written(tmp_path, data)
    data["images"] += [image | {"id": image["id"] + 6} for image in data["images"]]
    file.write_text(json.dumps(data))
    own = config(root=tmp_path, train_images=tmp_path, train_annotations=file)
    train, val = find_splits(own, 0.4)
    halves = [{part.names[i] for i in range(len(part))} for part in (train, val)]
    assert not halves[0] & halves[1] and len(halves[0] | halves[1]) == 6
    assert "6 entries of 'images' name a file" in train.notes[0] and not val.notes


def test_images_to_train_and_to_validate_on_that_are_the_same_are_told(tmp_path: Path) -> None:
    data = content([(48, 64)] * 3, annotations=[thing(i, i) for i in range(1, 4)])
    file = written(tmp_path / "train", data)
    (tmp_path / "val").mkdir()
    (tmp_path / "val/a.png").symlink_to(tmp_path / "train/2.png")
    Image.new("RGB", (64, 48)).save(tmp_path / "val/b.png")
    data["images"] = [{"id": i, "file_name": f"{'ab'[i - 1]}.png", "height": 48, "width": 64} for i in (1, 2)]
    other = tmp_path / "val.json"
    other.write_text(json.dumps(data | {"annotations": [thing(1)]}))
    own = config(
        train_images=tmp_path / "train",
        train_annotations=file,
        val_images=tmp_path / "val",
        val_annotations=other,
    )
    (note,) = find_splits(own, 0.1)[0].notes
    assert note.startswith(f"1 images of {file} are in {other}, too, such as {tmp_path / 'train/2.png'}")
    data["images"].pop(0)
    other.write_text(json.dumps(data | {"annotations": [thing(1, 2)]}))
    assert not find_splits(own, 0.1)[0].notes


def test_too_many_bad_annotations_are_an_error_that_says_why(tmp_path: Path) -> None:
    things = [thing(i, category_id=i % 2 or 3) for i in range(6)]
    file = written(tmp_path, content([(48, 64)], annotations=things))
    with pytest.raises(
        UserError, match=r"such as annotation 1 \(1\.png\): category_id: no such category, 1; "
    ):
        find_objects(config(train_images=tmp_path, train_annotations=file), "train")
