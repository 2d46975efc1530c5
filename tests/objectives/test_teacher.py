"""The teacher against the authors' numbers for a small CLIP, and against timm's own ways elsewhere."""

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.testing import assert_close

from itpn.errors import UserError
from itpn.objectives.teacher import Teacher, TeacherConfig, build_teacher, outline
from itpn.objectives.vision_transformers import CLIP, from_openai, from_timm

REFERENCE = load_file(Path(__file__).parents[1] / "reference" / "clip_teacher.safetensors")
STATE = {key.removeprefix("state."): x for key, x in REFERENCE.items() if key.startswith("state.")}
PUBLISHED = {"teacher_images": "published", "teacher_positions": "published"}
TOKENS = TeacherConfig(target="tokens", target_normalisation="none")
FILE = Path("weights.safetensors")


def clip(grid=None, **options) -> Teacher:
    return Teacher(from_openai(STATE, num_heads=2), TeacherConfig(**options), grid)


def toy_vit(name="vit_tiny_patch16_224", **sizes):
    """A small timm model with random weights, away from its start."""
    torch.manual_seed(0)
    vit = timm.create_model(name, **{"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 64} | sizes)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return vit


@pytest.mark.parametrize(
    ("images", "expected", "grid", "options"),
    [
        ("image01", "ln_post_tokens", None, PUBLISHED | {"target": "tokens", "target_normalisation": "none"}),
        ("image01", "target", None, PUBLISHED),
        ("image01_40", "target_40", (5, 5), PUBLISHED),
        ("image01", "alt.target_proper_normalisation", None, {}),
    ],
)
def test_reproduces_the_authors_teacher(images, expected, grid, options):
    targets, _ = clip(grid, **options)(REFERENCE[images])
    assert_close(targets, REFERENCE[expected], atol=1e-5, rtol=0)


def test_each_published_option_matters():
    with_both, _ = clip((5, 5), **PUBLISHED)(REFERENCE["image01_40"])
    for option in PUBLISHED:
        others = {key: value for key, value in PUBLISHED.items() if key != option}
        targets, _ = clip((5, 5), **others)(REFERENCE["image01_40"])
        assert (targets - with_both).abs().max() > 1e-2


def test_openai_names_with_and_without_prefix_and_with_a_text_tower():
    text = {"transformer.resblocks.0.ln_1.weight": torch.ones(8), "logit_scale": torch.ones(())}
    bare = {key.removeprefix("visual."): x for key, x in STATE.items()}
    for state in (STATE | text, bare):
        vit = from_openai(state, num_heads=2)
        assert_close(vit.state_dict(), from_openai(STATE, num_heads=2).state_dict(), atol=0, rtol=0)
        assert "state_dict" not in vit.pretrained_cfg


def test_openai_heads_are_64_wide_and_half_precision_becomes_single():
    def widened(x: torch.Tensor) -> torch.Tensor:
        return x.repeat(*(4 if size in (32, 96, 128) else 1 for size in x.shape)).half()

    vit = from_openai({key: widened(x) for key, x in STATE.items()})
    assert vit.blocks[0].attn.num_heads == 2 and vit.embed_dim == 128
    assert {parameter.dtype for parameter in vit.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("left_out", "words"),
    [
        ("visual.conv1.weight", "visual.conv1.weight.*objective.teacher"),
        ("visual.proj", "visual.proj.*objective.teacher"),
        ("visual.ln_pre.bias", "norm_pre.bias"),
        ("visual.transformer.resblocks.1.mlp.c_proj.bias", "blocks.1.mlp.fc2.bias"),
    ],
)
def test_says_what_openai_weights_lack(left_out, words):
    with pytest.raises(UserError, match=words):
        from_openai({key: x for key, x in STATE.items() if key != left_out}, num_heads=2)


@pytest.mark.parametrize("name", STATE)
@pytest.mark.parametrize("shape", [(), (0,), (2, 3), (0, 0), (0, 3, 8, 8), (32, 3, 0, 0), (1, 2, 3, 4, 5)])
def test_refuses_openai_weights_of_other_shapes(name, shape):
    with pytest.raises(UserError, match=r"--objective\.teacher-weights") as caught:
        from_openai(STATE | {name: torch.zeros(shape)}, num_heads=2)
    assert "\n" not in str(caught.value)


def test_does_not_guess_heads():
    with pytest.raises(UserError, match="32 channels"):
        from_openai(STATE)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("vit_tiny_patch16_224", {}),
        (
            "vit_small_patch14_reg4_dinov2",
            {"img_size": 56},
        ),  # registers, no class token in the position table
        ("deit_tiny_distilled_patch16_224", {}),  # two prefix tokens, with positions
        ("eva02_tiny_patch14_224", {"img_size": 56}),  # rotary positions
        ("vit_small_patch16_dinov3", {}),  # rotary positions alone, registers
    ],
)
def test_tokens_of_other_transformers_are_timms_own(name, sizes):
    vit = toy_vit(name, **sizes)
    teacher = Teacher(vit, TOKENS, (3, 3))
    images = torch.rand(2, 3, teacher.image_size, teacher.image_size)
    mean, std = (torch.tensor(vit.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    *_, expected = vit.forward_intermediates(
        (images - mean) / std, indices=1, norm=True, output_fmt="NLC", intermediates_only=True
    )
    targets, _ = teacher(images)
    assert targets.shape == (2, 9, teacher.width)
    assert_close(targets, vit.fc_norm(expected), atol=1e-5, rtol=1e-5)


def test_own_resampling_is_what_timm_does_for_any_size():
    name = "vit_base_patch16_reg4_gap_256"
    vit = toy_vit(name)
    flexible = toy_vit(name, dynamic_img_size=True).eval()
    flexible.load_state_dict(vit.state_dict())
    teacher = Teacher(vit, replace(TOKENS, target="projected"), (3, 3))
    images = torch.rand(2, 3, 48, 48)
    tokens = flexible.forward_features((images - teacher.mean) / teacher.std)[:, 4:]
    assert_close(teacher(images).targets, flexible.head(flexible.fc_norm(tokens)), atol=1e-5, rtol=1e-5)


def test_published_resampling_keeps_the_positions_of_prefix_tokens():
    vit = toy_vit("deit_tiny_distilled_patch16_224")
    prefix = vit.pos_embed[:, :2].clone()
    teacher = Teacher(vit, replace(TOKENS, teacher_positions="published"), (3, 3))
    assert teacher.vit.pos_embed.shape == (1, 2 + 9, 32)
    assert_close(teacher.vit.pos_embed[:, :2], prefix, atol=0, rtol=0)


@given(side=st.integers(1, 40), patch=st.sampled_from([8, 14, 16]))
def test_image_size_follows_from_the_grid(side, patch):
    teacher = Teacher(toy_vit(patch_size=patch, img_size=4 * patch, depth=1), TOKENS, (side, side))
    assert teacher.image_size == teacher.needed_size((side, side)) == side * patch
    assert teacher.vit.patch_embed.grid_size == (side, side)


def test_refuses_other_sizes():
    teacher = clip()
    with pytest.raises(UserError, match="4 x 4 tokens need 32 x 32"):
        teacher(REFERENCE["image01_40"])
    with pytest.raises(UserError, match="not square"):
        teacher.needed_size((4, 5))


def test_stays_frozen_and_in_evaluation_mode():
    parent = torch.nn.Sequential(Teacher(toy_vit(drop_path_rate=0.5, proj_drop_rate=0.5), TOKENS)).train()
    images = torch.rand(2, 3, 64, 64, requires_grad=True)
    first = parent(images)
    assert not any(tensor.requires_grad for tensor in (first.targets, *first.blocks))
    assert not any(parameter.requires_grad for parameter in parent.parameters())
    assert_close(parent(images), first, atol=0, rtol=0)


def test_bytes_are_floats_times_255():
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert_close(clip()(images), clip()(images / 255))


def test_targets_are_normalised_in_single_precision_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        targets, _ = clip()(REFERENCE["image01"])
    assert targets.dtype == torch.float32
    assert_close(targets.mean(-1), torch.zeros(2, 16), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("depth", "thirds"), [(12, [3, 7, 11]), (24, [7, 15, 23]), (2, [0, 0, 1]), (1, [0, 0, 0])]
)
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_blocks_at_thirds_of_the_depth(name, depth, thirds):
    vit = toy_vit(name, depth=depth, img_size=56 if "14" in name else 64)
    teacher, seen = Teacher(vit, TOKENS), {}
    for number, block in enumerate(vit.blocks):
        block.register_forward_hook(lambda _, __, tokens, number=number: seen.update({number: tokens}))
    _, blocks = teacher(torch.rand(2, 3, teacher.image_size, teacher.image_size))
    assert teacher.thirds == thirds
    for number, tokens in zip(thirds, blocks, strict=True):
        assert_close(tokens, seen[number][:, vit.num_prefix_tokens :], atol=0, rtol=0)


def test_weights_that_are_not_finite_are_refused():
    state = timm.create_model("test_vit").state_dict()
    state["blocks.1.norm1.bias"][3] = torch.nan
    config = replace(TOKENS, teacher="test_vit", teacher_weights=FILE)
    with pytest.raises(UserError, match=r"--objective\.teacher-weights: blocks\.1\.norm1\.bias .*NaN"):
        build_teacher(config, state=state)


@pytest.mark.parametrize(
    "name", ["vit_small_patch16_224", "eva02_small_patch14_224", "vit_small_patch16_dinov3"]
)
def test_flops_are_those_of_its_blocks(name):
    """Two for each multiply-add: patches, four projections, two products of attention, and the MLP."""
    depth, width, num_heads = 3, 32, 2
    vit = toy_vit(name, depth=depth, embed_dim=width, num_heads=num_heads)
    teacher = Teacher(vit, TOKENS, (4, 4))
    flops, taught = teacher.flops_per_image()
    mlp = sum(p.numel() for n, p in vit.blocks[0].mlp.named_parameters() if p.ndim == 2)
    tokens = 16 + vit.num_prefix_tokens
    block = tokens * (4 * width**2 + mlp) + 2 * tokens**2 * width
    assert flops == 2 * (16 * 3 * vit.patch_embed.patch_size[0] ** 2 * width + depth * block)
    assert taught.targets.is_meta and taught.targets.shape == (1, 16, width)
    assert not any(parameter.is_meta for parameter in vit.parameters())


@pytest.mark.parametrize("sizes", [{"num_classes": 0}, {"global_pool": "map"}])
def test_a_teacher_without_a_projection_of_tokens_says_so(sizes):
    with pytest.raises(UserError, match="'tokens'"):
        Teacher(toy_vit(**sizes), TeacherConfig())


def test_weights_of_a_named_model_come_from_its_file():
    torch.manual_seed(0)
    vit = timm.create_model("test_vit").eval()
    teacher = build_teacher(TeacherConfig(teacher="test_vit", teacher_weights=FILE), state=vit.state_dict())
    assert_close(teacher.vit.state_dict(), vit.state_dict(), atol=0, rtol=0)


def test_weights_of_another_model_are_refused_in_one_line():
    with pytest.raises(UserError, match=r"objective\.teacher-weights.*test_vit") as caught:
        build_teacher(TeacherConfig(teacher="test_vit", teacher_weights=FILE), state=STATE)
    assert "\n" not in str(caught.value)


def test_without_name_and_file_both_ways_are_named():
    with pytest.raises(UserError, match=r"objective\.teacher.*objective\.teacher-weights"):
        build_teacher(TeacherConfig())


def test_state_and_path_go_together():
    with pytest.raises(ValueError, match="both or neither"):
        build_teacher(TeacherConfig(teacher_weights=FILE))


@pytest.mark.parametrize("name", ["test_vit.r160_in1k", "vit_base_patch16_reg4_gap_256"])
def test_without_the_hub_both_ways_are_named(name, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=f"{name}.*objective.teacher-weights") as caught:
        build_teacher(TeacherConfig(teacher=name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("vit_bas_patch16_224", "vit_base_patch16_224"),
        ("vit_base_patch16_clip_quickgelu_224.opena", "vit_base_patch16_clip_quickgelu_224.openai"),
        ("zzzz", "as timm names it"),
    ],
)
def test_an_unknown_name_comes_with_the_nearest(name, nearest):
    with pytest.raises(UserError, match=f"{name}.*; .*{nearest}"):
        build_teacher(TeacherConfig(teacher=name))


def test_an_outline_is_the_teacher_without_weights():
    state = timm.create_model("test_vit").state_dict()
    config = TeacherConfig(teacher="test_vit", teacher_weights=FILE)
    outlined, built = outline(config, (4, 4)), build_teacher(config, (4, 4), state)
    assert {p.device.type for p in outlined.parameters()} == {"meta"}
    assert (outlined.grid, outlined.width, outlined.image_size) == (built.grid, built.width, built.image_size)
    assert {k: x.shape for k, x in outlined.state_dict().items()} == {
        k: x.shape for k, x in built.state_dict().items()
    }
    assert outline(TeacherConfig(teacher_weights=FILE)) is None


def test_the_bias_that_timm_adds_to_a_projection_is_left_out_unless_it_is_used():
    assert clip().vit.head.bias is None
    state = from_openai(STATE, num_heads=2).state_dict() | {"head.bias": torch.ones(20)}
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    vit = from_timm(CLIP, {"state_dict": state, "num_classes": 20}, sizes)
    assert_close(vit.head.bias, torch.ones(20))


def test_only_vision_transformers_teach():
    state = timm.create_model("test_resnet").state_dict()
    with pytest.raises(UserError, match="ResNet"):
        build_teacher(TeacherConfig(teacher="test_resnet", teacher_weights=FILE), state=state)


def test_weights_made_with_quick_gelu_are_not_run_with_gelu():
    overlay = {"state_dict": STATE, "num_classes": 20}
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    from_timm("vit_base_patch16_clip_quickgelu_224.openai", overlay, sizes)
    with pytest.raises(UserError, match=r"use vit_base_patch16_clip_quickgelu_224\.openai"):
        from_timm("vit_base_patch16_clip_224.openai", overlay, sizes)
