"""Starting weights have the spread that was read back from the model that mmpretrain builds."""

import json
import re
from pathlib import Path

import pytest
import torch

from itpn.recipes.pretrain import mmpretrain_pixel
from itpn.tasks.pretrain import build
from itpn.weights.files import MODEL_PARTS
from itpn.weights.names import to_ours

REFERENCE = json.loads((Path(__file__).parents[1] / "reference/mmpretrain_init.json").read_text())


def their_name(place: str) -> str:
    """A reference entry stands for all blocks: the first of them will do."""
    first = {
        "norm1": 10,
        "attn": 10,
        "norm": 4,
        "reduction": 4,
    }  # stage 3 begins at entry 10, merge 1 is entry 4
    place = re.sub(
        r"^backbone\.blocks\.#\.(\w+)", lambda m: f"backbone.blocks.{first.get(m[1], 0)}.{m[1]}", place
    )
    place = re.sub(r"ffn\.layers\.#\.#", "ffn.layers.0.0", place)
    return re.sub(r"ffn\.layers\.#", "ffn.layers.1", place)


@pytest.mark.parametrize("place", [p for p in REFERENCE if "decoder_embed" not in p])
def test_spread(started, place):
    name = their_name(place).replace("#", "0")
    blocks = {f"backbone.blocks.{i}.mlp.fc1.bias": torch.zeros(1) for i in range(34)}
    blocks |= {f"backbone.blocks.{i}.reduction.weight": torch.zeros(1) for i in (4, 9)}
    found, _ = to_ours({**blocks, name: torch.ones(1, 1, 1, 1)}, "mmpretrain", "pixel")
    [ours] = [ours for ours, value in found.items() if value.any()]
    weights = started.get_parameter(f"model.{ours}" if ours.startswith(MODEL_PARTS) else ours)
    expected = REFERENCE[place]
    # The standard deviation of n draws scatters by about 1 / sqrt(2 n) of itself: allow five of that.
    scatter = 5 * expected["std"] / (2 * weights.numel()) ** 0.5 + 2e-5
    assert weights.std(unbiased=False).item() == pytest.approx(expected["std"], abs=2 * scatter)
    assert weights.abs().max().item() == pytest.approx(expected["absmax"], rel=0.4, abs=1e-6)


@pytest.fixture(scope="module")
def started():
    return build(mmpretrain_pixel(size="base", epochs=800))
