"""What a user types: commands, overrides, and for every mistake one line on stderr and exit status 2."""

import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from itpn import cli
from itpn.errors import UserError

ROOT = Path(__file__).parents[1]
TOY = shlex.split(
    "--model.backbone.width 32 --model.backbone.depths 1 1 1 --model.backbone.num-heads 2 "
    "--model.backbone.image-size 32 --objective.decoder.width 32 --objective.decoder.depth 1 "
    "--epochs 1 --schedule.warmup-epochs 0 --batch-size 4 --device cpu --data.workers 0 --knn.every 0"
)
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def images(tmp_path) -> Path:
    """Eight small images."""
    folder = tmp_path / "images"
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(random.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def complaint(capsys, *arguments: str) -> str:
    """The one line that a mistake gives."""
    assert cli.main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("itpn: ")
    return lines[0].removeprefix("itpn: ")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_its_module(name):
    module = cli.module_of(name)
    assert module == f"itpn.commands.{name.replace('-', '_')}"
    assert importlib.util.find_spec(module) is not None


def test_help_lists_the_commands_without_loading_torch():
    program = (
        "import sys; from itpn.cli import main; main(['--help']); "
        "sys.exit('torch' in sys.modules or 'tyro' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert all(name in done.stdout for name in cli.COMMANDS)


@pytest.mark.parametrize(
    ("raised", "status"), [(UserError("wrong: put it right"), 2), (KeyboardInterrupt(), 130), (None, 0)]
)
def test_exit_status(monkeypatch, capsys, raised, status):
    def run(arguments: list[str]) -> None:
        assert arguments == ["a", "b"]
        if raised:
            raise raised

    monkeypatch.setattr("itpn.commands.configs.run", run)
    assert cli.main(["configs", "a", "b"]) == status
    assert len(capsys.readouterr().err.splitlines()) == (raised is not None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("trian", "no command 'trian'; did you mean train or"),
        ("zzzz", "did you mean train or"),
        (
            "info itpn-pixel_hivit-bas-p16_8xb512-amp-coslr-800e_in1k",
            "the nearest are itpn-pixel_hivit-base-p16_8xb512",
        ),
        ("info configs/none.py", "no config file or name 'configs/none.py'"),
        ("info --epochs 3 pretrain_demo", "give the config before --epochs"),
        ("info pretrain_demo --epoch 3", "Perhaps you meant: --epochs {None}|INT"),
        ("info pretrain_demo --model.bakbone.size itpn_base", "--model.backbone.size"),
        ("info pretrain_demo --seed many", "--seed: invalid literal for int() with base 10: 'many'"),
        ("info pretrain_demo --epochs", "Missing value for argument '--epochs'"),
        ("info pretrain_demo --objective.features.branches some", "Expected one of ('sum', 'levels')"),
        ("info pretrain_demo --model.backbone.size huge", "choose one of hivit_tiny"),
        (
            "info pretrain_demo --model.backbone.image-size 100",
            "not a multiple of the unit of 16 pixels; the nearest is 96",
        ),
        ("info pretrain_demo --objective.mask-ratio 1.5", "must lie between 0.028 and 0.972"),
        ("info pretrain_demo --objective.mask-ratio 0", "must lie between 0.028 and 0.972"),
        ("info pretrain_demo --objective.mask-ratio 0.99", "leaves none visible"),
        ("info pretrain_demo --model.backbone.depths 1 1 0", "at least 1"),
        ("info pretrain_demo --model.backbone.num-heads 0", "at least 1"),
        ("info pretrain_demo --model.backbone.drop-path 1", "drop_path"),
        ("info pretrain_demo --model.pyramid.width -1", "model.pyramid"),
        ("info pretrain_demo --objective.mean 0.5 0.5", "objective.mean"),
        ("info pretrain_demo --objective.std 0 1 1", "objective.std"),
        ("info pretrain_demo --objective.masks-per-image 0", "masks_per_image"),
        ("info pretrain_demo --objective.features.beta -1", "beta"),
        ("info pretrain_demo --objective.decoder.num-heads 0", "objective.decoder"),
        ("info pretrain_demo --clip-grad 0", "--clip-grad"),
        ("info pretrain_demo --checkpoint-every 0", "--checkpoint-every"),
        ("info pretrain_demo --picture-every -1", "--picture-every"),
        ("configs all", "takes no argument but --markdown"),
    ],
)
def test_mistakes_before_anything_runs(capsys, arguments, words):
    assert words in complaint(capsys, *arguments.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--data.root nowhere", "nowhere"),
        ("--data.root empty", "empty"),
        ("--data.root images/0.png", "0.png"),
        ("--batch-size 9", "8 images are fewer than one global batch of 9"),
        ("--device-batch 3", "3"),
        ("--device cuda", "CUDA"),
        ("--run-dir images/0.png/run", "--run-dir"),
        ("--init nowhere.safetensors", "nowhere.safetensors"),
        ("--schedule.warmup-epochs 1", "warmup"),
        (
            "--model.backbone.in-channels 1 --objective.mean 0 --objective.std 1",
            "images are read as 3 channels",
        ),
    ],
)
def test_mistakes_before_training(capsys, elsewhere, images, monkeypatch, arguments, words):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (elsewhere / "empty").mkdir()
    given = ["train", "pretrain_demo", *TOY, "--data.root", "images", *arguments.split()]
    assert words in complaint(capsys, *given)


