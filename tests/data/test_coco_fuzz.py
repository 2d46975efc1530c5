"""Any value in any place of a COCO file: it is read, or refused in one line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itpn.data.check_objects import described
from itpn.data.coco_file import read_coco
from itpn.errors import UserError
from tests.data.coco import content, thing, written

FIELDS = {
    "images": ("id", "file_name", "width", "height"),
    "categories": ("id", "name"),
    "annotations": ("id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation"),
}
NUMBERS = [0, -1, 1, 3, 7, 0.5, 1e308, float("nan"), float("inf"), 10**30, 2**63, True]
TEXTS = ["", "1", "-1", "1e5", "nan", "1.png", "../x", "a\0b", "\ud800", "é" * 300, "b'", "cat", "/", "."]
SIMPLE = st.none() | st.sampled_from(NUMBERS) | st.sampled_from(TEXTS)
VALUES = st.recursive(
    SIMPLE,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(["size", "counts"]), inner),
)
PLACES = st.sampled_from(
    [(name, place, field) for name in FIELDS for place in (0, 1) for field in FIELDS[name]]
)
WHOLES = st.sampled_from([(name, place, "") for name in FIELDS for place in (0, 1)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    written(folder, content([(48, 64), (48, 64)]))
    return folder


@settings(max_examples=200, deadline=None)
@given(changes=st.lists(st.tuples(PLACES | WHOLES, VALUES), min_size=1, max_size=3))
def test_any_value_in_any_place(folder: Path, changes: list[tuple[tuple[str, int, str], Any]]) -> None:
    data = content([(48, 64), (48, 64)], annotations=[thing(1), thing(2, 2)])
    for (name, place, field), value in changes:
        if field and isinstance(data[name][place], dict):
            data[name][place][field] = value
        else:
            data[name][place] = value
    file = folder / "changed.json"
    file.write_text(json.dumps(data))
    try:
        coco = read_coco(file, folder)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return
    objects = coco.objects
    assert len(objects) + sum(finding.left_out for finding in coco.findings) == coco.num_annotations == 2
    assert (
        (objects.boxes[:, 2:] > 0).all() and np.isfinite(objects.boxes).all() and len(coco.fingerprint) == 64
    )
    assert all("\n" not in line for line in (*coco.notes, *map(described, coco.findings)))
