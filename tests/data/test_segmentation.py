from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from itpn.data.labelled import LabelledImages
from itpn.data.loader import Batch
from itpn.data.picture import BadImageError
from itpn.data.segmentation import (
    SegmentationDataConfig,
    eval_pairs,
    find_labelled,
    has_split,
    train_crops,
)
from itpn.errors import UserError
from tests.data.segmented import COLOURS, write_masks, write_pair

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
SEED, BATCH = 7, 4


def draw(generator: torch.Generator) -> Batch:
    return {"drop": torch.rand(2, generator=generator)}


def small(root: Path, **options) -> SegmentationDataConfig:
    toy = {"format": "masks", "short": 40, "long": 160, "crop": (32, 48), "workers": 0}
    return SegmentationDataConfig(root=root, **toy | options)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_masks(tmp_path_factory.mktemp("masks"), {"train": 10, "val": 5})


def batches(images: LabelledImages, config: SegmentationDataConfig, count: int, **options) -> list[Batch]:
    arguments = {"seed": SEED, "batch_size": BATCH, "micro_batch": BATCH, "draw": draw} | options
    return list(islice(train_crops(images, config, **arguments), count))


def joined(parts: list[Batch]) -> Batch:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    workers=st.sampled_from([0, 1, 3]),
    world_size=st.sampled_from([1, 2]),
    micro_batch=st.sampled_from([1, 2]),
    start_step=st.integers(0, 4),
)
def test_batches_are_the_same_for_any_workers_ranks_and_start(
    root: Path, workers: int, world_size: int, micro_batch: int, start_step: int
) -> None:
    """Six steps are three epochs of two: a run of so many steps resumes anywhere."""
    images = find_labelled(small(root), "train")
    expected = joined(batches(images, small(root), 6)[start_step : start_step + 2])
    micro_steps = BATCH // (micro_batch * world_size)
    split = {"world_size": world_size, "micro_batch": micro_batch, "start_step": start_step}
    ranks = [
        batches(images, small(root, workers=workers), 2 * micro_steps, rank=rank, **split)
        for rank in range(world_size)
    ]
    found = joined([batch for micro_step in zip(*ranks, strict=True) for batch in micro_step])
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_batch_has_the_promised_tensors(root: Path) -> None:
    [batch] = batches(find_labelled(small(root), "train"), small(root), 1)
    assert {name: (tuple(x.shape), x.dtype) for name, x in batch.items()} == {
        "images": ((BATCH, 3, 32, 48), torch.uint8),
        "labels": ((BATCH, 32, 48), torch.uint8),
        "index": ((BATCH,), torch.int64),
        "epoch": ((BATCH,), torch.int64),
        "drop": ((BATCH, 2), torch.float32),
    }


def test_many_classes_travel_as_int32(root: Path) -> None:
    config = small(root, names=None, num_classes=300, ignored=None)
    (root / "classes.txt").rename(root / "names")
    try:
        images = find_labelled(config, "train")
        [batch] = batches(images, config, 1)
        assert batch["labels"].dtype == torch.int32
        assert set(batch["labels"].unique().tolist()) <= {0, 1, 2, 3, 255, 65_535}
    finally:
        (root / "names").rename(root / "classes.txt")


def test_labels_stay_on_their_pixels(root: Path) -> None:
    """Classes are told by colour, through scaling, cropping and mirroring; padding is grey and unlabelled."""
    config = small(root, brightness=0, contrast=0, saturation=0, hue=0, padding=(0, 0, 0))
    seen = joined(batches(find_labelled(config, "train"), config, 6))
    pixels = seen["images"].permute(0, 2, 3, 1).float()
    distance = (pixels[..., None, :] - torch.from_numpy(COLOURS).float()).norm(dim=-1)
    clear, labels = distance.amin(-1) < 5, seen["labels"]
    agree = distance.argmin(-1) == labels
    assert agree[clear & (labels != 255)].float().mean() > 0.999
    assert clear.float().mean() > 0.5
    empty = (pixels == 0).all(-1)
    assert empty.any() and (labels[empty] == 255).all()


