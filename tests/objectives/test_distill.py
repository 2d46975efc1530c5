"""Distillation: what is hidden, what leaks, what is supervised, and that it trains. Its numbers are compared
with the authors' and mmpretrain's in tests/weights/test_parity.py."""

import pytest
import timm
import torch
import torch.nn.functional as F

from itpn.errors import UserError
from itpn.objectives.distill import DistillConfig, DistillObjective, distill_loss
from itpn.objectives.stages import FrozenConfig
from itpn.objectives.teacher import Teacher
from tests.counting import macs_of_backbone, macs_of_pyramid, macs_of_tokens
from tests.toys import toy_batch, toy_model

CHOICES = {"target": "tokens", "target_width": 64, "num_hidden": 5, "min_block": 2}


def toy_teacher(config, grid=(4, 4)):
    torch.manual_seed(1)
    return Teacher(timm.create_model("test_vit", pretrained=False), config, grid)


STAGES = {"weight": 0.5, "width": 64}


def toy(taught=True, seed=0, model=None, **choices):
    config = DistillConfig(**(CHOICES | choices))
    torch.manual_seed(seed)
    objective = DistillObjective(model or toy_model(layer_scale=0.1, relative_position_bias=True), config)
    if taught:
        objective.attach(toy_teacher(config))
    return objective


def changed_units(objective, number):
    """Predictions that change when the pixels of a hidden unit do: of both heads."""
    objective.eval()
    images = torch.rand(1, 3, 64, 64)
    hidden = torch.zeros(1, 16, dtype=torch.bool)
    hidden[0, number] = True
    other = images.clone()
    other[:, :, 16 * (number // 4) :, 16 * (number % 4) :][:, :, :16, :16] += 1
    before, after = objective.predict(images, hidden), objective.predict(other, hidden)
    return [
        (found - expected).abs().amax(-1)[0].gt(1e-6).nonzero().flatten().tolist()
        for found, expected in zip(after, before, strict=True)
        if found is not None
    ]


def test_a_token_after_the_stem_hides_everything():
    assert changed_units(toy(mask_token="after-stem"), 6) == [[], []]


def test_a_token_after_stages_1_and_2_leaks_through_the_laterals_into_its_own_unit():
    assert changed_units(toy(mask_token="after-local"), 6) == [[6], []]


@pytest.mark.parametrize("loss", ["smooth-l1", "cosine", "cross-entropy"])
@pytest.mark.parametrize("positions", ["hidden", "all"])
def test_losses_against_loops_over_units(loss, positions):
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 3, 6, 4, generator=generator)
    hidden = torch.tensor([[1, 0, 0, 1, 0, 0], [1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1]]).bool()
    means = []
    for b in range(3):
        units = [n for n in range(6) if positions == "all" or hidden[b, n]]
        values = []
        for n in units:
            p, t = prediction[b, n], target[b, n]
            match loss:
                case "smooth-l1":
                    values.append(F.smooth_l1_loss(p, t))
                case "cosine":
                    values.append(-(p @ t) / (p.norm() * t.norm()))
                case "cross-entropy":
                    values.append(F.cross_entropy(p, t))
        means.append(torch.stack(values).mean())
    ours = distill_loss(prediction, target, loss, hidden if positions == "hidden" else None)
    torch.testing.assert_close(ours, torch.stack(means).mean())


@pytest.mark.parametrize("auxiliary", [True, False])
def test_the_loss_is_the_sum_of_its_branches(auxiliary):
    objective = toy(auxiliary=auxiliary)
    losses = objective(toy_batch(objective))
    parts = [value for name, value in losses.items() if name != "loss"]
    assert len(parts) == 1 + auxiliary
    torch.testing.assert_close(losses["loss"], torch.stack(parts).sum())


def test_the_teacher_is_neither_trained_nor_saved():
    objective, bare = toy(), toy(taught=False)
    assert objective.state_dict().keys() == bare.state_dict().keys()
    assert len(list(objective.parameters())) == len(list(bare.parameters()))
    [teacher] = objective._teacher
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    objective(toy_batch(objective))["loss"].backward()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_teacher_sees_the_whole_image_at_its_own_size():
    """Patches of 16 need 64 pixels for 4 x 4 tokens; a student of 8-pixel units gets its images enlarged."""
    model = toy_model(image_size=32, patch_size=8)
    objective = toy(model=model)
    seen = []
    [teacher] = objective.teachers
    teacher.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].shape))
    objective(toy_batch(objective))
    assert seen == [(3, 3, 64, 64)]


