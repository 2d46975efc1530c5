"""Every reference model, number by number, through `itpn convert`: keys, inferred sizes and outputs."""

import re
from dataclasses import replace

import pytest
import torch

from itpn.nn.layers import to_map
from itpn.nn.positions import resample_table
from itpn.nn.pyramid import detection_maps, segmentation_maps
from itpn.objectives.distill import distill_loss
from itpn.objectives.masking import hidden_units, kept_ids
from itpn.objectives.pixel import PixelConfig, PixelObjective
from itpn.weights.families import Given
from itpn.weights.files import NOWHERE, Weights
from itpn.weights.translate import translate, write_back
from tests.weights.released import close, converted, gradients_close, load, module

GRID = (4, 4)
PIXEL = ["pixel_finetune_rpe", "pixel_finetune_norpe", "pixel_finetune_norpe_96"]
CLIP = ["clip_finetune", "clip_finetune_norpe"]
FAST = ["fast_finetune_meanpool", "fast_finetune_nomeanpool"]
PRETRAIN = ["pixel_pretrain_p16", "pixel_pretrain_p8", "mm_pixel_p16"]


@pytest.mark.parametrize("name", PIXEL + CLIP)
def test_classifiers(name):
    tensors, _ = load(name)
    model = module(converted(name))
    close(model.backbone(tensors["input"]).c16, tensors["forward_features"])
    close(model(tensors["input"]), tensors["logits"])


@pytest.mark.parametrize("name", FAST)
def test_fast_classifiers(name):
    tensors, _ = load(name)
    model = module(converted(name))
    close(model.pool(model.backbone(tensors["input"]).c16), tensors["forward_features"])
    close(model(tensors["input"]), tensors["logits"])


def test_mmpretrains_classifier():
    tensors, _ = load("mm_hivit_classifier")
    model = module(converted("mm_hivit_classifier"))
    close(to_map(model.backbone(tensors["input"]).c16, GRID), tensors["featmap"])
    close(model(tensors["input"]), tensors["logits"])


@pytest.mark.parametrize("name", ["pixel_finetune_rpe", "clip_finetune", "fast_finetune_meanpool"])
def test_every_stage(name):
    """Their list of blocks is ours: stages with a merge after each of the first two."""
    tensors, _ = load(name)
    backbone = module(converted(name)).backbone
    cells = backbone.stem(tensors["input"])
    theirs = [tensors["inter.patch_embed"]]
    theirs += [tensors[f"inter.blocks.{i}"] for i in range(sum(backbone.config.shape.depths) + 2)]
    ours = [cells]
    for block in [*backbone.stage1, backbone.merge1, *backbone.stage2, backbone.merge2]:
        ours.append(block(ours[-1]))
    taps = range(len(backbone.stage3))
    tokens = backbone.embed(ours[-1].flatten(2), GRID)
    ours += backbone.context(tokens, backbone.relative(GRID), taps)[1]
    for mine, reference in zip(ours, theirs, strict=True):
        if name.startswith("fast") and reference.ndim == 4:
            mine = to_map(mine, GRID)
        close(mine.reshape(reference.shape), reference)


@pytest.mark.parametrize("name", [*PIXEL, "clip_finetune_norpe"])
def test_position_table_as_used(name):
    tensors, _ = load(name)
    backbone = module(converted(name)).backbone
    if "pos_embed_used" in tensors:
        side = tensors["input"].shape[-1] // 16
        close(backbone.embed(torch.zeros(1, side * side, 32), (side, side)), tensors["pos_embed_used"])
    if "pos_embed_64_masked4" in tensors:
        resampled = resample_table(backbone.position, GRID, GRID, offset=0.1)
        close(resampled[None], tensors["pos_embed_64_masked4"])


@pytest.mark.parametrize(
    "name", ["pixel_pyramid_outs3_norpe", "pixel_pyramid_outs3_rpe", "pixel_pyramid_outs3_fpn_eq_embed"]
)
def test_pyramid_levels(name):
    tensors, _ = load(name)
    _, levels = module(converted(name))(tensors["input"])
    close(levels.p16, tensors["out.0"].flatten(2))
    close(levels.p8, tensors["out.1"])
    close(levels.p4, tensors["out.2"])


@pytest.mark.parametrize("name", ["det_pixel_outs5", "det_clip_outs5_norpe", "seg_outs4"])
def test_maps_for_detection_and_segmentation(name):
    tensors, _ = load(name)
    features, levels = module(converted(name))(tensors["input"])
    ours = detection_maps(levels, GRID) if name[0] == "d" else segmentation_maps(features, levels, GRID)
    for i, found in enumerate(ours):
        close(found, tensors[f"out.{i}"])
    assert f"out.{len(ours)}" not in tensors


def pretrained(name, resampling=None):
    weights = converted(name)
    if resampling:
        backbone = {**weights.config["model"]["backbone"], "position_resampling": resampling}
        model = {**weights.config["model"], "backbone": backbone}
        weights = replace(weights, config={**weights.config, "model": model})
    return module(weights)


def predict(objective, images, keep):
    embedded, levels = objective.encode(images, keep)
    hidden = hidden_units(keep, 16)
    prediction = objective.head(objective.decode(embedded, keep, hidden, GRID))
    return prediction, objective.pixel_loss(prediction, images, hidden), levels


