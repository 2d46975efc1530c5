"""The confusion matrix against loops, scores against torchmetrics, and a toy that learns by heart."""

import math
import multiprocessing
from collections.abc import Iterable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from itpn.data.segmentation import SegmentationDataConfig, find_labelled, train_crops
from itpn.errors import UserError
from itpn.evaluate.segment import (
    SegmentationScores,
    confusion,
    evaluate_segmentation,
    summed_up,
    table,
)
from itpn.heads.windows import InferenceConfig
from tests.data.segmented import COLOURS, write_masks, write_pair
from tests.heads.test_segment import toy_segmenter

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
CPU = torch.device("cpu")


def drawn(seed: int, num_classes: int, unlabelled: bool = True) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, (3, 11, 13)).astype(np.uint8)
    if unlabelled:
        labels[rng.random(labels.shape) < 0.2] = 255
    return torch.from_numpy(labels), torch.from_numpy(rng.integers(0, num_classes, labels.shape))


def test_a_bar_knows_how_many_images_a_rank_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_masks(tmp_path, {"val": 5})
    config = SegmentationDataConfig(root=root, format="masks", short=40, long=160, workers=0)
    told: list[tuple[str, int | None]] = []
    seen: list[int] = []

    def watched(items: Iterable[Any], description: str, total: int | None = None) -> Iterable[Any]:
        told.append((description, total))
        for item in items:
            seen.append(1)
            yield item

    monkeypatch.setattr("itpn.evaluate.segment.watched", watched)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: None)
    for rank in range(2):
        evaluate_segmentation(
            lambda images, size: torch.zeros(1, *size, dtype=torch.long),
            find_labelled(config, "val"),
            config,
            device=CPU,
            rank=rank,
            world_size=2,
            progress="testing",
        )
        assert told.pop() == ("testing", len(seen))
        seen.clear()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 30))
def test_the_confusion_matrix_by_loops(seed: int, num_classes: int) -> None:
    labels, predicted = drawn(seed, num_classes)
    expected = np.zeros((num_classes, num_classes), int)
    for truth, said in zip(labels.flatten().tolist(), predicted.flatten().tolist(), strict=True):
        if truth != 255:
            expected[truth, said] += 1
    assert np.array_equal(confusion(labels, predicted, num_classes).numpy(), expected)
    wide = torch.where(labels == 255, 65_535, labels.int())
    assert np.array_equal(confusion(wide, predicted, num_classes).numpy(), expected)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 12), st.integers(0, 3))
def test_scores_are_torchmetrics(seed: int, num_classes: int, num_absent: int) -> None:
    """Also where classes are neither there nor predicted, which count in no mean."""
    labels, predicted = drawn(seed, num_classes)
    total = num_classes + num_absent
    found = summed_up(confusion(labels, predicted, total), [str(i) for i in range(total)], 3)
    labels = labels.long()
    jaccard = partial(MulticlassJaccardIndex, total, ignore_index=255)
    accuracy = partial(MulticlassAccuracy, total, ignore_index=255)
    assert found.miou == pytest.approx(jaccard()(predicted, labels).item(), abs=1e-6)
    assert found.pixel_accuracy == pytest.approx(
        accuracy(average="micro")(predicted, labels).item(), abs=1e-6
    )
    per_class = accuracy(average=None)(predicted, labels)
    there = labels[labels != 255].bincount(minlength=total) > 0
    assert found.mean_accuracy == pytest.approx(per_class[there].mean().item(), abs=1e-6)
    for row, iou in zip(found.classes, jaccard(average="none")(predicted, labels).tolist(), strict=True):
        assert math.isnan(row.iou) or row.iou == pytest.approx(iou, abs=1e-6)
    assert [math.isnan(row.iou) for row in found.classes[num_classes:]] == [True] * num_absent


def test_scores_by_hand() -> None:
    """Class c is never there but said once; d is neither."""
    found = summed_up(torch.tensor([[6, 0, 2, 0], [1, 3, 0, 0], [0] * 4, [0] * 4]), "abcd", 1)
    assert found.miou == pytest.approx((6 / 9 + 3 / 4 + 0 / 2) / 3)
    assert found.pixel_accuracy == found.mean_accuracy == 0.75
    assert found.numbers() == {"miou": found.miou, "pixel_accuracy": 0.75, "mean_accuracy": 0.75}
    assert [row.num_pixels for row in found.classes] == [8, 4, 0, 0] and math.isnan(found.classes[2].accuracy)
    lines = table(found).splitlines()
    assert lines[0] == (
        "mIoU 47.22% over 3 of 4 classes, pixel accuracy 75.00%, mean accuracy 75.00% on 1 images"
    )
    assert [line.split() for line in lines[2:]] == [
        ["a", "66.7%", "75.0%", "66.67%"], ["b", "75.0%", "75.0%", "33.33%"],
        ["c", "0.0%", "-", "0.00%"], ["d", "-", "-", "0.00%"],
    ]  # fmt: skip


@pytest.mark.parametrize("matrix", [[[8, 0], [0, 0]], [[6, 2], [0, 0]], [[0, 0], [0, 0]]])
def test_labels_of_one_class_or_none_are_no_measure(matrix: list[list[int]]) -> None:
    found = summed_up(torch.tensor(matrix), "ab", 1)
    assert found.numbers() == {} and all(math.isnan(number) for number in found.overall.values())
    said = table(found)
    assert said.startswith(
        "nothing can be measured, since the labels are of fewer than two classes, on 1 images"
    )
    assert "nan" not in said


