from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.engine.processes import once, train, write_images


@pytest.fixture(autouse=True)
def numerics_as_before() -> Iterator[None]:
    """Training on the CPU switches deterministic algorithms on for the whole process."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that all processes of one test run share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if base.name.startswith("popen-") else base


@pytest.fixture(scope="session")
def images(shared: Path) -> Path:
    return once(shared, "images", write_images)


@pytest.fixture(scope="session")
def whole(shared: Path, images: Path) -> Path:
    """The tiny run without interruption, in one process."""

    def make(run: Path) -> None:
        ended = train(images, run, [], "--data.workers", 1, "--checkpoint-every", 2, "--keep-last", 99)
        assert ended.status == 0, ended.output

    return once(shared, "whole", make)


@pytest.fixture(scope="session")
def whole_on_2_ranks(shared: Path, images: Path) -> Path:
    def make(run: Path) -> None:
        fields = ["--data.workers", 0, "--checkpoint-every", 2, "--keep-last", 99]
        ended = train(images, run, [], *fields, ranks=2)
        assert ended.status == 0, ended.output

    return once(shared, "whole-on-2-ranks", make)