@pytest.mark.parametrize("name", PRETRAIN)
def test_pixel_pretraining(name):
    tensors, _ = load(name)
    objective = pretrained(name)
    keep = kept_ids(tensors["noise"], objective.num_kept)
    assert torch.equal(keep, tensors["ids_keep"])
    assert torch.equal(hidden_units(keep, 16), tensors["mask"].bool())
    prediction, loss, levels = predict(objective, tensors["input"], keep)
    close(prediction, tensors["pred"])
    close(loss, tensors["loss"][0])
    if "encoder_out.0" in tensors:
        close(levels.p16, tensors["encoder_out.0"].flatten(2))
        close(levels.p8, tensors["encoder_out.1"])
        close(levels.p4, tensors["encoder_out.2"])
    if "latent.0" in tensors:
        for i, ours in enumerate(objective.model.backbone(tensors["input"], keep)):
            close(ours, tensors[f"latent.{i}"])
    loss.backward()
    gradients_close(name, objective)


@pytest.mark.parametrize("name", PRETRAIN)
def test_sound_position_resampling_is_the_diagnostic_one(name):
    """Without the published accident the loss is the reference's "alt" one."""
    tensors, _ = load(name)
    _, loss, _ = predict(pretrained(name, "exact"), tensors["input"], tensors["ids_keep"])
    close(loss, tensors["alt.loss_without_pos_resample"][0])


def test_clip_pretraining():
    tensors, _ = load("clip_pretrain")
    student = module(converted("clip_pretrain"))
    hidden, target = tensors["bool_masked_pos"], tensors["teacher_target"]
    fused, auxiliary = student.predict(tensors["input"], hidden)
    close(fused, tensors["lm_head_out"])
    close(auxiliary, tensors["lm_cls_head_out"])
    for number, prediction in ((1, fused), (2, auxiliary)):
        close(distill_loss(prediction, target, "smooth-l1"), tensors[f"loss_{number}"][0])
        # The reference averages over all hidden units at once, ours over samples first.
        alone = [
            distill_loss(prediction[i : i + 1], target[i : i + 1], "smooth-l1", hidden[i : i + 1])
            for i in range(2)
        ]
        count = hidden.sum(1)
        close((torch.stack(alone) * count).sum() / count.sum(), tensors[f"loss_{number}_masked_only"][0])
    unmasked = student.predict(tensors["input"], torch.zeros_like(hidden))
    close(unmasked.fused, tensors["lm_head_out_unmasked"])
    close(unmasked.auxiliary, tensors["lm_cls_head_out_unmasked"])
    loss = distill_loss(fused, target, "smooth-l1") + distill_loss(auxiliary, target, "smooth-l1")
    close(loss, tensors["loss"][0])
    loss.backward()
    gradients_close("clip_pretrain", student)


def test_bias_tables_beside_a_backbone_without_any_are_never_added():
    """As the authors' pre-training without relative positions saves them."""
    _, state = load("clip_pretrain")
    state = {key: value for key, value in state.items() if not re.match(r"relative_|blocks.*relative_", key)}
    images, hidden = torch.randn(1, 3, 64, 64), torch.zeros(1, 16, dtype=torch.bool)
    predictions = []
    for filling in (state, {key: 0 * value for key, value in state.items() if "bias_table" in key}):
        translated = translate(state | filling, given=Given(num_heads=2))
        weights = Weights(NOWHERE, translated.tensors, translated.config)
        back = write_back(weights, "official-clip")
        assert back.keys() == state.keys()
        assert all(torch.equal(back[key], value) for key, value in (state | filling).items())
        predictions.append(module(weights).predict(images, hidden).auxiliary)
    assert any(
        "cls_pt_layers" in key and value.abs().max() > 0.01 for key, value in state.items() if "bias" in key
    )
    assert torch.equal(*predictions)


def test_mmpretrains_clip_pretraining():
    tensors, _ = load("mm_clip_rpe")
    student = module(converted("mm_clip_rpe"))
    hidden, target = tensors["mask"].flatten(1).bool(), tensors["teacher_tokens_with_cls"][:, 1:]
    fused, auxiliary = student.predict(tensors["input"], hidden)
    assert auxiliary is None
    close(fused, tensors["logits_all"])
    close(fused[hidden], tensors["logits_masked"])
    assert len(set(hidden.sum(1).tolist())) == 1, "a mean of means is the reference's mean"
    loss = distill_loss(fused, target, "cross-entropy", hidden)
    close(loss, tensors["loss_cross_entropy"][0])
    close(distill_loss(fused, target, "cosine", hidden), tensors["loss_cosine"][0])
    close(distill_loss(fused, target, "smooth-l1"), tensors["alt.loss_smooth_l1_all_tokens"][0])
    loss.backward()
    gradients_close("mm_clip_rpe", student)


@pytest.mark.parametrize(
    ("name", "ours", "theirs"),
    [
        ("pixel_pretrain_p8", "model.backbone.position", "init.absolute_pos_embed"),
        ("pixel_pretrain_p8", "decoder.position", "init.decoder_pos_embed"),
        ("mm_pixel_p16", "model.backbone.position", "init.backbone.pos_embed"),
        ("mm_pixel_p16", "decoder.position", "init.neck.decoder_pos_embed"),
    ],
)
def test_sincos_tables_as_built(name, ours, theirs):
    tensors, _ = load(name)
    weights = converted(name)
    objective = PixelObjective(
        weights.part("model", type(module(weights).model.config)), weights.part("objective", PixelConfig)
    )
    close(objective.get_parameter(ours)[None], tensors[theirs])