def test_names_are_printed_without_escape_codes() -> None:
    odd = table(summed_up(torch.eye(1), ["tab\t\x1b[31m"], 1, num_left_out=2))
    assert "\x1b" not in odd and "2 left out" in odd


def config_of(root: Path, **options) -> SegmentationDataConfig:
    toy = {"format": "masks", "short": 64, "long": 256, "crop": (64, 64), "workers": 0}
    return SegmentationDataConfig(root=root, **toy | options)


def by_colour(images: Tensor, size: tuple[int, int]) -> Tensor:
    """The class whose colour is nearest, but never yellow."""
    pixels = torch.nn.functional.interpolate(images.float(), size, mode="nearest-exact")
    colours = torch.from_numpy(COLOURS[:3]).float()
    return (pixels[:, None] - colours[:, :, None, None]).square().sum(2).argmin(1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_masks(tmp_path_factory.mktemp("masks"), {"train": 8, "val": 5}, size=(64, 64))


def evaluated(root: Path, **ranks) -> SegmentationScores:
    config = config_of(root)
    return evaluate_segmentation(by_colour, find_labelled(config, "val"), config, device=CPU, **ranks)


def test_every_labelled_pixel_is_counted_once_at_its_own_size(root: Path) -> None:
    """Of a data set and of one where an image is larger: a mean over images would differ."""
    found = evaluated(root)
    images = find_labelled(config_of(root), "val")
    truth = np.concatenate([images.pair(i)[1].ravel() for i in range(5)])
    assert sum(row.num_pixels for row in found.classes) == (truth != 255).sum() == 5 * 64 * 63
    assert [row.iou for row in found.classes[1:]] == [1.0, 1.0, 0.0]  # yellow is taken for red
    red, yellow = (truth == 0).sum(), (truth == 3).sum()
    assert found.classes[0].iou == pytest.approx(red / (red + yellow))
    assert found.miou == pytest.approx((2 + red / (red + yellow)) / 4)
    assert (found.num_images, found.num_left_out) == (5, 0)


def evaluate_on_rank(rank: int, root: Path, store: Path, results: "multiprocessing.Queue[object]") -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}/group", rank=rank, world_size=3)
    results.put(evaluated(root, rank=rank, world_size=3))
    dist.destroy_process_group()


def test_ranks_count_each_image_once_and_agree(root: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [
        context.Process(target=evaluate_on_rank, args=(rank, root, tmp_path, results)) for rank in range(3)
    ]
    for process in ranks:
        process.start()
    found = [results.get(timeout=120) for _ in ranks]
    for process in ranks:
        process.join()
    assert found == [evaluated(root)] * 3


def test_what_cannot_be_used_is_an_error_or_left_out_and_counted(root: Path, tmp_path: Path) -> None:
    bad = write_masks(tmp_path / "bad", {"val": 3}, size=(64, 64))
    write_pair(bad, "val", "01", np.zeros((8, 8), np.uint8), np.full((8, 8), 99, np.uint8))
    config = config_of(bad)
    with pytest.raises(UserError, match=r"01\.png: labels 99 are no class"):
        evaluate_segmentation(by_colour, find_labelled(config, "val"), config, device=CPU)
    config = config_of(bad, skip_bad=True)
    found = evaluate_segmentation(by_colour, find_labelled(config, "val"), config, device=CPU)
    assert (found.num_images, found.num_left_out) == (2, 1)
    many = config_of(root, names=root / "many")
    (root / "many").write_text("\n".join(map(str, range(9000))))
    with pytest.raises(UserError, match="9,000 classes are too many"):
        images = find_labelled(config_of(root, names=root / "many", ignored=65_535), "val")
        evaluate_segmentation(by_colour, images, many, device=CPU)


def test_a_toy_learns_eight_images_by_heart(root: Path) -> None:
    config = config_of(root, ratio=(1.0, 1.0), brightness=0, contrast=0, saturation=0, hue=0)
    images = find_labelled(config, "train")
    objective = toy_segmenter(num_classes=4, width=32)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    batches = train_crops(images, config, draw=objective.draw, seed=0, batch_size=8, micro_batch=8)
    before = evaluate(objective, root)
    losses = []
    for batch in islice(batches, 60):
        outputs = objective({name: batch[name] for name in ("images", "labels")})
        optimizer.zero_grad()
        outputs["loss"].backward()
        optimizer.step()
        losses.append(outputs["loss"].item())
    after = evaluate(objective, root)
    assert before.miou < 0.3 and after.miou > 0.9 and after.pixel_accuracy > 0.9, (before.miou, after.miou)
    assert losses[-1] < 0.5 * losses[0]


def evaluate(objective: torch.nn.Module, root: Path) -> SegmentationScores:
    """On the training images."""
    config = config_of(root)
    images = find_labelled(config, "train")
    segment = partial(objective.eval().segment, inference=InferenceConfig(crop=(64, 64), stride=(43, 43)))
    found = evaluate_segmentation(segment, images, config, device=CPU)
    objective.train()
    return found
