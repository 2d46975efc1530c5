"""Files of weights, folders and exports, which people publish, name no path and no user, and are the same
bytes each time."""

import hashlib
import json
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from safetensors import safe_open

import itpn
from itpn import cli
from itpn.engine import checkpoint
from itpn.engine.distributed import World
from itpn.objectives.stages import FrozenConfig
from itpn.recipes import classify, detect, distill, pretrain, segment
from itpn.recipes.pretrain import Pretrain
from itpn.recipes.segment import Segment
from itpn.tasks.common import config_of, open_run
from itpn.weights import files
from tests.toys import toy_model, toy_objective


def taught() -> Pretrain:
    """A recipe that learns pixels beside a teacher of its stages."""
    recipe = pretrain.demo()
    objective = replace(recipe.objective, frozen=FrozenConfig(weight=1.0), teacher="test_vit")
    return replace(recipe, objective=objective)


def masks() -> Segment:
    """A recipe that reads label pictures, for which a file can name the classes."""
    recipe = segment.demo()
    return replace(recipe, data=replace(recipe.data, format="masks"))


RECIPES = {
    "pretrain": taught,
    "distill": partial(distill.mmpretrain_clip, epochs=1),
    "classify": classify.demo,
    "detect": detect.demo,
    "segment": masks,
}
PLACE = Path("/home/somebody/secret")


def with_paths(recipe: Any) -> Any:
    """A recipe in which every field that takes a path has one."""
    kinds, changed = get_type_hints(type(recipe)), {}
    for field in fields(recipe):
        value, kind = getattr(recipe, field.name), kinds[field.name]
        if is_dataclass(value):
            changed[field.name] = with_paths(value)
        elif kind is Path or Path in get_args(kind):
            changed[field.name] = PLACE / field.name
    return replace(recipe, **changed)


def recipe_of(kind: str) -> Any:
    return with_paths(RECIPES[kind]())


def strings_in(values: Any) -> set[str]:
    match values:
        case dict():
            return set().union(*map(strings_in, values.values()))
        case list():
            return set().union(*map(strings_in, values))
    return {values} if isinstance(values, str) else set()


@pytest.mark.parametrize("kind", RECIPES)
def test_no_path_of_a_recipe_is_in_what_its_files_say(kind):
    recipe = recipe_of(kind)
    whole, told = (config_of(recipe, paths=paths) for paths in (True, False))
    given = {text for text in strings_in(whole) if str(PLACE) in text}
    assert {str(PLACE / name) for name in ("root", "init", "run_dir")} <= given
    assert ("teacher_weights" in str(given)) == (kind in ("pretrain", "distill"))
    assert "secret" not in json.dumps(told)
    assert files.structured(told, type(recipe)).model == recipe.model


def test_a_checkpoint_keeps_paths_out_of_its_weights_and_in_its_state(tmp_path):
    recipe = recipe_of("pretrain")
    recipe = replace(recipe, loop=replace(recipe.loop, run_dir=tmp_path / "run"))
    run = open_run(recipe, World(0, 1, torch.device("cpu")))
    directory = checkpoint.save(
        run.checkpoints, 1, {"a": torch.ones(1)}, {}, config=run.config, portable=run.portable, progress={}
    )
    assert b"secret" in (directory / "state.json").read_bytes()
    published = (directory / "model.safetensors").read_bytes()
    assert b"secret" not in published and str(tmp_path).encode() not in published
    assert json.loads(safe_open(directory / "model.safetensors", "pt").metadata()["config"])["name"] == ""


@pytest.fixture
def older(tmp_path):
    """A file as earlier versions wrote it, with the paths of its run."""
    objective = toy_objective()
    recipe = replace(pretrain.demo(), model=toy_model(), objective=objective.config)
    config = config_of(replace(recipe, init=PLACE / "init.safetensors"))
    config["objective"]["teacher_weights"] = str(PLACE / "teacher.pth")
    config["objective"] |= {"teacher": "test_vit", "frozen": {"weight": 1.0}}
    files.save(tmp_path / "older.safetensors", objective.model.state_dict(), config)
    return tmp_path / "older.safetensors"


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt2", "a.onnx"])
def test_exports_of_an_older_file_name_no_path_and_are_the_same_bytes(tmp_path, older, name):
    hashes = set()
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        assert cli.main(["export", str(older), str(tmp_path / folder / name)]) == 0
        written = (tmp_path / folder / name).read_bytes()
        for said in (
            b"secret",
            b"somebody",
            str(tmp_path).encode(),
            str(Path(itpn.__file__).parent).encode(),
        ):
            assert said not in written
        assert b"site-packages" not in written
        hashes.add(hashlib.sha256(written).hexdigest())
    assert len(hashes) == 1


def test_a_folder_made_of_an_older_file_names_no_path(tmp_path, older):
    itpn.load(older).save_pretrained(tmp_path / "folder")
    for path in (tmp_path / "folder").iterdir():
        assert b"secret" not in path.read_bytes() and str(tmp_path).encode() not in path.read_bytes()


WRITE = """
import sys
from pathlib import Path
import torch
from itpn.weights import files

tensors = {name: torch.arange(6.0).reshape(2, 3) for name in ("b", "a", "ä")}
tensors["half"] = torch.ones(3, dtype=torch.float16)
source = {"file": "a \\"quoted\\" name\\n.pth", "left_out": {"é": "x"}}
files.save(Path(sys.argv[1]), tensors, {"classes": ["猫", "dog", "\\x7f\\x01"]}, source)
"""


def test_the_same_weights_are_the_same_bytes_in_every_process(tmp_path):
    written = []
    for seed in ("1", "2"):
        path = tmp_path / f"{seed}.safetensors"
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)}
        subprocess.run([sys.executable, "-c", WRITE, path], check=True, env=environment)
        written.append(path.read_bytes())
    assert written[0] == written[1]
    with safe_open(path, "pt") as file:
        assert torch.equal(file.get_tensor("ä"), torch.arange(6.0).reshape(2, 3))
        assert list(json.loads(file.metadata()["config"])["classes"]) == ["猫", "dog", "\x7f\x01"]


def test_the_metadata_of_a_file_is_in_order(tmp_path):
    """The library's own order is random: hardly would eight files of six entries all have this one."""
    for i in range(8):
        path = tmp_path / f"{i}.safetensors"
        checkpoint.write_tensors(path, {"a": torch.ones(2)}, {name: name for name in "fbdeac"})
        content = path.read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        assert list(header["__metadata__"]) == list("abcdef")


def test_a_file_with_paths_loads(older):
    assert itpn.load(older).config == toy_model()
    assert files.read(older).config["init"] == str(PLACE / "init.safetensors")
