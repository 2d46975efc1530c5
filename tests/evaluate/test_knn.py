import math
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from itpn.data.images import ImageList, find_images
from itpn.data.loader import eval_loader
from itpn.errors import UserError
from itpn.evaluate import knn as module
from itpn.evaluate.gather import Pass, gathered
from itpn.evaluate.knn import KnnConfig, knn, knn_votes

CLASSES = 7
CPU = torch.device("cpu")


def write(folder: Path, count: int, rng: np.random.Generator, spread: int = 250) -> None:
    """Images of one colour per class, scattered so widely that the classes overlap."""
    for label in range(CLASSES):
        (folder / f"class {label}").mkdir(parents=True)
        colour = np.array([255 * ((label + 1) % 2), 255 * (label // 2 % 2), 36 * label])
        for i in range(count):
            pixels = np.clip(colour + rng.integers(-spread, spread, 3), 0, 255) + np.zeros((20, 20, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"class {label}" / f"{i}.png")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("knn"), np.random.default_rng(0)
    write(root / "train", 5, rng)
    (root / "train/class 6/4.png").unlink()  # 34 images: of three ranks two hold one less
    write(root / "val", 3, rng)
    return root


def features(images: Tensor) -> Tensor:
    return images.double().mean((2, 3)) - 127


def measured(train: ImageList, val: ImageList, k: int = 20, **options: int) -> dict[str, float]:
    config = KnnConfig(k=k, batch_size=4)
    through = Pass(image_size=(16, 16), device=CPU, workers=0, **options)
    return knn(features, train, val, config, through)


def expected(train: ImageList, val: ImageList, k: int = 20) -> dict[str, float]:
    """The same by loops over single images and Python numbers."""

    def vectors(images: ImageList) -> list[tuple[list[float], int]]:
        loaded = eval_loader(images, image_size=(16, 16), batch_size=1, workers=0)
        return [(features(batch["images"])[0].tolist(), int(batch["labels"])) for batch in loaded]

    def cosine(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))

    keys, top1, top5 = vectors(train), 0, 0
    queries = vectors(val)
    for query, wanted in queries:
        nearest = sorted(((cosine(query, key), label) for key, label in keys if label >= 0), reverse=True)[:k]
        votes: dict[int, float] = {}
        for similarity, label in nearest:
            votes[label] = votes.get(label, 0.0) + math.exp(similarity / 0.07)
        ranking = sorted(votes, key=lambda label: votes[label], reverse=True)
        top1 += wanted in ranking[:1]
        top5 += wanted in ranking[:5]
    return {"knn_top1": top1 / len(queries), "knn_top5": top5 / len(queries)}


@pytest.mark.parametrize("k", [1, 20, 1000])
@pytest.mark.parametrize("similarities", [1, 100, 1 << 20])
def test_it_equals_plain_loops(
    root: Path, monkeypatch: pytest.MonkeyPatch, k: int, similarities: int
) -> None:
    monkeypatch.setattr(module, "MAX_SIMILARITIES", similarities)
    train, val = find_images(root), find_images(root, "val")
    result = measured(train, val, k)
    assert result == expected(train, val, k)
    if k == 20:
        assert 1 / CLASSES < result["knn_top1"] < result["knn_top5"] < 1  # neither trivial nor at chance


def test_votes_are_exponential_in_the_similarity() -> None:
    keys = normalize(torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [-1.0, 0.0]]))
    votes = knn_votes(torch.tensor([[1.0, 0.0]]), keys, torch.tensor([0, 1, 1, 2]), 4, k=3, temperature=0.5)
    weights = [math.exp(s / 0.5) for s in (1.0, math.sqrt(0.5), 0.0)]
    assert torch.allclose(
        votes / votes[0, 0], torch.tensor([weights[0], weights[1] + weights[2], 0, 0]) / weights[0]
    )


def test_unreadable_images_are_no_neighbours_and_count_as_wrong(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    write(tmp_path / "train", 3, rng, spread=2)
    write(tmp_path / "val", 2, rng, spread=2)
    (tmp_path / "val/class 3/1.png").write_bytes(b"")
    (tmp_path / "train/class 5/0.png").write_bytes(b"")
    # A black image, to which the unreadable one's pixels would be nearest.
    Image.new("RGB", (20, 20)).save(tmp_path / "val/class 1/0.png")
    Image.new("RGB", (20, 20), (5, 5, 0)).save(tmp_path / "train/class 1/0.png")
    train, val = find_images(tmp_path), find_images(tmp_path, "val")
    assert measured(train, val, k=1)["knn_top1"] == pytest.approx(13 / 14)
    assert measured(train, val) == expected(train, val)


def run_rank(rank: int, root: Path, store: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}/group", rank=rank, world_size=3)
    result = measured(find_images(root), find_images(root, "val"), rank=rank, world_size=3)
    rows = torch.arange(20).view(10, 2)
    assert torch.equal(gathered(rows[rank::3], 10, 3), rows)
    (store / f"{rank}").write_text(repr(result))
    dist.destroy_process_group()


def test_three_ranks_agree_with_one(root: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=run_rank, args=(rank, root, tmp_path)) for rank in range(3)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    one = repr(measured(find_images(root), find_images(root, "val")))
    assert [(tmp_path / f"{rank}").read_text() for rank in range(3)] == [one] * 3


def test_missing_labels_and_other_classes_are_named(root: Path, tmp_path: Path) -> None:
    train, val = find_images(root), find_images(root, "val")
    flat = find_images(root / "val/class 0")
    with pytest.raises(UserError, match=r"classes are needed, but found 3 images without class folders"):
        measured(train, flat)
    write(tmp_path / "train", 1, np.random.default_rng(0))
    (tmp_path / "train/class 0").rename(tmp_path / "train/zebra")
    with pytest.raises(UserError, match=r"only in train: zebra; only in val: class 0$"):
        measured(find_images(tmp_path), val)


def test_more_ranks_than_images_is_an_error(root: Path) -> None:
    with pytest.raises(UserError, match="use fewer ranks"):
        measured(find_images(root), find_images(root, "val"), world_size=50)


def test_settings_out_of_range_are_named() -> None:
    for wrong in ({"k": 0}, {"temperature": 0.0}, {"batch_size": 0}, {"every": -1}):
        with pytest.raises(UserError, match="knn"):
            KnnConfig(**wrong)  # type: ignore[arg-type]
