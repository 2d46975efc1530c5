import math
import pickle
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.data.mixup import Mixup, cutmix_bbox_and_lam, mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from itpn.errors import UserError
from itpn.heads.mixing import (
    MixConfig,
    MixDraw,
    _erased,
    erase,
    mix,
    noise,
    smoothed_targets,
    soft_cross_entropy,
)

CLASSES = 5


def draw(
    seed: int, size: tuple[int, int] = (24, 40), num_drops: int = 0, **numbers: float
) -> dict[str, Tensor]:
    return MixDraw(MixConfig(**numbers), size, num_drops)(torch.Generator().manual_seed(seed))


def draws(num: int, size: tuple[int, int] = (24, 40), **numbers: float) -> dict[str, Tensor]:
    samples = [draw(seed, size, **numbers) for seed in range(num)]
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def reference(images: Tensor, targets: Tensor, lam: Tensor, box: Tensor) -> tuple[Tensor, Tensor]:
    """timm's arithmetic of pairs, sample by sample."""
    mixed, mixed_targets = images.clone(), targets.clone()
    for row in range(len(images)):
        first, partner = row - row % 2, row + 1 - 2 * (row % 2)
        share, (top, left, height, width) = lam[first], box[first].tolist()
        if height * width:
            part = (slice(None), slice(top, top + height), slice(left, left + width))
            mixed[row][part] = images[partner][part]
        else:
            mixed[row] = images[row] * share + images[partner] * (1 - share)
        mixed_targets[row] = targets[row] * share + targets[partner] * (1 - share)
    return mixed, mixed_targets


def batch(num: int, size: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(num, 3, *size, generator=generator)
    return images, smoothed_targets(torch.randint(CLASSES, (num,), generator=generator), CLASSES, 0.1)


sizes = st.tuples(st.integers(1, 30), st.integers(1, 30))


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), sizes)
def test_mixing_is_the_plain_reference(seed: int, pairs: int, size: tuple[int, int]) -> None:
    images, targets = batch(2 * pairs, size, seed)
    drawn = [draw(seed + i, size) for i in range(2 * pairs)]
    lam, box = (torch.stack([sample[name] for sample in drawn]) for name in ("lam", "box"))
    mixed, mixed_targets = mix(images, targets, lam, box)
    expected, expected_targets = reference(images, targets, lam, box)
    assert torch.allclose(mixed, expected, atol=1e-6)
    assert torch.allclose(mixed_targets, expected_targets, atol=1e-6)
    assert torch.allclose(mixed_targets.sum(1), torch.ones(2 * pairs), atol=1e-5)
    # Nothing is lost between the two of a pair.
    assert torch.allclose(mixed[::2] + mixed[1::2], images[::2] + images[1::2], atol=1e-5)


@settings(deadline=None)
@given(st.integers(0, 10_000), sizes)
def test_lam_is_the_share_of_the_pixels_that_are_kept(seed: int, size: tuple[int, int]) -> None:
    drawn = draw(seed, size, mixup=0.0)
    images = torch.zeros(2, 1, *size)
    images[0] = 1
    mixed, targets = mix(images, torch.eye(2), drawn["lam"].repeat(2), drawn["box"].repeat(2, 1))
    assert abs(mixed[0].mean() - drawn["lam"]) < 1e-6
    assert abs(targets[0, 0] - drawn["lam"]) < 1e-6 and mixed[0].unique().numel() <= 2


