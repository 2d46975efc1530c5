import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from itpn.data.images import ImageList, find_images
from itpn.data.loader import (
    DataConfig,
    MicroBatches,
    TrainSamples,
    default_workers,
    eval_loader,
    steps_per_epoch,
    train_loader,
)
from itpn.data.picture import BadImageError
from itpn.data.randomness import permutation
from itpn.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
SIZE, SEED, BATCH = 16, 7, 4

Batch = dict[str, Tensor]


def draw_mask(generator: torch.Generator) -> Batch:
    return {
        "keep": torch.randperm(9, generator=generator)[None, :3],
        "drop": torch.rand(2, generator=generator),
    }


def batches(images: ImageList, count: int, workers: int = 0, **options: int) -> list[Batch]:
    arguments = {"seed": SEED, "batch_size": BATCH, "micro_batch": BATCH} | options
    config = DataConfig(workers=workers)
    loader = train_loader(images, config, image_size=(SIZE, SIZE), draw=draw_mask, **arguments)  # type: ignore[arg-type]
    return list(islice(loader, count))


def unlabelled(images: ImageList) -> ImageList:
    return ImageList(
        root=images.root, names=images.names, labels=None, class_names=None, description="13 images"
    )


def joined(parts: list[Batch]) -> Batch:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def assert_equal(a: Batch, b: Batch) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def images(class_folders: Path) -> ImageList:
    return find_images(class_folders)


@pytest.fixture(scope="module")
def steps(images: ImageList) -> list[Batch]:
    """Eight steps, which is two epochs of three steps and two more, one rank, one micro-batch, no workers."""
    return batches(images, 8)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    workers=st.sampled_from([0, 1, 3]),
    world_size=st.sampled_from([1, 2]),
    micro_batch=st.sampled_from([1, 2]),
    start_step=st.integers(0, 7),
)
def test_batches_are_the_same_for_any_workers_ranks_and_start(
    images: ImageList, steps: list[Batch], workers: int, world_size: int, micro_batch: int, start_step: int
) -> None:
    micro_steps = BATCH // (micro_batch * world_size)
    count = min(2, 8 - start_step)
    split = {"world_size": world_size, "micro_batch": micro_batch, "start_step": start_step}
    ranks = [batches(images, count * micro_steps, workers, rank=rank, **split) for rank in range(world_size)]
    in_order = [batch for micro_step in zip(*ranks, strict=True) for batch in micro_step]
    assert_equal(joined(in_order), joined(steps[start_step : start_step + count]))


def test_steps_follow_the_epochs_permutations(images: ImageList, steps: list[Batch]) -> None:
    for epoch in range(2):
        order = permutation(SEED, epoch, 13)
        shown = joined(steps[3 * epoch : 3 * epoch + 3])
        assert torch.equal(shown["index"], order[:12])
        assert (shown["epoch"] == epoch).all()
        assert len(shown["index"].unique()) == 12


def test_a_batch_has_the_promised_tensors(steps: list[Batch]) -> None:
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in steps[0].items()}
    assert shapes == {
        "images": ((BATCH, 3, SIZE, SIZE), torch.uint8),
        "index": ((BATCH,), torch.int64),
        "epoch": ((BATCH,), torch.int64),
        "labels": ((BATCH,), torch.int64),
        "keep": ((BATCH, 1, 3), torch.int64),
        "drop": ((BATCH, 2), torch.float32),
    }


def test_training_images_keep_their_labels(images: ImageList, steps: list[Batch]) -> None:
    shown = joined(steps)
    assert images.labels is not None
    assert torch.equal(shown["labels"], images.labels[shown["index"]])
    assert "labels" not in batches(unlabelled(images), 1)[0]


