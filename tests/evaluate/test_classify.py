import math
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_confusion_matrix,
)

from itpn.data.images import find_images
from itpn.data.source import Images
from itpn.errors import UserError
from itpn.evaluate.classify import Predictions, Report, predict, report, scores
from itpn.evaluate.gather import Pass

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Images:
    """Eleven images in three classes; one of them cannot be read."""
    root, rng = tmp_path_factory.mktemp("classify"), np.random.default_rng(0)
    for label, count in enumerate((4, 2, 5)):
        (root / f"class {label}").mkdir()
        for i in range(count):
            pixels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"class {label}/{i}.png")
    (root / "class 1/0.png").write_bytes(b"no image")
    return find_images(root)


def toy_logits(images: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3 * 16 * 32, 3, generator=generator)
    return (images.flatten(1) / 255 - 0.5) @ weight / 10


def predicted(images: Images, batch_size: int = 4, **ranks: int) -> Predictions:
    through = Pass(
        image_size=(16, 32), crop_ratio=0.9, device=CPU, workers=0, on_bad=lambda bad: None, **ranks
    )
    return predict(toy_logits, images, batch_size, through)


def drawn(num_images: int, num_classes: int, seed: int = 0) -> Predictions:
    """Every class has images, and about half of the answers are right."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_images) % num_classes
    logits = torch.randn(num_images, num_classes, generator=generator)
    logits[torch.arange(num_images), labels] += 2
    return Predictions(torch.arange(num_images), labels, logits)


def reported(predictions: Predictions) -> Report:
    return report(predictions, [f"class {label}" for label in range(predictions.logits.shape[1])])


def test_every_image_is_predicted_once_and_in_order(images: Images) -> None:
    whole = predicted(images)
    assert whole.index.tolist() == list(range(11))
    assert whole.labels.tolist() == [0, 0, 0, 0, -1, 1, 2, 2, 2, 2, 2]
    assert whole.logits.shape == (11, 3) and whole.logits.dtype == torch.float32
    single = predicted(images, batch_size=1)
    assert torch.allclose(whole.logits, single.logits, atol=1e-5)
    assert len(whole.logits.unique(dim=0)) == 11


def run_rank(rank: int, images: Images, store: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}/group", rank=rank, world_size=2)
    whole = predicted(images, rank=rank, world_size=2)  # 6 and 5 images in batches of 4: both end ragged
    np.savez(store / f"{rank}.npz", index=whole.index, labels=whole.labels, logits=whole.logits)
    dist.destroy_process_group()


def test_two_ranks_agree_with_one(images: Images, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=run_rank, args=(rank, images, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    one = predicted(images)
    of_ranks = [
        Predictions(*(torch.from_numpy(saved[name]) for name in ("index", "labels", "logits")))
        for saved in (np.load(tmp_path / f"{rank}.npz") for rank in range(2))
    ]
    assert torch.equal(of_ranks[0].logits, of_ranks[1].logits)
    for two in of_ranks:
        assert torch.equal(two.index, one.index) and torch.equal(two.labels, one.labels)
        assert (two.logits - one.logits).abs().max() < 1e-5
        assert torch.equal(reported(two).confusion, reported(one).confusion)
        assert scores(reported(two)) == pytest.approx(scores(reported(one)), abs=1e-5)


def test_more_ranks_than_images_is_an_error(images: Images) -> None:
    with pytest.raises(UserError, match="use fewer ranks"):
        predicted(images, world_size=12)


@pytest.mark.parametrize(("num_images", "num_classes"), [(500, 7), (64, 2), (60, 30), (9, 1)])
def test_numbers_agree_with_torchmetrics(num_images: int, num_classes: int) -> None:
    predictions = drawn(num_images, num_classes)
    found = reported(predictions)
    labels, logits = predictions.labels, predictions.logits
    assert found.loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)))
    if num_classes == 1:
        assert (found.top1, found.top5, found.class_top1, found.ece) == (1, 1, 1, 0)
        return
    for top, ours in ((1, found.top1), (min(5, num_classes), found.top5)):
        theirs = multiclass_accuracy(logits, labels, num_classes, average="micro", top_k=top)
        assert ours == pytest.approx(float(theirs), abs=1e-6)
    by_class = multiclass_accuracy(logits, labels, num_classes, average=None)
    assert [result.top1 for result in found.classes] == pytest.approx(by_class.tolist(), abs=1e-6)
    assert found.class_top1 == pytest.approx(float(by_class.mean()), abs=1e-6)
    assert torch.equal(found.confusion, multiclass_confusion_matrix(logits, labels, num_classes))
    ece = multiclass_calibration_error(logits, labels, num_classes, n_bins=15, norm="l1")
    assert found.ece == pytest.approx(float(ece), abs=1e-6)
    assert 0.2 < found.top1 < 1 and found.ece > 0.01


def test_bins_hold_every_image_and_also_full_confidence() -> None:
    logits = torch.tensor([[200.0, 0.0], [0.0, 0.0], [200.0, 0.0]])
    found = reported(Predictions(torch.arange(3), torch.tensor([0, 0, 1]), logits))
    assert found.reliability[:, 0].nonzero().flatten().tolist() == [7, 14]
    assert found.reliability[7].tolist() == [1, 0.5, 1]
    assert found.reliability[14].tolist() == [2, 1, 0.5]
    assert found.ece == pytest.approx((1 * 0.5 + 2 * 0.5) / 3)


def test_each_class_has_its_row() -> None:
    truth = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    answers = torch.tensor([0, 2, 2, 1, 1, 0, 0])
    found = reported(Predictions(torch.arange(7), truth, 9.0 * torch.eye(4)[answers]))
    assert found.classes[0] == ("class 0", 3, pytest.approx(1 / 3), "class 2", 2)
    assert found.classes[1] == ("class 1", 4, 0.5, "class 0", 2)
    empty = found.classes[3]
    assert (empty.images, empty.confusion, empty.confused) == (0, "", 0) and math.isnan(empty.top1)
    assert found.class_top1 == pytest.approx((1 / 3 + 0.5) / 2)
    assert found.top1 == pytest.approx(3 / 7)


def test_images_of_one_class_are_no_measure_of_accuracy() -> None:
    logits = 9.0 * torch.eye(3)[[1, 1, 1]]
    found = reported(Predictions(torch.arange(3), torch.tensor([1, 1, 1]), logits))
    assert scores(found).keys() == {"val_loss", "val_ece"}
    found = reported(Predictions(torch.arange(3), torch.tensor([1, 1, 2]), logits))
    assert scores(found)["val_top1"] == pytest.approx(2 / 3)


def test_unreadable_images_count_as_wrong() -> None:
    whole = drawn(40, 4)
    labels = whole.labels.where(torch.arange(40) >= 10, -1)
    found = reported(Predictions(whole.index, labels, whole.logits))
    rest = reported(Predictions(whole.index[10:], whole.labels[10:], whole.logits[10:]))
    assert (found.images, found.unreadable) == (40, 10)
    assert found.top1 == pytest.approx(rest.top1 * 30 / 40)
    assert found.top5 == pytest.approx(30 / 40)
    assert (found.loss, found.ece, found.classes) == (rest.loss, rest.ece, rest.classes)


def test_what_cannot_be_measured_is_said() -> None:
    some = drawn(6, 3)
    with pytest.raises(UserError, match="has 3 classes, but the images have 2 class names"):
        report(some, ["a", "b"])
    with pytest.raises(
        UserError, match="has 3 classes, but the images have 3 class names and labels up to 4"
    ):
        report(Predictions(some.index, some.labels + 2, some.logits), ["a", "b", "c"])
    with pytest.raises(UserError, match="nothing to evaluate"):
        reported(Predictions(some.index, torch.full((6,), -1), some.logits))
    with pytest.raises(UserError, match="not finite for 1 of 6 images"):
        logits = some.logits.clone()
        logits[2, 1] = math.nan
        reported(Predictions(some.index, some.labels, logits))
