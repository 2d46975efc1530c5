from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from itpn import cli
from itpn.data.images import ImageList, find_images
from itpn.data.loader import DataConfig, eval_loader, train_loader
from itpn.data.source import Images, Names, Subset, hold_out
from itpn.errors import UserError


@pytest.fixture(scope="module", params=["folders", "shards"])
def images(
    request: pytest.FixtureRequest, class_folders: Path, tmp_path_factory: pytest.TempPathFactory
) -> Images:
    """Thirteen images, in seven shards of two or in folders."""
    if request.param == "folders":
        return find_images(class_folders)
    out = tmp_path_factory.mktemp("sharded") / "out"
    assert cli.main(["shard", str(class_folders), str(out), "--per-shard", "2"]) == 0
    return find_images(out)


def labelled(labels: list[int]) -> ImageList:
    num_classes = max(labels) + 1
    return ImageList(
        root=Path("x"),
        names=Names([f"{i}.jpg" for i in range(len(labels))]),
        labels=torch.tensor(labels),
        class_names=tuple(map(str, range(num_classes))),
        description=f"{len(labels)} images",
    )


def test_a_subset_is_a_view_of_some_images(images: Images) -> None:
    indices = torch.tensor([11, 2, 5, 7])
    subset = Subset.of(images, indices, "chosen")
    assert len(subset) == 4 and subset.class_names == images.class_names
    assert images.labels is not None and subset.labels is not None
    assert torch.equal(subset.labels, images.labels[indices])
    for i, index in enumerate(indices.tolist()):
        assert subset.name(i) == images.name(index) and subset.names[i] == images.names[index]
        assert subset.read(i) == images.read(index)
        with subset.open(i) as ours, images.open(index) as theirs:
            assert ours.decode().tobytes() == theirs.decode().tobytes()
    assert subset.description == f"4 of {images.description}, chosen"


def test_the_order_is_that_of_the_whole_without_the_others(images: Images) -> None:
    indices = torch.tensor([11, 2, 5, 7, 0])
    subset = Subset.of(images, indices, "chosen")
    orders = set()
    for epoch in range(6):
        whole = images.order(1, epoch)
        order = subset.order(1, epoch)
        assert order.sort().values.tolist() == [0, 1, 2, 3, 4]
        assert indices[order].tolist() == [i for i in whole.tolist() if i in indices]
        orders.add(tuple(order.tolist()))
    assert len(orders) > 1


def test_the_fingerprint_tells_subsets_apart(images: Images, class_folders: Path) -> None:
    subsets = [Subset.of(images, torch.tensor(chosen), "") for chosen in ([1, 2], [2, 1], [1, 3])]
    assert len({images.fingerprint, *(subset.fingerprint for subset in subsets)}) == 4
    assert Subset.of(images, torch.tensor([1, 2]), "else").fingerprint == subsets[0].fingerprint
    without = ImageList(
        root=class_folders, names=images.names, labels=None, class_names=None, description="13 images"
    )
    assert Subset.of(without, torch.tensor([1, 2]), "").fingerprint != subsets[0].fingerprint


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 1])
def test_loaders_take_subsets(images: Images, workers: int) -> None:
    train, val = hold_out(images, 0.3, seed=1)
    shown = list(eval_loader(val, image_size=(8, 8), batch_size=3, workers=workers))
    assert val.labels is not None and train.labels is not None
    assert torch.equal(torch.cat([batch["labels"] for batch in shown]), val.labels)
    loader = train_loader(
        train,
        DataConfig(workers=workers),
        image_size=(8, 8),
        draw=lambda _: {},
        seed=0,
        batch_size=3,
        micro_batch=3,
    )
    for batch in islice(loader, 6):
        assert torch.equal(batch["labels"], train.labels[batch["index"]])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 4), min_size=2, max_size=60), st.floats(0.01, 0.99), st.integers(0, 50))
def test_every_class_is_on_both_sides(labels: list[int], share: float, seed: int) -> None:
    images = labelled(labels)
    if max(map(labels.count, labels)) == 1:
        with pytest.raises(UserError, match="no class has two"):
            hold_out(images, share, seed)
        return
    train, val = hold_out(images, share, seed)
    assert sorted([*train.indices, *val.indices]) == list(range(len(labels)))
    assert list(train.indices) == sorted(train.indices) and list(val.indices) == sorted(val.indices)
    for label in set(labels):
        n, num_held = labels.count(label), int((val.labels == label).sum())
        assert num_held == (0 if n == 1 else min(max(1, round(share * n)), n - 1))
    again = hold_out(images, share, seed)
    assert all(map(torch.equal, (train.labels, val.labels), (again[0].labels, again[1].labels)))
    assert [train.fingerprint, val.fingerprint] == [part.fingerprint for part in again]


def test_the_choice_depends_on_the_seed() -> None:
    images = labelled([0] * 20 + [1] * 20)
    chosen = {tuple(hold_out(images, 0.25, seed)[1].indices.tolist()) for seed in range(8)}
    assert len(chosen) == 8
    train, val = hold_out(images, 0.25, 0)
    assert train.description == "30 of 40 images, to train on"
    assert val.description == "10 of 40 images, held out for validation"


def test_images_without_classes_are_split_too(class_folders: Path) -> None:
    train, val = hold_out(find_images(class_folders / "train" / "cat"), 0.3, 0)
    assert (len(train), len(val)) == (5, 2) and val.labels is None


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0, float("nan")])
def test_a_share_out_of_range_is_an_error(share: float) -> None:
    with pytest.raises(UserError, match="between 0 and 1"):
        hold_out(labelled([0, 0]), share, 0)
