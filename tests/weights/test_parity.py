"""Number by number against the authors' and mmpretrain's models (tests/reference/README.md says how they were
made)."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from itpn.nn.hivit import HiViTConfig
from itpn.nn.positions import resample_table
from itpn.nn.pyramid import Model, ModelConfig, PyramidConfig
from itpn.objectives.decoder import DecoderConfig
from itpn.objectives.masking import hidden_units, kept_ids
from itpn.objectives.pixel import PixelConfig, PixelObjective
from itpn.weights.convert import from_mmpretrain, from_official

REFERENCE = Path(__file__).parent.parent / "reference"


def load(name):
    tensors = load_file(REFERENCE / f"{name}.safetensors")
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    return tensors, state


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def gradient_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-4 * theirs.abs().max().item(), rtol=0)


def backbone(**numbers):
    return HiViTConfig(
        width=32,
        num_heads=2,
        image_size=64,
        position_resampling="published",
        **{"depths": (1, 1, 2)} | numbers,
    )


def load_model(config, state):
    model = Model(config).eval()
    prefix = "model."
    model.load_state_dict({key.removeprefix(prefix): value for key, value in from_official(state).items()})
    return model


@pytest.mark.parametrize("name", ["pixel_finetune_rpe", "pixel_finetune_norpe", "pixel_finetune_norpe_96"])
def test_backbone_features(name):
    tensors, state = load(name)
    config = backbone(relative_position_bias=name.endswith("_rpe"))
    model = load_model(ModelConfig(backbone=config, pyramid=None), state)
    features, levels = model(tensors["input"])
    close(features.c16, tensors["forward_features"])
    assert levels is None
    if "inter.patch_embed" in tensors:
        close(model.backbone.stem(tensors["input"]), tensors["inter.patch_embed"])
        close(features.c4, tensors["inter.blocks.0"])
        close(features.c8, tensors["inter.blocks.2"])
        tokens = tensors["inter.blocks.3"].flatten(2)
        _, taps = model.backbone.context(
            model.backbone.embed(tokens, (4, 4)), model.backbone.relative((4, 4)), taps=(0, 1)
        )
        close(taps[0], tensors["inter.blocks.4"])
        close(taps[1], tensors["inter.blocks.5"])
    if "pos_embed_used" in tensors:
        side = tensors["input"].shape[-1] // 16
        zeros = torch.zeros(1, side * side, 32)
        close(model.backbone.embed(zeros, (side, side)), tensors["pos_embed_used"])
    if "pos_embed_64_masked4" in tensors:
        close(
            resample_table(model.backbone.position, (4, 4), (4, 4), offset=0.1)[None],
            tensors["pos_embed_64_masked4"],
        )


@pytest.mark.parametrize(
    ("name", "pyramid_width", "pyramid_depth", "numbers"),
    [
        ("pixel_pyramid_outs3_norpe", 24, 2, {}),
        ("pixel_pyramid_outs3_rpe", 24, 1, {"relative_position_bias": True}),
        ("pixel_pyramid_outs3_fpn_eq_embed", 32, 1, {"depths": (1, 1, 1)}),
    ],
)
def test_pyramid_levels(name, pyramid_width, pyramid_depth, numbers):
    tensors, state = load(name)
    pyramid = PyramidConfig(width=pyramid_width, depth=pyramid_depth, mlp_ratio=2.0)
    model = load_model(ModelConfig(backbone=backbone(mlp_ratio=2.0, **numbers), pyramid=pyramid), state)
    _, levels = model(tensors["input"])
    close(levels.p16, tensors["out.0"].flatten(2))
    close(levels.p8, tensors["out.1"])
    close(levels.p4, tensors["out.2"])


def pretraining(tensors, state, config, pixel, convert=from_official):
    objective = PixelObjective(config, pixel)
    objective.load_state_dict(convert(state))
    keep = kept_ids(tensors["noise"], objective.num_kept)
    assert torch.equal(keep, tensors["ids_keep"])
    assert torch.equal(hidden_units(keep, 16), tensors["mask"].bool())
    return objective, keep


def predict(objective, images, keep):
    hidden = hidden_units(keep, 16)
    embedded, levels = objective.encode(images, keep)
    prediction = objective.head(objective.decode(embedded, keep, hidden, (4, 4)))
    return prediction, objective.pixel_loss(prediction, images, hidden), levels


PRETRAIN = {
    "pixel_pretrain_p16": (
        ModelConfig(
            backbone=backbone(depths=(1, 1, 1), mlp_ratio=2.0), pyramid=PyramidConfig(width=8, depth=1,
            mlp_ratio=2.0)
        ),
        DecoderConfig(width=16, depth=1, num_heads=2, mlp_ratio=2.0),
    ),
    "pixel_pretrain_p8": (
        ModelConfig(
            backbone=HiViTConfig(
                width=32, depths=(1, 1, 2), num_heads=2, image_size=32, patch_size=8, mlp_ratio=2.0,
                position_resampling="published",
            ),
            pyramid=PyramidConfig(width=24, depth=1, mlp_ratio=2.0),
        ),
        DecoderConfig(width=32, depth=1, num_heads=4, mlp_ratio=2.0),
    ),
    "mm_pixel_p16": (
        ModelConfig(
            backbone=HiViTConfig(
                width=16, depths=(2, 2, 1), num_heads=2, image_size=64, mlp_ratio=2.0,
                position="sincos-row", position_frozen=True, position_resampling="published",
            ),
            pyramid=PyramidConfig(width=12, depth=1, mlp_ratio=2.0),
        ),
        DecoderConfig(width=16, depth=1, num_heads=2, mlp_ratio=2.0, embed_norm_eps=1e-5),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PRETRAIN)
def test_pretraining_loss_prediction_and_gradients(name):
    tensors, state = load(name)
    model, decoder = PRETRAIN[name]
    convert = from_mmpretrain if name.startswith("mm_") else from_official
    objective, keep = pretraining(tensors, state, model, PixelConfig(decoder=decoder), convert)
    prediction, loss, levels = predict(objective, tensors["input"], keep)
    close(prediction, tensors["pred"])
    close(loss, tensors["loss"][0])
    if "encoder_out.0" in tensors:
        close(levels.p16, tensors["encoder_out.0"].flatten(2))
        close(levels.p8, tensors["encoder_out.1"])
        close(levels.p4, tensors["encoder_out.2"])
    if "latent.0" in tensors:
        for ours, theirs in zip(
            objective.model.backbone(tensors["input"], keep), ("0", "1", "2"), strict=True
        ):
            close(ours, tensors[f"latent.{theirs}"])

    loss.backward()
    gradients = {
        key.removeprefix("grad."): value for key, value in tensors.items() if key.startswith("grad.")
    }
    assert len(gradients) >= 4
    blank = {key: torch.zeros_like(value) for key, value in state.items()}
    for key, theirs in gradients.items():
        # Converted as if it were the weight, a gradient tells its own place among ours.
        [(ours, expected)] = [(k, v) for k, v in convert({**blank, key: theirs}).items() if v.any()]
        gradient = objective.get_parameter(ours).grad
        if ours == "model.backbone.position":
            # At equal sizes torch's bicubic backward passes the gradient straight through although its
            # forward resamples; the reference has that gradient, ours is the true one: undo it to compare.
            identity = torch.eye(16)
            gradient = torch.linalg.solve(resample_table(identity, (4, 4), (4, 4), offset=0.1).T, gradient)
        gradient_close(gradient, expected)


@pytest.mark.parametrize("name", PRETRAIN)
def test_sound_position_resampling_is_the_diagnostic_one(name):
    """Without the published accident the loss is the fixture's "alt" one."""
    tensors, state = load(name)
    model, decoder = PRETRAIN[name]
    model = replace(model, backbone=replace(model.backbone, position_resampling="exact"))
    convert = from_mmpretrain if name.startswith("mm_") else from_official
    objective, keep = pretraining(tensors, state, model, PixelConfig(decoder=decoder), convert)
    _, loss, _ = predict(objective, tensors["input"], keep)
    close(loss, tensors["alt.loss_without_pos_resample"][0])


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
    model, decoder = PRETRAIN[name]
    close(PixelObjective(model, PixelConfig(decoder=decoder)).get_parameter(ours)[None], tensors[theirs])