def test_a_sample_changes_from_epoch_to_epoch_and_seed_to_seed(images: ImageList, steps: list[Batch]) -> None:
    def pixels_of(parts: list[Batch]) -> dict[int, Tensor]:
        shown = joined(parts)
        return {int(index): pixels for index, pixels in zip(shown["index"], shown["images"], strict=True)}

    first, second = pixels_of(steps[:3]), pixels_of(steps[3:6])
    other = pixels_of(batches(images, 3, seed=SEED + 1))
    for changed in (second, other):
        both = first.keys() & changed.keys()
        assert both and not any(torch.equal(first[i], changed[i]) for i in both)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_random_state_is_left_alone(images: ImageList, workers: int) -> None:
    before = torch.get_rng_state()
    batches(images, 2, workers)
    list(eval_loader(images, image_size=(SIZE, SIZE), batch_size=4, workers=workers))
    assert torch.equal(before, torch.get_rng_state())


def test_workers_may_be_spawned(images: ImageList) -> None:
    draw_nothing = partial(dict.fromkeys, ())
    samples = TrainSamples(images, DataConfig(), (SIZE, SIZE), draw_nothing, SEED)
    order = MicroBatches(images, SEED, BATCH, BATCH)
    loader = DataLoader(
        samples, batch_size=None, sampler=order, num_workers=1, multiprocessing_context="spawn"
    )
    batch, bad = next(iter(loader))
    expected, _ = samples[next(iter(order))]
    assert bad == [] and expected is not None
    assert_equal(batch, expected)


def test_ctrl_c_does_not_reach_the_workers(images: ImageList, steps: list[Batch]) -> None:
    loader = train_loader(
        images,
        DataConfig(workers=1),
        image_size=(SIZE, SIZE),
        draw=draw_mask,
        seed=SEED,
        batch_size=BATCH,
        micro_batch=BATCH,
    )
    assert_equal(next(loader), steps[0])
    for worker in multiprocessing.active_children():
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGINT)
    for expected in steps[1:]:
        assert_equal(next(loader), expected)
    loader.close()  # type: ignore[attr-defined]
    assert not multiprocessing.active_children()


def test_workers_die_with_a_killed_parent(class_folders: Path) -> None:
    script = """
        import multiprocessing, sys, time
        from functools import partial
        from pathlib import Path
        from itpn.data.images import find_images
        from itpn.data.loader import DataConfig, train_loader
        images = find_images(Path(sys.argv[1]))
        loader = train_loader(images, DataConfig(workers=2), image_size=(16, 16), seed=0, batch_size=4,
                              micro_batch=4, draw=partial(dict.fromkeys, ()))
        next(loader)
        print(*[worker.pid for worker in multiprocessing.active_children()], flush=True)
        time.sleep(600)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(class_folders)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2 and all(map(is_running, workers))
        parent.kill()
    deadline = time.monotonic() + 60
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline, "orphaned workers"
        time.sleep(0.2)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def spoiled(class_folders: Path, tmp_path: Path) -> ImageList:
    """The class folders' thirteen images, three of them unreadable."""
    for i, path in enumerate(sorted((class_folders / "train").rglob("*.jpg"))):
        copy = tmp_path / path.parent.name / path.name
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes()[: 100 if i in (0, 5, 11) else None])
    return find_images(tmp_path)


def test_bad_images_are_replaced_the_same_way_everywhere(spoiled: ImageList) -> None:
    heard: list[int] = []

    def hear(bad: BadImageError) -> None:
        heard.append([spoiled.path(i) for i in range(13)].index(bad.path))

    runs = []
    for workers in (0, 2):
        loader = train_loader(
            spoiled,
            DataConfig(workers=workers),
            image_size=(SIZE, SIZE),
            draw=draw_mask,
            seed=SEED,
            batch_size=BATCH,
            micro_batch=2,
            on_bad=hear,
        )
        runs.append(joined(list(islice(loader, 24))))
        assert set(heard) == {0, 5, 11}
        heard.clear()
    assert_equal(*runs)
    planned = torch.cat([permutation(SEED, epoch, 13)[:12] for epoch in range(4)])
    shown, bad = runs[0]["index"], torch.isin(planned, torch.tensor([0, 5, 11]))
    assert bad.any() and not torch.isin(shown, torch.tensor([0, 5, 11])).any()
    assert torch.equal(shown[~bad], planned[~bad])
    assert spoiled.labels is not None and torch.equal(runs[0]["labels"], spoiled.labels[shown])


