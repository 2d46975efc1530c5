import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy

from itpn.data.images import find_images
from itpn.errors import UserError
from itpn.evaluate import linear as module
from itpn.evaluate.gather import Pass
from itpn.evaluate.linear import Layer, LinearConfig, count_hits, fit, held_out, linear_probe

CLASSES = 6
CPU = torch.device("cpu")


def write(folder: Path, count: int, rng: np.random.Generator, spread: int) -> None:
    """Images of one colour per class, more or less scattered."""
    for label in range(CLASSES):
        (folder / f"class {label}").mkdir(parents=True)
        colour = np.array([255 * ((label + 1) % 2), 255 * (label // 2 % 2), 51 * label])
        for i in range(count):
            pixels = np.clip(colour + rng.integers(-spread, spread, 3), 0, 255) + np.zeros((20, 20, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"class {label}" / f"{i}.png")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("linear"), np.random.default_rng(0)
    write(root / "train", 11, rng, 150)
    write(root / "val", 4, rng, 150)
    return root


def features(images: Tensor) -> Tensor:
    """Mean colours on another scale, and a channel that never changes."""
    means = images.float().mean((2, 3))
    return torch.cat([7 * means + 100, torch.ones(len(images), 1)], dim=1)


def probed(root: Path, **options: int) -> dict[str, float]:
    config = LinearConfig(l2=(1e-3, 1e-1, 1e-5), batch_size=8)
    through = Pass(image_size=(16, 16), device=CPU, workers=0, on_bad=lambda bad: None, **options)
    return linear_probe(features, find_images(root), find_images(root, "val"), config, through)


def drawn(num_rows: int = 300, num_features: int = 8, num_classes: int = 4) -> tuple[Tensor, Tensor]:
    """Overlapping classes, in double precision."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(num_classes, (num_rows,), generator=generator)
    centres = torch.randn(num_classes, num_features, generator=generator).double()
    return centres[labels] + torch.randn(num_rows, num_features, generator=generator).double(), labels


@pytest.mark.parametrize("l2", [1e-1, 1e-3])
@pytest.mark.parametrize("logits_at_a_time", [80, 1 << 26])
def test_the_optimum_has_no_gradient(
    monkeypatch: pytest.MonkeyPatch, l2: float, logits_at_a_time: int
) -> None:
    monkeypatch.setattr(module, "MAX_LOGITS", logits_at_a_time)
    rows, labels = (tensor[:60] for tensor in drawn())
    layer = Layer(*(tensor.requires_grad_() for tensor in fit(rows, labels, 4, l2, 500)))
    loss = cross_entropy(rows @ layer.weight.T + layer.bias, labels) + l2 / 2 * layer.weight.square().sum()
    gradients = torch.autograd.grad(loss, list(layer))
    assert max(gradient.abs().max() for gradient in gradients) < 1e-5


def test_two_starts_end_alike() -> None:
    rows, labels = drawn()
    start = Layer(torch.randn(4, 8, dtype=torch.double), torch.randn(4, dtype=torch.double))
    one, other = fit(rows, labels, 4, 1e-2, 500), fit(rows, labels, 4, 1e-2, 500, start)
    assert torch.allclose(one.weight, other.weight, atol=1e-3)
    centred = (layer.bias - layer.bias.mean() for layer in (one, other))  # a common part changes nothing
    assert torch.allclose(*centred, atol=1e-3)


def test_plain_gradient_descent_ends_there_too() -> None:
    rows, labels = drawn(100, 3, 3)
    weight, bias = torch.zeros(3, 3, dtype=torch.double), torch.zeros(3, dtype=torch.double)
    for _ in range(3000):
        error = (rows @ weight.T + bias).softmax(1) - torch.eye(3, dtype=torch.double)[labels]
        weight -= 0.3 * (error.T @ rows / 100 + 1e-2 * weight)
        bias -= 0.3 * error.mean(0)
    assert torch.allclose(fit(rows, labels, 3, 1e-2, 500).weight, weight, atol=1e-4)


def test_separable_classes_are_told_apart() -> None:
    labels = torch.arange(40) % 4
    rows = 5 * torch.eye(4)[labels] + torch.rand(40, 4)
    assert count_hits(fit(rows, labels, 4, 1e-6, 500), rows, labels).tolist() == [40, 40]


def test_one_in_ten_of_every_class_is_held_out() -> None:
    labels = torch.tensor([0] * 100 + [1] * 30 + [2] * 3)[torch.randperm(133)]
    held = held_out(labels)
    counts = torch.bincount(labels[held], minlength=3)
    assert int(held.sum()) == 14
    assert all(abs(int(n) - share) <= 1 for n, share in zip(counts, (10, 3, 0.3), strict=True))
    assert torch.equal(held, held_out(labels))


def test_images_end_as_accuracy(root: Path) -> None:
    found = probed(root)
    assert 1 / CLASSES < found["linear_top1"] < found["linear_top5"] <= 1
    assert found["linear_l2"] in (1e-1, 1e-3, 1e-5)


def test_an_unreadable_image_is_left_out_of_train_and_wrong_in_val(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    write(tmp_path / "train", 11, rng, 5)
    write(tmp_path / "val", 2, rng, 5)
    assert probed(tmp_path)["linear_top1"] == 1
    (tmp_path / "val/class 3/1.png").write_bytes(b"")
    (tmp_path / "train/class 5/0.png").write_bytes(b"")
    assert probed(tmp_path)["linear_top1"] == pytest.approx(11 / 12)


def run_rank(rank: int, root: Path, store: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}/group", rank=rank, world_size=2)
    (store / f"{rank}").write_text(repr(probed(root, rank=rank, world_size=2)))
    dist.destroy_process_group()


def test_two_ranks_agree_with_one(root: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=run_rank, args=(rank, root, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    assert [(tmp_path / f"{rank}").read_text() for rank in range(2)] == [repr(probed(root))] * 2


def test_missing_labels_and_wrong_settings_are_named(root: Path) -> None:
    flat = find_images(root / "val/class 0")
    with pytest.raises(UserError, match="classes are needed"):
        linear_probe(features, flat, flat, LinearConfig(), Pass(image_size=(16, 16), device=CPU))
    for wrong in ({"l2": ()}, {"l2": (-1.0,)}, {"max_steps": 0}, {"batch_size": 0}):
        with pytest.raises(UserError, match=r"linear\."):
            LinearConfig(**wrong)  # type: ignore[arg-type]