def test_mixup_in_pairs_is_timms(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers given, the same images and targets; timm pairs the first with the last."""
    images, _ = batch(6, (8, 8), 0)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    lam = np.array([0.3, 0.9, 0.5], dtype=np.float32)
    timms = Mixup(mode="pair", num_classes=CLASSES, label_smoothing=0.1)
    monkeypatch.setattr(timms, "_params_per_elem", lambda num: (lam.copy(), np.zeros(num, dtype=bool)))
    expected, expected_targets = timms(images.clone(), labels)
    order = torch.tensor([0, 5, 1, 4, 2, 3])
    ours = mix(
        images[order],
        smoothed_targets(labels, CLASSES, 0.1)[order],
        torch.from_numpy(lam).repeat_interleave(2),
        torch.zeros(6, 4, dtype=torch.long),
    )
    # timm's second image of a pair is blended with the first as it was, as ours is.
    assert torch.allclose(ours[0], expected[order], atol=1e-6)
    assert torch.allclose(ours[1], expected_targets[order], atol=1e-6)


def test_only_the_first_of_a_pair_says_how() -> None:
    images, targets = batch(4, (8, 8), 1)
    lam, box = torch.tensor([0.3, 0.9, 0.6, 0.1]), torch.zeros(4, 4, dtype=torch.long)
    box[2:] = torch.tensor([[1, 2, 3, 4], [0, 0, 8, 8]])
    lam_other, box_other = lam.clone(), box.clone()
    lam_other[1::2], box_other[1::2] = 0.5, 0
    for ours, theirs in zip(
        mix(images, targets, lam, box), mix(images, targets, lam_other, box_other), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_a_share_of_one_changes_nothing() -> None:
    images, targets = batch(4, (8, 8), 1)
    mixed, mixed_targets = mix(images, targets, torch.ones(4), torch.zeros(4, 4, dtype=torch.long))
    assert torch.equal(mixed, images) and torch.equal(mixed_targets, targets)


def test_gradients_are_those_of_the_reference() -> None:
    images, targets = batch(4, (6, 6), 2)
    drawn = draws(4, (6, 6))
    weight = torch.randn(3 * 36, CLASSES, generator=torch.Generator().manual_seed(0))
    gradients = []
    for mixing in (mix, reference):
        images, weight = images.detach().requires_grad_(), weight.detach().requires_grad_()
        x, y = mixing(images * 1, targets, drawn["lam"], drawn["box"])
        soft_cross_entropy(x.flatten(1) @ weight, y).mean().backward()
        gradients.append((images.grad, weight.grad))
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.abs().sum() > 0 and torch.allclose(ours, theirs, atol=1e-6)


def test_an_odd_batch_is_an_error() -> None:
    images, targets = batch(3, (4, 4), 0)
    with pytest.raises(UserError, match=r"batch has 3; give an even --device-batch"):
        mix(images, targets, torch.ones(3), torch.zeros(3, 4, dtype=torch.long))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_targets_and_loss_are_timms_and_torchs(smoothing: float) -> None:
    labels = torch.tensor([3, 0, 4])
    targets = smoothed_targets(labels, CLASSES, smoothing)
    assert torch.allclose(targets, mixup_target(labels, CLASSES, 1.0, smoothing))
    logits = torch.randn(3, CLASSES, generator=torch.Generator().manual_seed(0))
    expected = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
    assert torch.allclose(soft_cross_entropy(logits, targets), expected)
    assert soft_cross_entropy(logits.bfloat16(), targets).dtype == torch.float32


def test_a_draw_has_the_promised_tensors() -> None:
    described = {name: (tuple(t.shape), t.dtype) for name, t in draw(0, num_drops=6).items()}
    assert described == {
        "lam": ((), torch.float32),
        "box": ((4,), torch.int64),
        "erase": ((4,), torch.int64),
        "noise_seed": ((), torch.int64),
        "drop": ((6,), torch.float32),
    }
    assert "drop" not in draw(0)
    copy = pickle.loads(pickle.dumps(MixDraw(MixConfig(), (8, 8), 2)))
    same = copy(torch.Generator().manual_seed(4)), draw(4, (8, 8), 2)
    assert all(torch.equal(same[0][name], same[1][name]) for name in same[1])


@settings(deadline=None)
@given(st.integers(0, 100_000), sizes)
def test_boxes_lie_in_the_image(seed: int, size: tuple[int, int]) -> None:
    drawn = draw(seed, size, mixup=0.4, erasing=1.0)
    assert 0 <= drawn["lam"] <= 1
    for name in ("box", "erase"):
        top, left, height, width = drawn[name].tolist()
        assert top >= 0 and left >= 0 and top + height <= size[0] and left + width <= size[1]
        assert (height > 0 and width > 0) or (top, left, height, width) == (0, 0, 0, 0)


def kolmogorov_smirnov(a: np.ndarray, b: np.ndarray) -> float:
    """Distance in units of which 1.95 is exceeded once in a thousand times."""
    points = np.concatenate([a, b])
    below = [np.searchsorted(np.sort(values), points, side="right") / len(values) for values in (a, b)]
    return float(np.abs(below[0] - below[1]).max()) / math.sqrt(1 / len(a) + 1 / len(b))


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0), (0.3, 0.5)])
def test_shares_and_boxes_are_distributed_as_timms(mixup: float, cutmix: float) -> None:
    num, size = 3000, (24, 40)
    ours = draws(num, size, mixup=mixup, cutmix=cutmix, prob=0.7)
    np.random.seed(0)
    timms = Mixup(mixup, cutmix, prob=0.7, switch_prob=0.5, mode="elem", num_classes=2)
    lam, use_cutmix = timms._params_per_elem(num)
    boxes = np.zeros((num, 4))
    for i in range(num):
        if use_cutmix[i] and lam[i] != 1:
            (top, bottom, left, right), lam[i] = cutmix_bbox_and_lam((3, *size), lam[i])
            if (bottom - top) * (right - left):
                boxes[i] = top, left, bottom - top, right - left
    assert kolmogorov_smirnov(ours["lam"].numpy(), lam) < 1.95
    for axis in range(4):
        assert kolmogorov_smirnov(ours["box"][:, axis].numpy(), boxes[:, axis]) < 1.95


def test_erased_boxes_are_distributed_as_timms() -> None:
    num, size = 3000, (24, 40)
    ours = draws(num, size, erasing=0.6)["erase"].numpy()
    random.seed(0)
    timms = RandomErasing(0.6, mode="pixel", device="cpu")
    theirs = np.zeros((num, 4))
    for i in range(num):
        rows, columns = timms(torch.zeros(1, *size))[0].nonzero().T
        if len(rows):
            top, left = int(rows.min()), int(columns.min())
            theirs[i] = top, left, int(rows.max()) - top + 1, int(columns.max()) - left + 1
    for axis in range(4):
        assert kolmogorov_smirnov(ours[:, axis], theirs[:, axis]) < 1.95


def test_erasing_changes_the_box_and_nothing_else() -> None:
    images = torch.full((3, 2, 6, 9), 7.0)
    boxes = torch.tensor([[1, 2, 3, 5], [0, 0, 0, 0], [0, 0, 6, 9]])
    erased = erase(images, boxes, torch.tensor([1, 2, 3]))
    changed = erased != 7
    assert changed[0, :, 1:4, 2:7].all() and changed[0].sum() == 2 * 15
    assert not changed[1].any() and changed[2].all()
    assert torch.equal(erased, _erased(images, boxes, torch.tensor([1, 2, 3])))  # the way of other devices
    assert torch.equal(erase(images[1:2], boxes[1:2], torch.tensor([2])), images[1:2])
    assert torch.equal(erased[0, :, 1:4, 2:7], noise(torch.tensor([1]), (2, 6, 9))[0, :, 1:4, 2:7])


def test_noise_is_a_function_of_seed_and_place_alone() -> None:
    seeds = torch.tensor([5, 1 << 61, 0])
    whole = noise(seeds, (3, 16, 21))
    assert torch.equal(whole, noise(seeds, (3, 16, 21)))
    assert torch.equal(whole[1:, :2, :9, :6], noise(seeds[1:], (2, 9, 6)))
    assert not torch.isclose(whole[0], whole[1]).any(-1).all()


def test_the_hash_is_splitmix() -> None:
    """With Python's whole numbers, which do not overflow."""

    def scrambled(bits: int) -> int:
        word = (1 << 64) - 1
        bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & word
        bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & word
        return bits ^ (bits >> 31)

    seed, word = 123456789, (1 << 64) - 1
    found = noise(torch.tensor([seed]), (2, 3, 4))[0]
    for channel, row, column in np.ndindex(2, 3, 4):
        bits = seed
        for place in (channel, row, column // 2):
            bits = scrambled((bits + 0x9E3779B97F4A7C15 * (place + 1)) & word)
        radius = math.sqrt(-2 * math.log(((bits >> 40) + 1) / (1 << 24)))
        turn = 2 * math.pi * (bits & ((1 << 24) - 1)) / (1 << 24)
        expected = radius * (math.sin(turn) if column % 2 else math.cos(turn))
        assert abs(float(found[channel, row, column]) - expected) < 1e-5


def test_noise_is_normal_and_independent() -> None:
    values = noise(torch.arange(40), (3, 64, 64)).double()
    n = values.numel()
    assert values.isfinite().all() and values.abs().max() < 6
    assert abs(values.mean()) < 4 / math.sqrt(n) and abs(values.var() - 1) < 4 * math.sqrt(2 / n)
    in_order = values.flatten().sort().values
    normal = 0.5 * (1 + torch.erf(in_order / math.sqrt(2)))
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((normal - steps[:-1]).abs(), (normal - steps[1:]).abs()).max()
    assert distance * math.sqrt(n) < 1.95  # Kolmogorov and Smirnov: exceeded once in a thousand times
    neighbours = [
        (values[1:], values[:-1]),
        (values[:, 1:], values[:, :-1]),
        (values[:, :, 1:], values[:, :, :-1]),
        (values[..., 1:], values[..., :-1]),
        (values[..., 2:], values[..., :-2]),
    ]
    for a, b in neighbours:
        for power in (1, 2):
            x, y = a.flatten() ** power, b.flatten() ** power
            assert abs(torch.corrcoef(torch.stack([x, y]))[0, 1]) < 4 / math.sqrt(x.numel())


@pytest.mark.parametrize(
    "numbers",
    [
        {"mixup": -1},
        {"cutmix": 1e-9},
        {"mixup": math.nan},
        {"prob": 1.1},
        {"switch_prob": -0.1},
        {"erasing": 2},
        {"smoothing": 1},
    ],
)
def test_numbers_out_of_range_are_named(numbers: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"mix.{next(iter(numbers))} is"):
        MixConfig(**numbers)


def test_each_can_be_off() -> None:
    drawn = draws(50, mixup=0.0, cutmix=0.0, erasing=0.0)
    assert (drawn["lam"] == 1).all() and not drawn["box"].any() and not drawn["erase"].any()
    assert not draws(50, cutmix=0.0)["box"].any() and draws(50, mixup=0.0)["box"].any()
    assert MixConfig().mixes and not MixConfig(prob=0.0).mixes and not MixConfig(mixup=0.0, cutmix=0.0).mixes