def test_colours_are_distorted_and_images_mirrored(root: Path) -> None:
    plain = small(root, brightness=0, contrast=0, saturation=0, hue=0, flip=0.0)
    images = find_labelled(plain, "train")
    one, two = (joined(batches(images, config, 2)) for config in (plain, small(root, flip=0.0)))
    assert torch.equal(one["labels"], two["labels"]) and not torch.equal(one["images"], two["images"])
    unpadded = {
        "crop": (20, 20),
        "ratio": (1.0, 1.0),
        "brightness": 0,
        "contrast": 0,
        "saturation": 0,
        "hue": 0,
    }
    one, two = (joined(batches(images, small(root, flip=flip, **unpadded), 2)) for flip in (0.0, 1.0))
    for name in ("images", "labels"):
        assert torch.equal(one[name], two[name].flip(-1))


def test_evaluation_sees_every_image_once_at_its_own_size(root: Path) -> None:
    config = small(root, short=20)
    images = find_labelled(config, "val")
    ranks = [list(eval_pairs(images, config, rank=rank, world_size=2)) for rank in range(2)]
    assert [batch["index"].item() for batch in ranks[0]] == [0, 2, 4]
    assert [batch["index"].item() for batch in ranks[1]] == [1, 3]
    batch = ranks[0][1]
    image, labels = images.pair(2)
    assert torch.equal(batch["labels"][0], torch.from_numpy(labels))
    half = np.asarray(image.resize((28, 20), Image.Resampling.BILINEAR))
    assert torch.equal(batch["images"][0], torch.from_numpy(half.copy()).permute(2, 0, 1))


@pytest.fixture
def spoiled(tmp_path: Path) -> Path:
    root = write_masks(tmp_path / "spoiled", {"train": 8, "val": 3})
    for split in ("train", "val"):
        write_pair(root, split, "01", np.zeros((40, 56), np.uint8), np.full((40, 56), 77, np.uint8))
    return root


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_pair_is_an_error_that_names_the_file(spoiled: Path, workers: int) -> None:
    config = small(spoiled, workers=workers)
    words = r"train/01\.png: its labels .*labels/train/01\.png: labels 77 are no class.* --data\.skip-bad"
    with pytest.raises(UserError, match=words):
        batches(find_labelled(config, "train"), config, 4)
    with pytest.raises(UserError, match="labels 77"):
        list(eval_pairs(find_labelled(config, "val"), config))


def test_a_bad_pair_is_replaced_if_that_is_wanted(spoiled: Path) -> None:
    config = small(spoiled, skip_bad=True)
    images = find_labelled(config, "train")
    met: list[BadImageError] = []
    seen = joined(batches(images, config, 4, on_bad=met.append))
    assert 1 not in seen["index"].tolist() and {bad.path.name for bad in met} == {"01.png"}
    others = joined(batches(images, config, 4, on_bad=met.append))
    assert all(torch.equal(seen[name], others[name]) for name in seen)
    left = list(eval_pairs(find_labelled(config, "val"), config, on_bad=met.append))
    assert [set(batch) for batch in left] == [
        {"index", "images", "labels"},
        {"index"},
        {"index", "images", "labels"},
    ]


def test_splits(root: Path, tmp_path: Path) -> None:
    assert has_split(small(root), "val") and not has_split(small(tmp_path), "val")
    ade = SegmentationDataConfig(root=tmp_path)
    (tmp_path / "ADEChallengeData2016/images/validation").mkdir(parents=True)
    assert has_split(ade, "val") and not has_split(ade, "train")


@pytest.mark.parametrize(
    "wrong",
    [{"ratio": (2.0, 1.0)}, {"ratio": (0.0, 1.0)}, {"short": 0}, {"crop": (0, 4)}, {"crop": (1 << 16, 4)},
     {"max_class_share": 0.0}, {"flip": 1.1}, {"max_bad_share": -1.0}, {"brightness": -1.0}, {"hue": 181.0},
     {"contrast": 1.5}, {"padding": (0, 0, 256)}, {"workers": -1}, {"num_classes": 0},
     {"num_classes": 65_536}],
)  # fmt: skip
def test_mistakes_are_named(wrong: dict) -> None:
    with pytest.raises(UserError, match=r"data\."):
        SegmentationDataConfig(**wrong)
