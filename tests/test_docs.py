"""The documents: links and anchors lead somewhere, lines are short, and the Python in them runs."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from itpn import cli
from itpn.data.labelled import find_masks
from itpn.data.picture import BadImageError
from itpn.recipes.lookup import config_files, packaged
from itpn.recipes.pretrain import demo
from itpn.tasks.common import config_of
from itpn.tasks.pretrain import build
from itpn.weights import files
from tests.weights.released import converted, load

ROOT = Path(__file__).parents[1]
PAGES = [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/*.md"),
    *ROOT.glob("itpn/data/**/*.md"),
    *ROOT.glob("tests/**/*.md"),
]


WRAPPED = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose(page: Path) -> list[str]:
    """The lines of a page outside of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE).splitlines()


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    headings = (line.lstrip("#").strip() for line in prose(page) if line.startswith("#"))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_and_their_anchors_resolve(page):
    for link in re.findall(r"\]\(([^)\s]+)", "\n".join(prose(page))):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{name_of(page)} links to {link}"
        assert not anchor or anchor in anchors(target), f"{name_of(page)} links to {link}"


@pytest.mark.parametrize("page", WRAPPED, ids=name_of)
def test_lines_wrap_at_100_columns(page):
    """Tables, code and pictures excepted."""
    long = [line for line in prose(page) if len(line) > 100 and not line.startswith(("|", "    ", "!["))]
    assert not long


@pytest.mark.parametrize("page", WRAPPED, ids=name_of)
def test_every_config_that_a_page_names_is_there(page):
    named = re.findall(r"itpn (?:train|test|info|bench \w+) ([a-z][\w-]*_[\w-]+)", page.read_text())
    assert set(named) <= set(config_files(packaged()))


def test_the_readme_is_read_in_a_minute():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110


def test_every_module_in_the_tree_of_the_architecture_is_there():
    page = (ROOT / "docs/architecture.md").read_text()
    tree, folder = page[page.index("\nitpn/\n") :], ROOT / "itpn"
    for line in tree[: tree.index("\n```")].splitlines()[2:]:
        if room := re.match(r"  (\w+/)", line):
            folder = ROOT / "itpn" / room[1]
        elif re.match(r"  \w", line):
            folder = ROOT / "itpn"
        for module in re.findall(r"(?<![\w/])\w+\.py", line):
            assert (folder / module).is_file() or (ROOT / "itpn" / module).is_file(), module


def test_the_map_names_every_page():
    linked = set(re.findall(r"\]\((\w+\.md)\)", (ROOT / "docs/index.md").read_text()))
    assert linked == {page.name for page in ROOT.glob("docs/*.md")} - {"index.md"}


def test_the_readmes_python_runs(tmp_path, monkeypatch):
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    recipe = demo()
    tensors = {n: t for n, t in files.portable(build(recipe)).items() if n.startswith(files.MODEL_PARTS)}
    run = tmp_path / "runs/pretrain_own-data"
    run.mkdir(parents=True)
    files.save(run / "pretrained.safetensors", tensors, config_of(recipe))
    monkeypatch.chdir(tmp_path)
    names = {"images": torch.zeros(1, 3, 96, 128)}
    exec(code, names)
    assert {name: found.shape for name, found in names["maps"].items()} == {
        "p4": (1, 96, 24, 32), "p8": (1, 96, 12, 16), "p16": (1, 96, 6, 8),
        "p32": (1, 96, 3, 4), "p64": (1, 96, 1, 2),
    }  # fmt: skip
    names["detector"].transform.min_size = (96,)
    [found] = names["detector"].eval()([torch.rand(3, 96, 128)])
    assert found["boxes"].shape[1] == 4


def test_the_python_of_the_page_about_weights_runs(tmp_path, monkeypatch):
    """In order, with the bundled nano model for a base and a Fast-iTPN written back as theirs."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/weights.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("base.safetensors").write_bytes(files.NANO.read_bytes())
    fast = converted("fast_finetune_meanpool")
    files.save(Path("fast.safetensors"), fast.tensors, fast.config)
    assert cli.main(["convert", "fast.safetensors", "theirs.safetensors", "--to", "official-fast"]) == 0
    names = {"images": torch.zeros(1, 3, 96, 128)}
    for code in blocks:
        exec(code.replace("itpn_base", "itpn_nano"), names)
    assert list(names["maps"]) == ["p4", "p8", "p16", "p32", "p64"]
    [found] = names["detector"].eval()([torch.rand(3, 96, 128)])
    assert found["boxes"].shape[1] == 4
    theirs, (_, state) = torch.load("theirs.pt", weights_only=True)["model"], load("fast_finetune_meanpool")
    assert theirs.keys() == state.keys() and all(torch.equal(theirs[key], state[key]) for key in state)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("colour", [(128, 0, 0), (250, 250, 250)], ids=["colour", "smoothed grey"])
def test_the_python_of_the_page_about_data_makes_labels_of_other_pictures(
    tmp_path, monkeypatch, kind, colour
):
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs/data.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    truth = np.zeros((32, 32), np.uint8)
    truth[8:24, 16:] = 1
    picture = Image.fromarray(truth[..., None] * np.array(colour, np.uint8))
    ending = ".png" if kind == "PNG" else ".jpg"
    for folder, image in (("images", Image.new("RGB", (32, 32), "red")), ("masks", picture)):
        path = Path(f"data/mine/{folder}/train/a{ending}")
        path.parent.mkdir(parents=True)
        image.save(path, kind)
    Path("data/mine/classes.txt").write_text("background\nbuilding\n")
    with pytest.raises(BadImageError, match=r"docs/data\.md shows|name all classes"):
        find_masks(Path("data/mine")).pair(0)
    exec(code, {})
    found = find_masks(Path("data/mine")).pair(0)[1]
    assert (found == truth).mean() > 0.97  # a JPEG's colours run over the edges
    assert kind == "JPEG" or (found == truth).all()


def test_the_bundled_weights_are_what_their_card_says():
    weights = files.read(files.NANO)
    assert files.NANO.stat().st_size <= 8e6
    assert (
        f"{sum(tensor.numel() for tensor in weights.tensors.values()):,}"
        in files.NANO.with_suffix(".md").read_text()
    )
    assert weights.parts == {"backbone", "pyramid", "embed", "mask_token", "decoder", "head"}
