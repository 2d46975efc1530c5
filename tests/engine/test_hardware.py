"""Other numbers of ranks, workers and images at once: the same batches, the same losses up to rounding."""

import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch

from itpn.data.images import find_images
from itpn.data.loader import Batch, DataConfig, train_loader
from tests.engine.processes import NUM_STEPS, fed, losses, train
from tests.toys import toy_objective


def test_two_ranks_and_one_are_fed_alike_and_learn_alike(whole: Path, whole_on_2_ranks: Path) -> None:
    """One process with one worker, and two that load for themselves."""
    assert fed(whole) == fed(whole_on_2_ranks, num_ranks=2)
    assert len(fed(whole)) == NUM_STEPS
    assert_alike(losses(whole), losses(whole_on_2_ranks), range(1, 51), 1e-6)


def test_bf16_on_two_ranks_and_on_one(images: Path, tmp_path: Path) -> None:
    runs = [tmp_path / str(ranks) for ranks in (1, 2)]
    for ranks, run in enumerate(runs, start=1):
        fields = (
            "--precision",
            "bf16",
            "--max-steps",
            50,
            "--knn.every",
            0,
            "--data.workers",
            3 * (2 - ranks),
        )
        ended = train(images, run, [], *fields, "--checkpoint-minutes", 10, ranks=ranks)
        assert ended.status == 0, ended.output
    assert fed(runs[0]) == fed(runs[1], num_ranks=2)
    assert_alike(*map(losses, runs), range(1, 51), 1e-3)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_resumed_on_another_number_of_ranks(
    whole: Path, whole_on_2_ranks: Path, images: Path, tmp_path: Path, before: int, after: int
) -> None:
    started, run = (whole if before == 1 else whole_on_2_ranks), tmp_path / "run"
    shutil.copytree(started, run)
    (run / "run.json").unlink()  # it says that the run is finished
    (run / "checkpoints/last").write_text("00000010")
    ended = train(images, run, [], ranks=after)
    assert ended.status == 0, ended.output
    assert "step 10 of 60" in ended.output
    later = fed(run, num_ranks=after)
    assert sorted(later) == list(range(10, NUM_STEPS))
    assert all(
        later[step] == samples for step, samples in fed(started, num_ranks=before).items() if step >= 10
    )
    assert_alike(losses(started), losses(run), range(11, NUM_STEPS + 1), 1e-6)


def assert_alike(ours: dict[int, float], theirs: dict[int, float], steps: range, tolerance: float) -> None:
    gap = max(abs(ours[step] - theirs[step]) for step in steps)
    print(f"largest difference of a loss over steps {steps.start} to {steps.stop - 1}: {gap:.2g}")
    assert gap <= tolerance


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # fewer cores than that
def test_batches_do_not_depend_on_workers_and_ranks(images: Path) -> None:
    objective = toy_objective({}, image_size=32, drop_path=0.1)
    found = find_images(images, "train")

    def loader(workers: int, rank: int, world_size: int, micro_batch: int) -> Iterator[Batch]:
        return train_loader(
            found,
            DataConfig(root=images, workers=workers),
            image_size=(32, 32),
            draw=objective.draw,
            seed=0,
            batch_size=8,
            micro_batch=micro_batch,
            rank=rank,
            world_size=world_size,
            start_step=3,  # the next epoch comes in the middle
            on_bad=lambda error: None,
        )

    def batches(workers: int, num_ranks: int, micro_batch: int, num_samples: int = 32) -> Batch:
        """All ranks' samples in their order."""
        streams = [loader(workers, rank, num_ranks, micro_batch) for rank in range(num_ranks)]
        count = num_samples // num_ranks // micro_batch
        parts = [
            part for together in zip(*(islice(s, count) for s in streams), strict=True) for part in together
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    first = batches(0, 1, 8)
    assert {"images", "index", "epoch", "keep", "drop"} <= first.keys()
    assert first["epoch"].unique().tolist() == [0, 1]
    for workers, num_ranks, micro_batch in [(1, 1, 8), (3, 1, 4), (0, 2, 4), (1, 2, 2), (3, 2, 4)]:
        other = batches(workers, num_ranks, micro_batch)
        assert all(torch.equal(first[name], other[name]) for name in first), (workers, num_ranks, micro_batch)
