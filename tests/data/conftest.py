from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def class_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of seven and six JPEGs, all different, 40 x 30 pixels, under ROOT/train."""
    root = tmp_path_factory.mktemp("class_folders")
    rng = np.random.default_rng(0)
    for name, count in (("cat", 7), ("dog", 6)):
        (root / "train" / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "train" / name / f"{i}.jpg")
    return root
