"""What `itpn configs` shows of the packaged configs is true, and is what the documents show."""

from dataclasses import replace
from pathlib import Path

import pytest

from itpn import cli
from itpn.commands.configs import row, sizes
from itpn.commands.info import size_of
from itpn.recipes.lookup import Recipe, config_files, load, packaged

RECIPES = {name: load(path) for name, path in config_files(packaged()).items()}
STORED = sizes(packaged())
CURE = "python tools/count_configs.py writes configs/sizes.json anew"


def counted(recipe: Recipe) -> str:
    """Name all that parameters and multiply-adds depend on."""
    model = replace(recipe.model, backbone=replace(recipe.model.backbone, drop_path=0.0))
    parts = ("objective", "classifier", "detector", "segmenter", "image_size")
    return repr((model, [getattr(recipe, part, None) for part in parts]))


FIRST = {counted(recipe): name for name, recipe in reversed(RECIPES.items())}


@pytest.mark.parametrize("name", FIRST.values())
def test_stored_sizes_are_those_of_the_models(name):
    assert STORED[name] == size_of(RECIPES[name]), CURE


@pytest.mark.parametrize("name", sorted(set(RECIPES) - set(FIRST.values())))
def test_configs_of_one_model_have_the_same_size(name):
    like = FIRST[counted(RECIPES[name])]
    loop = RECIPES[name].loop
    assert STORED[name] == STORED[like] | {"epochs": STORED[name]["epochs"]}, CURE
    assert STORED[name]["epochs"] == (f"{loop.iterations:,} steps" if loop.iterations else str(loop.epochs))


def test_every_packaged_config_has_a_size_and_nothing_else_does():
    assert set(STORED) == set(RECIPES), CURE


def test_the_page_of_configs_shows_what_the_command_prints(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["configs", "--markdown"]) == 0
    page = Path(__file__).parents[1] / "docs" / "configs.md"
    assert page.read_text().endswith(capsys.readouterr().out.strip() + "\n")


def test_a_config_of_ones_own_has_no_stored_size(tmp_path):
    (tmp_path / "mine.py").write_text('"""My own run."""\n')
    assert row(tmp_path / "mine.py", None) == ("mine", "", "", "", "", "My own run.")