def bilinear(grid, factor):
    """Maps `[h][w]` of vectors enlarged by their definition: a cell's centre between the four nearest."""
    rows, cols = len(grid), len(grid[0])
    for y in range(rows * factor):
        for x in range(cols * factor):
            at_y = min(max((y + 0.5) / factor - 0.5, 0), rows - 1)
            at_x = min(max((x + 0.5) / factor - 0.5, 0), cols - 1)
            value = 0
            for i in range(rows):
                for j in range(cols):
                    value = value + max(0, 1 - abs(at_y - i)) * max(0, 1 - abs(at_x - j)) * grid[i][j]
            yield y, x, value


@pytest.mark.parametrize("positions", ["hidden", "all"])
def test_stages_follow_the_teachers_blocks(positions):
    """The definition in plain loops: blocks 1, 3 and 5 of six as maps, each cell of each unit by itself."""
    frozen = FrozenConfig(**STAGES, positions=positions, normalisation="none", beta=0.5)
    objective = toy(frozen=frozen)
    batch = toy_batch(objective, size=2)
    losses = objective(batch)
    [teacher] = objective.teachers
    taught = teacher.teach(batch["images"])
    units, _ = objective.encode(objective.normalise(batch["images"]), batch["hidden"])
    stages = []
    for (stage, side), block in zip({"c4": 4, "c8": 2, "c16": 1}.items(), taught.blocks, strict=True):
        samples = []
        for b in range(2):
            errors = {n: [] for n in range(16) if positions == "all" or batch["hidden"][b, n]}
            prediction = objective.frozen.heads[stage](units[b]).view(16, side, side, 64)
            for y, x, target in bilinear(block[b].float().view(4, 4, 64), side):
                n = 4 * (y // side) + x // side
                if n in errors:
                    errors[n].append(
                        F.smooth_l1_loss(prediction[n, y % side, x % side], target, beta=0.5).item()
                    )
            samples.append(sum(sum(unit) / len(unit) for unit in errors.values()) / len(errors))
        stages.append(sum(samples) / 2)
        assert losses[f"frozen_feature_{stage}"].item() == pytest.approx(stages[-1], rel=1e-4)
    assert losses["frozen"].item() == pytest.approx(sum(stages) / 3, rel=1e-4)
    together = losses["fused"] + losses["auxiliary"] + 0.5 * losses["frozen"]
    torch.testing.assert_close(losses["loss"], together)


def test_at_weight_zero_nothing_changes():
    plain, off = toy(), toy(frozen=FrozenConfig(weight=0.0, width=99))
    batch = toy_batch(plain)
    assert plain.state_dict().keys() == off.state_dict().keys()
    assert all(torch.equal(value, off(batch)[name]) for name, value in plain(batch).items())


def test_every_head_learns_and_targets_are_standardised_by_past_steps():
    objective = toy(frozen=FrozenConfig(**STAGES)).train()
    batch = toy_batch(objective, size=4)
    objective.begin_step(0, 10)
    objective(batch)["loss"].backward()
    assert all(head.weight.grad.abs().max() > 0 for head in objective.frozen.heads.values())
    objective.end_step(0, 10)
    [teacher] = objective.teachers
    block = teacher.teach(batch["images"]).blocks[-1].float()
    standardised = objective.frozen.normalise("c16", block[:, :, None])
    flat = standardised.flatten(0, 2)
    torch.testing.assert_close(flat.mean(0), torch.zeros(64), atol=1e-4, rtol=0)
    torch.testing.assert_close(flat.std(0, correction=0), torch.ones(64), atol=1e-2, rtol=0)


def test_a_comparison_shows_the_mask_and_how_close_the_student_is():
    objective = toy().eval()
    batch = toy_batch(objective, size=2)
    images, hidden = batch["images"], batch["hidden"]
    shown = objective.compare(images, hidden)
    torch.testing.assert_close(shown.original, images / 255)
    covered = hidden.view(2, 1, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3).expand(-1, 3, -1, -1)
    torch.testing.assert_close(shown.masked[~covered], shown.original[~covered])
    mean = objective.normalise.mean.expand(3, 64, 64).expand_as(covered)
    torch.testing.assert_close(shown.masked[covered], mean[covered])
    assert [level.shape[2:] for level in shown.levels] == [(16, 16), (8, 8), (4, 4)]
    fused, _ = objective.predict(objective.normalise(images), hidden)
    expected = F.cosine_similarity(fused, objective.teachers[0].teach(images).targets, dim=-1)
    torch.testing.assert_close(shown.similarity.flatten(1), expected)
    torch.testing.assert_close((shown.target * shown.prediction).sum(1).flatten(1), expected)


@pytest.mark.parametrize("auxiliary", [True, False])
def test_flops_by_hand(auxiliary):
    """6 for each multiply-add of the student, of whose units all are seen, 2 for each of the teacher's."""
    few = {"frozen": FrozenConfig(**STAGES, stages=("c16",)), "auxiliary": auxiliary}
    objective = toy(model=toy_model(), **few)
    units, width, pyramid = 16, 32, 24
    student = macs_of_backbone(units, width, (1, 1, 2)) + units * macs_of_pyramid(width, pyramid)
    student += units * 3 * pyramid * width  # level embeddings
    student += units * width * (64 + 64)  # heads: targets and stage 3
    if auxiliary:
        student += 2 * macs_of_tokens(units, width, 2) + units * width * 64
    teacher = objective.teachers[0].flops_per_image()[0]
    assert objective.flops_per_image() == 6 * student + teacher


@pytest.mark.parametrize("loss", ["smooth-l1", "cosine"])
def test_it_learns_its_teacher(loss):
    objective = toy(loss=loss).train()
    batch = toy_batch(objective, size=4)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = objective(batch)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3 * abs(losses[0])


def test_the_auxiliary_branch_learns_tables_only_where_the_backbone_does():
    for bias in (True, False):
        objective = toy(model=toy_model(relative_position_bias=bias))
        objective(toy_batch(objective))["loss"].backward()
        table = objective.auxiliary.blocks[0].attn.relative_position
        assert table.requires_grad == (table.grad is not None) == bias


def test_drop_path_covers_the_auxiliary_blocks():
    objective = toy(model=toy_model(drop_path=0.9, layer_scale=0.1)).train()
    batch = toy_batch(objective)
    backbone = objective.model.backbone
    assert batch["drop"].shape == (3, backbone.num_drops + 4)
    kept = {**batch, "drop": torch.ones_like(batch["drop"])}
    dropped = {**batch, "drop": kept["drop"].clone()}
    dropped["drop"][:, -4:] = 0.0
    first, second = objective(kept), objective(dropped)
    assert torch.equal(first["fused"], second["fused"])
    assert not torch.equal(first["auxiliary"], second["auxiliary"])


def test_a_teacher_that_does_not_fit_is_refused():
    objective = toy(taught=False, target_width=32)
    with pytest.raises(UserError, match=r"objective\.target-width is 32.* 64 channels"):
        objective.attach(toy_teacher(objective.config))
    objective = toy(taught=False)
    with pytest.raises(UserError, match=r"teacher has \(5, 5\) tokens, the student \(4, 4\)"):
        objective.attach(toy_teacher(objective.config, (5, 5)))
    objective = toy(taught=False, frozen=FrozenConfig(weight=1.0, width=32))
    with pytest.raises(UserError, match=r"objective\.frozen\.width is 32.* 64 channels"):
        objective.attach(toy_teacher(objective.config))
    with pytest.raises(UserError, match=r"model\.pyramid"):
        DistillObjective(toy_model(pyramid=False), DistillConfig(**CHOICES))
