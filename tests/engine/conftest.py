from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def numerics_as_before() -> Iterator[None]:
    """Training on the CPU switches deterministic algorithms on for the whole process."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
