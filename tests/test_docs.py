"""The documents: every relative link leads somewhere, and the README's Python runs."""

import re
from pathlib import Path

import pytest
import torch

from itpn import cli
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve(page):
    for link in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        assert link.startswith("http") or (page.parent / link).exists(), f"{page.name} links to {link}"


def test_the_readmes_python_runs(tmp_path, monkeypatch):
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    recipe = demo()
    tensors = {n: t for n, t in files.portable(build(recipe)).items() if n.startswith(files.MODEL_PARTS)}
    monkeypatch.chdir(tmp_path)
    Path("runs/pretrain_own-data").mkdir(parents=True)
    files.save(Path("runs/pretrain_own-data/pretrained.safetensors"), tensors, config_of(recipe))
    names = {"images": torch.zeros(1, 3, 96, 128)}
    exec(code, names)
    assert {name: found.shape for name, found in names["maps"].items()} == {
        "p4": (1, 96, 24, 32), "p8": (1, 96, 12, 16), "p16": (1, 96, 6, 8),
    }  # fmt: skip


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


def test_the_bundled_weights_are_what_their_card_says():
    weights = files.read(files.NANO)
    assert files.NANO.stat().st_size <= 8e6
    assert (
        f"{sum(tensor.numel() for tensor in weights.tensors.values()):,}"
        in files.NANO.with_suffix(".md").read_text()
    )
    assert weights.parts == {"backbone", "pyramid", "embed", "mask_token", "decoder", "head"}
