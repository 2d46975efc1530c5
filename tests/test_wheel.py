"""The wheel holds all that is needed: installed apart from the checkout, it trains from another directory."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.test_cli import TOY

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built with the hatchling at hand, as an isolated build would need the network."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (path,) = out.glob("itpn-*.whl")
    return path


@pytest.fixture(scope="module")
def scripts(wheel, tmp_path_factory) -> Path:
    """The commands of a new environment with the wheel and this one's libraries, but no checkout."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    paths = sysconfig.get_paths("venv", vars={"base": str(folder), "platbase": str(folder)})
    libraries = (
        Path(paths["purelib"]) / "libraries.pth"
    )  # a .pth in what it names, an editable install's, is not read
    libraries.write_text(sysconfig.get_paths()["purelib"] + "\n")
    python = Path(paths["scripts"]) / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    run(*pip, "--ignore-installed", wheel, cwd=folder)
    assert run(python, "-c", "import itpn; print(itpn.__file__)", cwd=folder).startswith(paths["purelib"])
    return python.parent


def test_it_holds_configs_and_sample(wheel):
    with zipfile.ZipFile(wheel) as archive:
        assert {"itpn/data/nano.safetensors", "itpn/data/nano.md"} <= set(archive.namelist())
        held = set(archive.namelist())
    expected = {path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.py")}
    sample = {path.relative_to(ROOT) for path in (ROOT / "itpn" / "data" / "sample").iterdir()}
    assert {f"itpn/{path.as_posix()}" for path in expected} <= held
    assert sample and {path.as_posix() for path in sample} <= held
    assert any(name.endswith("licenses/LICENSE") for name in held)
    assert not any(name.startswith(("tests/", "configs/", "tools/")) for name in held)


def test_the_commands_run(scripts, tmp_path):
    listed = run(scripts / "itpn", "configs", cwd=tmp_path)
    assert "itpn-pixel_hivit-base-p16_8xb512-amp-coslr-800e_in1k" in listed
    info = run(
        scripts / "itpn",
        "info",
        "configs/itpn/itpn-pixel_itpn-base-p16_64xb64-amp-coslr-400e_in1k.py",
        cwd=tmp_path,
    )
    assert "108.49 M" in info and "17.85 G" in info


def test_it_trains_from_another_directory(scripts, tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    run(scripts / "itpn", "train", "pretrain_demo", *TOY, "--data.root", "images", cwd=tmp_path)
    assert (tmp_path / "runs" / "pretrain_demo" / "pretrained.safetensors").is_file()
