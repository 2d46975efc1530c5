"""A checkpoint that an earlier version wrote: every version must go on from it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from itpn.engine import checkpoint
from itpn.recipes.pretrain import Pretrain
from itpn.tasks.pretrain import pretrain
from itpn.weights import files
from tests.engine.processes import losses, write_images

STORED = Path(__file__).parents[1] / "reference" / "checkpoint_format_1"


def test_a_checkpoint_of_format_1_is_gone_on_from(tmp_path: Path, capsys) -> None:
    """With its own config, on the images it was made with; the losses are those that followed then."""
    run, images = tmp_path / "run", tmp_path / "images"
    shutil.copytree(STORED, run / "checkpoints")
    write_images(images)
    assert checkpoint.read_state(STORED / "00000008")["format"] == 1
    recipe = files.read(run).recipe(Pretrain)
    loop = replace(recipe.loop, run_dir=run, max_steps=12)
    pretrain(replace(recipe, data=replace(recipe.data, root=images), loop=loop))
    said = capsys.readouterr().out
    assert "step 8 of 20" in said and "damaged" not in said
    expected = json.loads((STORED / "losses_after.json").read_text())
    assert losses(run) == pytest.approx({int(step): loss for step, loss in expected.items()}, abs=1e-4)
