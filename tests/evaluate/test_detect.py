"""Average precision against pycocotools, with crowds, images that are empty, and several ranks."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from itpn.data.coco import Coco
from itpn.data.coco_file import read_coco
from itpn.data.masks import drawn, run_lengths
from itpn.data.sample_cutouts import load_cutouts
from itpn.data.sample_scenes import coco_annotations, compose
from itpn.errors import UserError
from itpn.evaluate.detect import (
    Kind,
    Result,
    average_precision,
    gathered,
    results_of,
    table,
    to_original,
    write_results,
)
from itpn.tasks.objects import numbers_of
from tests.data.coco import content, thing, written

KINDS: tuple[Kind, ...] = ("box", "mask")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Coco:
    """Forty sample scenes: every seventh is empty, every fifth object is a crowd, some masks are polygons."""
    folder = tmp_path_factory.mktemp("scenes")
    cutouts = load_cutouts("val")
    classes = range(max(cutout.label for cutout in cutouts) + 1)
    by_label = [[cutout for cutout in cutouts if cutout.label == label] for label in classes]
    sizes, annotations = [], []
    for image in range(1, 41):
        scene = compose(by_label, np.random.default_rng([5, image]))
        sizes.append(scene.image.size[::-1])
        if image % 7:
            annotations += coco_annotations(scene, image, len(annotations))
    for number, annotation in enumerate(annotations):
        annotation["iscrowd"] = int(number % 5 == 0)
        if number % 3 == 1:
            x, y, w, h = annotation["bbox"]
            annotation["segmentation"] = [[x, y + h / 2, x + w / 2, y, x + w, y + h / 2, x + w / 2, y + h]]
        if number % 11 == 0:
            annotation["area"] *= 8  # large ones too
    categories = [{"id": label + 1, "name": f"class {label}"} for label in classes]
    file = written(folder, content(sizes, annotations=annotations, categories=categories))
    coco = read_coco(file, folder)
    assert not coco.findings and coco.objects.crowd.any() and (coco.objects.counts() == 0).any()
    return coco


def found(coco: Coco, seed: int) -> list[Result]:
    """Objects moved, classes mistaken, scores with ties; also where nothing is, or more than a hundred."""
    rng = np.random.default_rng(seed)
    results = []
    for index in range(len(coco)):
        H, W = coco.size(index)
        boxes, labels, masks = [], [], []
        for number in [*coco.objects.of(index)] * (30 if index == 3 else 3):
            outline = coco.objects.outline(number)
            assert outline is not None
            x, y, w, h = coco.objects.boxes[number] + rng.normal(0, 3, 4)
            boxes.append([x, y, x + max(w, 1), y + max(h, 1)])
            wrong = rng.random() < 0.2
            labels.append(int(rng.integers(len(coco.categories)) if wrong else coco.objects.labels[number]))
            masks.append(torch.from_numpy(np.roll(drawn(outline, (H, W)), rng.integers(-4, 5, 2), (0, 1))))
        if index % 7 == 6:
            boxes, labels, masks = [[1.0, 2.0, 30.0, 40.0]], [0], [torch.ones(H, W, dtype=torch.bool)]
        scores = torch.from_numpy(rng.integers(0, 50, len(boxes)) / 50)
        tensors = torch.tensor(boxes).view(-1, 4), scores, torch.tensor(labels, dtype=torch.long)
        results += results_of(coco, index, *tensors, masks)
    return results


def reference(coco: Coco, results: list[Result], kind: Kind) -> COCOeval:
    # Else pycocotools would take 0 for no annotation; and, with a mask, the area of the box.
    data = json.loads(coco.file.read_text())
    for number, annotation in enumerate(data["annotations"], 1):
        annotation["id"] = number
    left_out = "bbox" if kind == "mask" else "segmentation"
    results = [{name: value for name, value in result.items() if name != left_out} for result in results]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = data
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "segm" if kind == "mask" else "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_all_numbers_are_those_of_pycocotools(scenes: Coco, kind: Kind, seed: int) -> None:
    results = found(scenes, seed)
    scores, evaluation = average_precision(scenes, results, kind), reference(scenes, results, kind)
    ours = np.array(list(scores.overall.values()))
    assert len(ours) == 12 and np.abs(ours - evaluation.stats).max() < 1e-6
    assert 0.1 < scores.overall["AP"] < 0.9 and len(set(ours.tolist())) > 9
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]
    assert [category for category, _ in scores.by_class] == list(scenes.categories)
    for label, (_, numbers) in enumerate(scores.by_class):
        expected = {
            "AP": precision[:, :, label, 0, 2],
            "AP50": precision[0, :, label, 0, 2],
            "AP75": precision[5, :, label, 0, 2],
            "APl": precision[:, :, label, 3, 2],
            "AR1": recall[:, label, 0, 0],
            "ARs": recall[:, label, 1, 2],
        }
        for name, values in expected.items():
            known = values[values > -1]
            assert abs(numbers[name] - (known.mean() if len(known) else -1)) < 1e-6
    metrics = scores.metrics()
    assert metrics[f"{kind}_AP50"] == scores.overall["AP50"] and len(metrics) == 12


@pytest.mark.parametrize("kind", KINDS)
def test_finding_all_is_one_and_finding_nothing_zero(scenes: Coco, kind: Kind) -> None:
    perfect = []
    for index in range(len(scenes)):
        objects = scenes.objects
        numbers = [number for number in objects.of(index) if not objects.crowd[number]]
        boxes = torch.from_numpy(objects.boxes[numbers])
        boxes[:, 2:] += boxes[:, :2]
        if kind == "mask":
            numbers = [n for n in numbers if not isinstance(objects.outline(n), list)]  # drawn another way
            boxes = boxes[: len(numbers)]
        masks = [torch.from_numpy(drawn(objects.outline(n), scenes.size(index))) for n in numbers]  # type: ignore[arg-type]
        labels = torch.from_numpy(objects.labels[numbers])
        perfect += results_of(scenes, index, boxes, torch.ones(len(boxes)), labels, masks)
    scores = average_precision(scenes, perfect, kind).overall
    assert scores["AP"] == pytest.approx(1) if kind == "box" else scores["AP"] > 0.5
    assert set(average_precision(scenes, [], kind).overall.values()) == {0.0}


def test_ranks_put_together_what_one_finds(scenes: Coco) -> None:
    results = found(scenes, 0)
    by_image = {
        number: [r for r in results if r["image_id"] == number] for number in scenes.image_ids.tolist()
    }
    ranks: list[list[Result]] = [[], []]
    for place, some in enumerate(reversed(by_image.values())):
        ranks[place % 2] += some
    asked: list[Any] = []

    def gather(value: Any) -> list[Any]:
        asked.append(json.loads(json.dumps(value)))
        return ranks

    together = gathered(ranks[1], gather)
    assert asked == [ranks[1]] and together == gathered(results, lambda value: [value])
    for kind in KINDS:
        assert average_precision(scenes, together, kind) == average_precision(scenes, results, kind)


def test_boxes_go_back_to_the_pixels_of_the_file() -> None:
    boxes = torch.tensor([[0.0, 0.0, 100.0, 50.0], [10.0, 5.0, 20.0, 25.0]])
    original = to_original(boxes, torch.tensor([50, 100]), torch.tensor([200, 300]))
    assert original.tolist() == [[0, 0, 300, 200], [30, 20, 60, 100]]


def test_what_lies_on_an_object_without_a_mask_is_not_wrong(tmp_path: Path) -> None:
    annotations = [thing(1), thing(2, 2, segmentation=[])]
    file = written(tmp_path, content([(48, 64), (48, 64)], annotations=annotations))
    coco = read_coco(file, tmp_path)
    mask = drawn(coco.objects.outline(0), (48, 64))  # type: ignore[arg-type]
    boxes = torch.tensor([[10.0, 10.0, 30.0, 40.0]])
    one, label = torch.ones(1), torch.zeros(1, dtype=torch.long)
    results = [r for i in (0, 1) for r in results_of(coco, i, boxes, one, label, [torch.from_numpy(mask)])]
    assert all(average_precision(coco, results, kind).overall["AP"] == pytest.approx(1) for kind in KINDS)
    assert average_precision(coco, results[:1], "box").overall["AR100"] == 0.5


def test_results_are_cocos_and_the_table_shows_them(scenes: Coco, tmp_path: Path) -> None:
    results = found(scenes, 1)
    write_results(tmp_path / "results.json", results)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    first = results[0]
    assert set(first) == {"image_id", "category_id", "bbox", "score", "segmentation"}
    assert first["segmentation"]["size"] == list(scenes.size(0)) and len(first["bbox"]) == 4
    assert isinstance(first["segmentation"]["counts"], str)
    with pytest.raises(UserError, match=r"cannot write .*: No such file"):
        write_results(tmp_path / "none" / "results.json", results)
    scores = [average_precision(scenes, results, kind) for kind in KINDS]
    lines = table(scores).splitlines()
    assert lines[0].split() == ["box", *scores[0].overall] and len({len(line) for line in lines if line}) == 1
    assert lines[1].split()[-12:] == [f"{100 * value:.1f}" for value in scores[0].overall.values()]
    assert len(lines) == 2 * (2 + len(scenes.categories)) + 1 and max(map(len, lines)) < 110


def test_run_lengths_of_nothing_are_evaluated(scenes: Coco) -> None:
    empty = torch.zeros(scenes.size(0), dtype=torch.bool)
    results = results_of(
        scenes, 0, torch.tensor([[1.0, 1, 9, 9]]), torch.ones(1), torch.zeros(1).long(), [empty]
    )
    assert run_lengths(empty.numpy()).tolist() == [empty.numel()]
    assert average_precision(scenes, results, "mask").overall["AP"] == 0


def test_without_objects_to_find_there_is_no_number(tmp_path: Path) -> None:
    """Also where something is found, as on a crowd."""
    crowd = content([(48, 64), (48, 64)], annotations=[thing(1, iscrowd=1)])
    coco = read_coco(written(tmp_path, crowd), tmp_path)
    found: Result = {"image_id": 2, "category_id": 3, "bbox": [1, 1, 5, 5], "score": 0.5}
    for results in ([], [found]):
        assert numbers_of([average_precision(coco, results, "box")]) == {}
