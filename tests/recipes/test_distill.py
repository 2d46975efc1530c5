"""Every config that distils: its name tells the truth, its student has the published size, and it trains."""

import ast
import re
from dataclasses import replace
from functools import cache

import pytest
import timm
import torch
from torch import nn

from itpn import cli
from itpn.commands.info import backbone_multiply_adds, clip_text_tower, parts
from itpn.engine.optim import adamw
from itpn.engine.schedule import lr_at
from itpn.evaluate.count import count_parameters
from itpn.nn.pyramid import ModelConfig
from itpn.objectives.distill import DistillConfig, DistillObjective
from itpn.objectives.teacher import Teacher, outline
from itpn.recipes.distill import fast_itpn_clip
from itpn.recipes.lookup import config_files, load, packaged
from itpn.recipes.pretrain import Pretrain
from tests.toys import toy_batch

FILES = {
    name: path
    for name, path in config_files(packaged()).items()
    if path.parent.name == "itpn" and "-clip-" in name
}
NAME = re.compile(
    r"(?P<fast>fast-)?itpn-clip-(?P<teacher>[bl])_(?P<family>hivit|itpn|fast_itpn)-(?P<size>\w+)-p16"
    r"(-(?P<pixels>\d+)px)?_(?P<gpus>\d+)xb(?P<per_gpu>\d+)-amp-coslr-(?P<epochs>\d+)e_in1k(?P<odd>-as-published)?"
)
SEED = "itpn-clip-b_hivit-base-p16_8xb256-amp-coslr-800e_in1k"
SIZES = {  # parameters and multiply-adds: mmpretrain's student, the authors', and Fast-iTPN's as built here
    "itpn-clip-b_hivit-base-p16": (83_702_496, 18_473_799_680),
    "itpn-clip-b_itpn-base-p16": (88_738_288, 17_854_226_432),
    "itpn-clip-l_itpn-base-p16": (89_000_944, 17_854_226_432),
    "itpn-clip-b_itpn-large-p16": (307_059_176, 61_193_545_728),
    "itpn-clip-l_itpn-large-p16": (307_452_904, 61_193_545_728),
    "itpn-clip-l_itpn-large-p16-256px": (307_615_912, 80_869_982_208),
    "fast-itpn-clip-l_fast_itpn-tiny-p16": (28_880_946, 5_373_398_016),
    "fast-itpn-clip-l_fast_itpn-small-p16": (44_563_890, 8_986_070_016),
    "fast-itpn-clip-l_fast_itpn-base-p16": (90_366_930, 19_148_566_528),
    "fast-itpn-clip-l_fast_itpn-large-p16": (319_320_594, 65_932_167_168),
}


def promised_names() -> set[str]:
    fast = {f"fast-itpn-clip-l_fast_itpn-{s}-p16" for s in ("tiny", "small", "base", "large")}
    official = {name for name in SIZES if "_itpn-" in name and name not in fast}
    return (
        {f"itpn-clip-b_hivit-base-p16_8xb256-amp-coslr-{e}e_in1k" for e in (300, 800)}
        | {f"{SEED}-as-published", "itpn-clip-b_itpn-base-p16_64xb32-amp-coslr-800e_in1k"}
        | {f"{name}_64xb32-amp-coslr-300e_in1k" for name in official}
        | {f"{name}_64xb32-amp-coslr-{e}e_in1k" for name in fast for e in (300, 1600)}
    )


@cache
def on_meta(model: ModelConfig, config: DistillConfig) -> DistillObjective:
    with torch.device("meta"):
        return DistillObjective(model, config)


@cache
def outlined(name: str) -> Teacher:
    recipe = load(FILES[name])
    return outline(recipe.objective, recipe.model.backbone.grid)


def shrunk(recipe: Pretrain) -> Pretrain:
    """The same choices, toy numbers."""
    model = recipe.model
    backbone = replace(model.backbone, width=32, depths=(1, 1, 2), num_heads=2, image_size=64)
    few = {"target_width": 64, "target": "tokens", "num_hidden": 6, "min_block": 2, "teacher": "test_vit"}
    return replace(
        recipe,
        model=replace(model, backbone=backbone, pyramid=replace(model.pyramid, width=24)),
        objective=replace(recipe.objective, **few),
    )


def test_every_promised_config_is_there_and_short():
    assert set(FILES) == promised_names()
    assert all(3 <= len(path.read_text().splitlines()) <= 10 for path in FILES.values())


@pytest.mark.parametrize("name", FILES)
def test_a_name_agrees_with_its_contents(name):
    match = NAME.fullmatch(name)
    assert match is not None
    told, recipe = match.groupdict(), load(FILES[name])
    model, config, teacher = recipe.model, recipe.objective, outlined(name)
    assert model.backbone.size == f"{told['family']}_{told['size']}"
    assert (model.pyramid.layers == "fast") == (config.fuse == "units") == bool(told["fast"])
    assert model.backbone.image_size == int(told["pixels"] or 224)
    assert recipe.loop.batch_size == int(told["gpus"]) * int(told["per_gpu"]) == 2048
    assert recipe.loop.epochs == int(told["epochs"])
    assert (teacher.vit.embed_dim, teacher.vit.patch_embed.patch_size) == {
        "b": (768, (16, 16)),
        "l": (1024, (14, 14)),
    }[told["teacher"]]
    assert config.teacher.endswith("quickgelu_224.openai")
    assert (config.loss == "cross-entropy") == bool(told["odd"])


