from pathlib import Path

import pytest
import torch

from itpn.engine.distributed import World
from itpn.engine.run import Run
from itpn.errors import UserError

WORLD = World(0, 1, torch.device("cpu"))


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write to the run directory .*file/run.*--run-dir"):
        Run(tmp_path / "file" / "run", {}, WORLD)


def test_a_changed_config_is_said_field_by_field(tmp_path: Path, capsys) -> None:
    Run(tmp_path, {"loop": {"epochs": 3, "seed": 0}, "name": "x"}, WORLD).begin()
    assert capsys.readouterr().out == ""
    Run(tmp_path, {"loop": {"epochs": 4, "seed": 0}, "name": "x"}, WORLD)
    assert capsys.readouterr().out == f"the config of {tmp_path} changes: loop.epochs: 3 -> 4\n"


def test_a_finished_run_says_so(tmp_path: Path) -> None:
    assert Run(tmp_path, {}, WORLD).finished_step is None
    Run(tmp_path, {}, WORLD).finish(12)
    assert Run(tmp_path, {}, WORLD).finished_step == 12


def test_a_damaged_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"damaged config\.json"):
        Run(tmp_path, {}, WORLD)


def test_only_rank_0_writes_and_speaks(tmp_path: Path, capsys) -> None:
    run = Run(tmp_path / "run", {}, World(1, 2, torch.device("cpu")))
    run.say("hello")
    assert not run.directory.exists() and capsys.readouterr().out == ""
