import random
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from timm.data import create_transform
from torch import Tensor

from itpn.data.augment import augmented
from itpn.data.images import find_images
from itpn.data.loader import Batch, DataConfig, train_loader
from itpn.data.randomness import generator, global_generators
from itpn.data.transforms import to_tensor
from itpn.errors import UserError
from tests.data.test_transforms import smooth

PUBLISHED = "rand-m9-mstd0.5-inc1"

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.mark.parametrize(
    "text",
    [
        PUBLISHED,
        "rand",
        "rand-m12-mmax15-n3-p1.0",
        "rand-n9-tweights",
        "rand-t3a",
        "rand-m15-mmax15-inc1-p1.0-n9",
    ],
)
def test_it_is_timms_with_the_same_numbers(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    posterize = ImageOps.posterize
    black = Image.new("RGB", (40, 30))
    monkeypatch.setattr(
        ImageOps, "posterize", lambda image, bits: posterize(image, bits) if bits > 0 else black
    )
    image = smooth(40, 30)
    _, published, _ = create_transform(
        (30, 40), is_training=True, auto_augment=text, interpolation="bicubic", color_jitter=0, separate=True
    )
    if "3a" in text:  # which timm combines with a colour jitter, here of strength 0, that draws last
        published.transforms = published.transforms[:1]
    changed = 0
    for index in range(20):
        ours = augmented(to_tensor(image), text, generator(0, 0, index, "randaugment"))
        with global_generators(generator(0, 0, index, "randaugment")):
            theirs = to_tensor(published(image))
        assert torch.equal(ours, theirs) and ours.dtype == torch.uint8
        changed += not torch.equal(ours, to_tensor(image))
    assert changed >= 5


def batches(root: Path, workers: int = 0, start_step: int = 0, text: str = PUBLISHED) -> list[Batch]:
    config = DataConfig(workers=workers, randaugment=text, flip=0.0)
    loader = train_loader(
        find_images(root),
        config,
        image_size=(16, 24),
        draw=nothing,
        seed=3,
        batch_size=4,
        micro_batch=2,
        start_step=start_step,
    )
    return list(islice(loader, 6))


def nothing(generator: torch.Generator) -> dict[str, Tensor]:
    return {}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_is_the_same_for_any_workers_and_start(class_folders: Path, workers: int) -> None:
    expected = [batch["images"] for batch in batches(class_folders)]
    random.seed(5)
    torch.rand(3)
    assert all(map(torch.equal, [batch["images"] for batch in batches(class_folders, workers)], expected))
    later = [batch["images"] for batch in batches(class_folders, workers, start_step=2)]
    assert all(map(torch.equal, later, expected[4:]))


def test_it_comes_after_the_crop_which_it_leaves_as_it_was(class_folders: Path) -> None:
    plain, changed = batches(class_folders, text=""), batches(class_folders)
    for i, (before, after) in enumerate(zip(plain, changed, strict=True)):
        for row, (epoch, index) in enumerate(
            zip(before["epoch"].tolist(), before["index"].tolist(), strict=True)
        ):
            draws = generator(3, epoch, index, "randaugment")
            assert torch.equal(after["images"][row], augmented(before["images"][row], PUBLISHED, draws)), i


@pytest.mark.parametrize(
    "text",
    [
        "",
        "rand-m9",
        PUBLISHED,
        "rand-m9-mstd0.5",
        "rand-m9-n3-p0.3-mstd1",
        "rand-mstd101-mmax12",
        "rand-t3aw-n2",
    ],
)
def test_strings_of_timm_are_taken(text: str) -> None:
    assert DataConfig(randaugment=text).randaugment == text


@pytest.mark.parametrize(
    "text",
    [
        "rnd-m9",
        "augmix-m3",
        "rand-x3",
        "rand-m",
        "rand_m9",
        "rand-m9-",
        "rand-n0",
        "rand-p2",
        "rand-mstdinf",
        "rand-tno",
    ],
)
def test_any_other_string_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UserError, match=r"--data\.randaugment is .*such as rand-m9-mstd0\.5-inc1"):
        DataConfig(randaugment=text)


@given(st.text("randmstpincux0159.-", max_size=20))
def test_what_is_taken_is_understood_by_timm(text: str) -> None:
    try:
        DataConfig(randaugment="rand-" + text)
    except UserError:
        return
    augmented(to_tensor(smooth(8, 8)), "rand-" + text, generator(0, 0, 0, "randaugment"))


def state() -> tuple[object, ...]:
    name, words, *rest = np.random.get_state()
    return random.getstate(), name, words.tobytes(), *rest, torch.get_rng_state().numpy().tobytes()


@given(st.integers(0, 1000), st.booleans())
def test_the_global_generators_are_as_before(index: int, fails: bool) -> None:
    random.gauss(0, 1), np.random.normal(), torch.randn(1)  # which keep a second number for later
    before = state()
    try:
        with global_generators(generator(0, 0, index, "a")):
            draws = random.random(), random.gauss(0, 1), np.random.normal(), torch.randn(2).tolist()
            assert state() != before
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert state() == before
    with global_generators(generator(0, 0, index, "a")):
        assert draws == (random.random(), random.gauss(0, 1), np.random.normal(), torch.randn(2).tolist())
    with global_generators(generator(0, 1, index, "a")):
        others = random.random(), random.gauss(0, 1), np.random.normal(), torch.randn(2).tolist()
    assert all(a != b for a, b in zip(draws, others, strict=True))