def test_a_run_directory_of_another_model(capsys, elsewhere, images):
    given = ["train", "pretrain_demo", *TOY, "--data.root", "images", "--run-dir", "run", "--max-steps", "1"]
    assert cli.main(given) == 0
    capsys.readouterr()
    line = complaint(capsys, *given, "--max-steps", "2", "--model.backbone.width", "64")
    assert "run" in line


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_an_override_error_is_one_line_in_any_terminal(encoding):
    command = [sys.executable, "-m", "itpn", "info", "pretrain_demo", "--seed", "many"]
    environment = ENVIRONMENT | {"PYTHONIOENCODING": encoding, "FORCE_COLOR": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr == (
        "itpn: Error parsing --seed: invalid literal for int() with base 10: 'many'; "
        "Argument helptext: --seed INT; see itpn info pretrain_demo --help\n"
    )


def test_overrides_reach_the_recipe():
    from itpn.commands.config import read_config

    given = (
        "--data.root X --epochs 20 --objective.mask-ratio 0.6 --model.backbone.size hivit_small "
        "--objective.features.weight 0.3 --run-dir R --compile --optim.betas 0.8 0.9"
    )
    recipe = read_config(
        "itpn train", ["itpn-pixel_itpn-base-p16_64xb64-amp-coslr-400e_in1k", *given.split()]
    )
    assert recipe.name == "itpn-pixel_itpn-base-p16_64xb64-amp-coslr-400e_in1k"
    assert (recipe.data.root, recipe.loop.epochs, recipe.objective.mask_ratio) == (Path("X"), 20, 0.6)
    assert (recipe.model.backbone.size, recipe.objective.features.weight) == ("hivit_small", 0.3)
    assert (recipe.loop.run_dir, recipe.loop.compile, recipe.optim.betas) == (Path("R"), True, (0.8, 0.9))
    assert recipe.loop.batch_size == 4096


def test_info_tells_the_published_size(capsys):
    assert cli.main(["info", "itpn-pixel_hivit-base-p16_8xb512-amp-coslr-800e_in1k"]) == 0
    said = capsys.readouterr().out
    assert "102.68 M parameters, 102.48 M of them trained" in said
    assert "18.47 G multiply-adds (18,473,799,680)" in said
    assert "backbone" in said and "nothing masked" in said and "224 x 224" in said


def test_info_counts_a_teacher_apart(capsys):
    assert cli.main(["info", "pretrain_demo"]) == 0
    teacher = next(line for line in capsys.readouterr().out.splitlines() if "teacher" in line)
    assert teacher.split()[-2] == "0"


def test_configs_lists_every_config_with_its_remark(capsys, elsewhere):
    (elsewhere / "configs").mkdir()
    (elsewhere / "configs" / "mine.py").write_text('"""My own run."""\n')
    assert cli.main(["configs"]) == 0
    said = capsys.readouterr().out
    assert "mine" in said and "My own run." in said
    assert said.index("hivit-base-p16_8xb512-amp-coslr-400e") < said.index(
        "hivit-base-p16_8xb512-amp-coslr-1600e"
    )


@pytest.mark.parametrize(
    "launcher", [[], ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]]
)
def test_the_published_command_line_from_another_directory(tmp_path, images, launcher):
    script = [str(ROOT / "tools" / "train.py"), "configs/start/pretrain_demo.py"]
    given = [*TOY, "--data.root", "images", "--run-dir", "run"]
    command = [sys.executable, *launcher, *script, *given]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "pretrained.safetensors").is_file()


ENTRIES = {
    "itpn": "from itpn.cli import main; main(['train', 'x'])",
    "-m itpn": "import runpy; runpy.run_module('itpn', run_name='__main__')",
    "tools/train.py": "import runpy; runpy.run_path('tools/train.py', run_name='__main__')",
    "tools/test.py": "import runpy; runpy.run_path('tools/test.py', run_name='__main__')",
}
PROBE = """
import importlib, os, subprocess, sys
from types import SimpleNamespace
sys.argv = ["itpn", "train", "x"]
names = "OMP_WAIT_POLICY GOMP_SPINCOUNT KMP_BLOCKTIME".split()
child = f"import os; print([os.environ.get(name) for name in {names}], flush=True)"
def run(arguments):
    print("torch" in sys.modules, flush=True)
    subprocess.run([sys.executable, "-c", child])
importlib.import_module = lambda name: SimpleNamespace(run=run)
"""


@pytest.mark.parametrize(
    ("entry", "given", "seen"),
    [
        *((entry, {}, ["passive", None, None]) for entry in ENTRIES),
        ("itpn", {"OMP_WAIT_POLICY": "active"}, ["active", None, None]),
        ("itpn", {"GOMP_SPINCOUNT": "1000"}, [None, "1000", None]),
        ("-m itpn", {"KMP_BLOCKTIME": "200"}, [None, None, "200"]),
    ],
)
def test_threads_wait_asleep_before_torch_is_imported_unless_the_user_says_otherwise(entry, given, seen):
    clean = {name: value for name, value in ENVIRONMENT.items() if name not in cli.WAITING}
    told = subprocess.run(
        [sys.executable, "-c", PROBE + ENTRIES[entry]],
        cwd=ROOT, env=clean | given, capture_output=True, text=True,
    )  # fmt: skip
    assert told.stdout == f"False\n{seen}\n", told.stderr