def test_a_bad_image_is_named_on_stderr_by_default(
    spoiled: ImageList, capsys: pytest.CaptureFixture[str]
) -> None:
    batches(spoiled, 9)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and any(
        str(spoiled.path(0)) in line and "truncated" in line.lower() for line in lines
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_bad_images_is_an_error(tmp_path: Path, workers: int) -> None:
    for i in range(4):
        (tmp_path / f"{i}.jpg").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"^100 images in a row cannot be read, the first is .*not an image"):
        batches(find_images(tmp_path), 1, workers)


def test_fewer_images_than_a_batch_is_an_error_with_both_numbers(images: ImageList) -> None:
    assert steps_per_epoch(13, 4) == 3 and steps_per_epoch(4, 4) == 1
    with pytest.raises(
        UserError, match=r"^13 images are fewer than one global batch of 4,096; .*--batch-size"
    ):
        batches(images, 1, batch_size=4096, micro_batch=1)


def test_a_batch_that_does_not_divide_is_refused(images: ImageList) -> None:
    with pytest.raises(ValueError, match="batch_size=6"):
        MicroBatches(images, 0, 6, 2, 0, 2)


@pytest.mark.parametrize("field", [{"min_scale": 0.0}, {"min_scale": 1.5}, {"flip": -0.1}, {"workers": -1}])
def test_settings_out_of_range_are_named(field: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"data.{next(iter(field))}"):
        DataConfig(**field)  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sees_every_image_once(images: ImageList, workers: int, world_size: int) -> None:
    options = {"image_size": (SIZE, SIZE), "batch_size": 4, "world_size": world_size, "workers": workers}
    ranks = [list(eval_loader(images, rank=rank, **options)) for rank in range(world_size)]
    shown = joined([batch for rank in ranks for batch in rank])
    assert sorted(shown["index"].tolist()) == list(range(13))
    assert images.labels is not None
    assert torch.equal(shown["labels"], images.labels[shown["index"]])
    assert shown["images"].shape == (13, 3, SIZE, SIZE)


def test_in_evaluation_a_bad_image_stays_and_has_no_label(spoiled: ImageList) -> None:
    heard: list[Path] = []
    loader = eval_loader(
        spoiled, image_size=(SIZE, SIZE), batch_size=5, workers=0, on_bad=lambda bad: heard.append(bad.path)
    )
    shown = joined(list(loader))
    assert heard == [spoiled.path(i) for i in (0, 5, 11)]
    assert (shown["labels"] == -1).nonzero().flatten().tolist() == [0, 5, 11]
    assert shown["images"][5].max() == 0 and shown["images"][4].max() > 0
    assert spoiled.labels is not None and spoiled.labels.min() == 0


def test_images_without_labels_can_be_evaluated(images: ImageList) -> None:
    labels = joined(list(eval_loader(unlabelled(images), image_size=(SIZE, SIZE), batch_size=8, workers=0)))[
        "labels"
    ]
    assert (labels == -1).all()


@pytest.mark.parametrize(
    ("cores", "ranks", "on_cpu", "expected"),
    [
        (1, 1, True, 0),
        (2, 1, True, 1),
        (64, 1, True, 2),
        (2, 2, True, 0),
        (16, 1, False, 16),
        (128, 8, False, 16),
        (4, 8, False, 1),
    ],
)
def test_default_workers(
    monkeypatch: pytest.MonkeyPatch, cores: int, ranks: int, on_cpu: bool, expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert default_workers(on_cpu) == expected