@pytest.mark.parametrize("name", FILES)
def test_the_teacher_fits_the_student_at_the_published_resolution(name):
    recipe = load(FILES[name])
    DistillObjective.attach(on_meta(recipe.model, recipe.objective), outlined(name))
    expected = 224 if "clip-b" in name or "256px" in name else 196
    assert outlined(name).image_size == expected


@pytest.mark.parametrize("name", FILES)
def test_the_schedule_is_the_published_one(name):
    recipe = load(FILES[name])
    epochs, warmup = recipe.loop.epochs, 5 if "_itpn-" in name and "fast" not in name else 10
    peak = recipe.optim.peak_lr(recipe.loop.batch_size)

    def lr(epoch: float) -> float:
        return lr_at(int(epoch * 100), recipe.schedule, peak=peak, epochs=epochs, steps_per_epoch=100)

    expected = [1.5e-7 if "hivit" in name else 0.0, 1.5e-3, 1e-5 + 1.49e-3 / 2, 1e-5]
    assert [lr(0), lr(warmup), lr((warmup + epochs) / 2), lr(epochs)] == pytest.approx(expected, abs=1e-12)
    long_run = "hivit" in name and epochs == 800
    assert recipe.optim.betas == (0.9, 0.999 if long_run else 0.98)
    assert recipe.loop.clip_grad == (None if warmup == 5 else 3.0)
    assert recipe.model.backbone.drop_path == (
        0.0 if "hivit" in name and epochs == 300 else 0.2 if "itpn-large" in name and warmup == 5 else 0.1
    )


@pytest.mark.parametrize("name", FILES)
def test_sizes_are_the_published_ones(name):
    recipe = load(FILES[name])
    objective = on_meta(recipe.model, recipe.objective)
    total, macs = SIZES[name.partition("_64xb32")[0].partition("_8xb256")[0]]
    frozen = 196 * 512 if "hivit" in name else 0
    found = count_parameters(objective)
    assert (found.total, found.trainable) == (total, total - frozen)
    assert sum(count_parameters(part).total for part in parts(objective).values()) == total
    assert backbone_multiply_adds(objective.model.backbone, recipe.image_size) == macs


def test_fast_itpns_one_known_size():
    """A log of its pre-training, on CLIP's unprojected 768 channels, names this number."""
    recipe = fast_itpn_clip(size="base", epochs=300)
    objective = on_meta(recipe.model, replace(recipe.objective, target_width=768))
    assert count_parameters(objective).total == 90_235_602


def test_the_unbounded_loss_is_said_where_it_is_chosen():
    for name in (SEED, f"{SEED}-as-published"):
        assert "bound" in (ast.get_docstring(ast.parse(FILES[name].read_text())) or "")
    plain, odd = load(FILES[SEED]), load(FILES[f"{SEED}-as-published"])
    assert replace(odd, name=SEED, objective=replace(odd.objective, loss="cosine")) == plain


def test_clips_text_tower_is_counted_as_torch_builds_it():
    with torch.device("meta"):
        block = nn.TransformerEncoderLayer(512, 8, 4 * 512)
        rest = [nn.Embedding(49_408, 512), nn.Embedding(77, 512), nn.LayerNorm(512)]
        rest += [nn.Linear(512, 512, bias=False)]
    expected = 12 * count_parameters(block).total + sum(count_parameters(part).total for part in rest) + 1
    assert clip_text_tower() == expected == 63_428_097


def test_info_counts_the_teacher_and_never_reaches_for_a_network(capsys, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("connected"))
    assert cli.main(["info", f"{SEED}-as-published"]) == 0
    said = capsys.readouterr().out
    [row] = [line for line in said.splitlines() if "teacher, frozen" in line]
    assert "86,192,640" in row
    assert "14 x 14 tokens of 224 x 224 pixels, targets 512 wide" in said
    assert "233.3 M (233,323,233)" in said and "63.4 M (63,428,097)" in said
    assert "18.47 G multiply-adds" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--objective.teacher vit_small_patch16_224", "target_width is 512.*1000 channels"),
        ("--objective.teacher vit_small_patch16_22", "nearest are vit_small_patch16_224"),
        ("--objective.teacher resnet50", "no plain vision transformer"),
        ("--objective.teacher vit_small_patch14_dinov2", "no projection of tokens; use 'tokens'"),
    ],
)
def test_info_refuses_a_teacher_as_training_would(capsys, arguments, words):
    assert cli.main(["info", SEED, *arguments.split()]) == 2
    complaint = capsys.readouterr().err
    assert re.search(words, complaint.replace("-width", "_width"))
    assert complaint.count("\n") == 1


@pytest.mark.parametrize("name", FILES)
def test_one_step_moves_every_trained_parameter(name):
    recipe = shrunk(load(FILES[name]))
    torch.manual_seed(0)
    objective = DistillObjective(recipe.model, recipe.objective)
    objective.attach(Teacher(timm.create_model("test_vit"), recipe.objective, (4, 4)))
    before = {key: value.detach().clone() for key, value in objective.named_parameters()}
    optimizer = adamw(objective, recipe.optim)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    objective(toy_batch(objective, size=2))["loss"].backward()
    optimizer.step()
    still = [key for key, value in objective.named_parameters() if torch.equal(value, before[key])]
    assert still == [key for key, value in objective.named_parameters() if not value.requires_grad]
    assert all(value.isfinite().all() for value in objective.parameters())
