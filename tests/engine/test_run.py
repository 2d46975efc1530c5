import subprocess
import sys
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
    assert capsys.readouterr().out == f"{tmp_path} changes loop.epochs: 3 -> 4\n"


def test_a_changed_config_is_refused_once_there_is_a_checkpoint(tmp_path: Path) -> None:
    before = {"loop": {"epochs": 3, "device": "cpu"}, "knn": {"every": 0}}
    after = {"loop": {"epochs": 4, "device": "mps"}, "knn": {"every": 1}}
    Run(tmp_path, before, WORLD).begin()
    Run(tmp_path, after, WORLD)
    (tmp_path / "checkpoints/00000001").mkdir()
    free = ("loop.device", "knn")
    with pytest.raises(UserError, match=r"began with another loop\.epochs: .*--run-dir.*--force"):
        Run(tmp_path, after, WORLD, free=free)
    Run(tmp_path, {**after, "loop": {"epochs": 3, "device": "mps"}}, WORLD, free=free)
    Run(tmp_path, after, WORLD, free=free, force=True)


def test_what_is_pinned_may_not_change(tmp_path: Path) -> None:
    Run(tmp_path, {}, WORLD).pin("images", "a")
    (tmp_path / "checkpoints/00000001").mkdir()
    Run(tmp_path, {}, WORLD).pin("images", "a")
    with pytest.raises(UserError, match="began with another images"):
        Run(tmp_path, {}, WORLD).pin("images", "b")
    Run(tmp_path, {}, WORLD, force=True).pin("images", "b")


def test_a_directory_in_use_is_refused_until_its_process_ends(tmp_path: Path) -> None:
    program = (
        "import sys, time, torch; from pathlib import Path; from itpn.engine.run import Run; "
        "from itpn.engine.distributed import World; "
        "run = Run(Path(sys.argv[1]), {}, World(0, 1, torch.device('cpu'))); print('ready', flush=True); "
        "time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "ready\n"
        with pytest.raises(UserError, match=rf"is in use by process {other.pid} on .*--run-dir"):
            Run(tmp_path, {}, WORLD)
        other.kill()
    Run(tmp_path, {}, WORLD)


def test_a_finished_run_says_so(tmp_path: Path) -> None:
    assert Run(tmp_path, {}, WORLD).finished_step is None
    Run(tmp_path, {}, WORLD).finish(12)
    assert Run(tmp_path, {}, WORLD).finished_step == 12


def test_a_damaged_config(tmp_path: Path) -> None:
    Run(tmp_path, {}, WORLD)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"damaged config\.json"):
        Run(tmp_path, {}, WORLD)


def test_only_rank_0_writes_and_speaks(tmp_path: Path, capsys) -> None:
    run = Run(tmp_path / "run", {}, World(1, 2, torch.device("cpu")))
    run.say("hello")
    assert not run.directory.exists() and capsys.readouterr().out == ""


def test_what_is_said_is_harmless_to_a_terminal(tmp_path: Path, capsys) -> None:
    Run(tmp_path, {}, WORLD).say("[bold]cat[/bold] \x1b]0;owned\x07\nanother line")
    assert capsys.readouterr().out == "[bold]cat[/bold] \\x1b]0;owned\\x07\nanother line\n"


def test_warnings_are_said_on_a_line_each_and_kept(tmp_path: Path, capsys) -> None:
    run = Run(tmp_path, {}, WORLD)
    run.warn(["class \x1b[1m never occurs", "9 files are left out"])
    told = capsys.readouterr().out.splitlines()
    assert told[-2:] == ["warning: class \\x1b[1m never occurs", "warning: 9 files are left out"]
    assert Run(tmp_path, {}, WORLD).warnings == ["class \x1b[1m never occurs", "9 files are left out"]


@pytest.mark.parametrize(
    "name", ["config.json", "report.json", "checkpoints/00000001/x", "pictures/curves.png"]
)
def test_a_folder_of_other_files_is_no_run_directory(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    with pytest.raises(
        UserError, match=r"not a run directory, and its \w+[^/]* would be replaced: .*--run-dir"
    ):
        Run(tmp_path, {}, WORLD)
    assert path.read_text() == "mine" and not (tmp_path / "run.json").exists()


def test_a_run_may_lie_beside_other_files_and_begin_twice(tmp_path: Path) -> None:
    (tmp_path / "job.log").write_text("mine")
    Run(tmp_path, {}, WORLD)
    (tmp_path / "run.json").unlink()  # as a kill leaves it
    Run(tmp_path, {}, WORLD).begin()
    Run(tmp_path, {}, WORLD)
    assert (tmp_path / "job.log").read_text() == "mine"


def test_a_finished_run_goes_on_to_a_later_end_if_that_is_forced(tmp_path: Path) -> None:
    def run(epochs: int, force: bool = False, seed: int = 0) -> Run:
        return Run(tmp_path, {"loop": {"epochs": epochs, "seed": seed}}, WORLD, force=force)

    run(3).begin()
    (tmp_path / "checkpoints/00000003").mkdir()
    run(3).finish(3)
    with pytest.raises(UserError, match=r"is finished: --force extends it .*--init .*--run-dir"):
        run(5)
    for epochs, seed in (2, 0), (3, 1):
        with pytest.raises(UserError, match=r"is finished, and began with another loop.*: .*--init"):
            run(epochs, force=True, seed=seed)
    longer = run(5, force=True)
    longer.pin("images", "a")
    assert longer.is_extended and longer.finished_step == 3
    longer.begin()
    assert run(5).finished_step is None
