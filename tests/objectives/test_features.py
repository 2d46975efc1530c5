"""Masked feature modeling has no reference anywhere: it is checked against plain loops and against its own
promises."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from itpn.errors import UserError
from itpn.nn.hivit import HiViT
from itpn.objectives.features import FeaturesConfig, momentum_at
from itpn.objectives.masking import hidden_units
from itpn.objectives.stages import RunningStatistics, position_share, relative_variance
from tests.toys import toy_batch, toy_objective

VARIANTS = [
    {"normalisation": "layer-norm"},
    {"normalisation": "layer-norm", "branches": "levels"},
    {"positions": "all", "normalisation": "none", "beta": 0.5},
    {"stages": ("c4", "c16")},
]


def shake(module):
    """Move every parameter away from its start, so that nothing holds by accident."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return module


def feature_loss_by_loops(objective, batch):
    """The definition, unit by unit and cell by cell, from the modules' own outputs."""
    config, features = objective.features.config, objective.features
    images = objective.normalise(batch["images"])
    keep = batch["keep"][:, 0]
    N = objective.model.backbone.config.num_units
    levels = objective.model(images, keep)[1]
    embedded = objective.embed(levels)
    stage_features = features.teacher(images)
    total = []
    for stage in config.stages:
        level = ("c4", "c8", "c16").index(stage)
        if config.branches == "sum":
            start = [torch.zeros(N, 32) for _ in images]
            for b in range(len(images)):
                for unit in range(N):
                    place = (keep[b] == unit).nonzero()
                    for e in embedded:
                        start[b][unit] += e[b, place[0, 0]] if len(place) else objective.mask_token
            decoded = objective.decoder(torch.stack(start), (4, 4))
        else:
            start = [features.level_tokens[stage].repeat(N, 1) for _ in images]
            for b in range(len(images)):
                for j, unit in enumerate(keep[b].tolist()):
                    start[b] = torch.cat([start[b][:unit], embedded[level][b, j][None], start[b][unit + 1 :]])
            decoded = features.decoder(torch.stack(start), (4, 4))
        samples = []
        for b in range(len(images)):
            units = []
            for unit in range(N):
                if config.positions == "hidden" and unit in keep[b].tolist():
                    continue
                target = getattr(stage_features, stage)[b, unit].reshape(
                    -1, getattr(stage_features, stage).shape[-1]
                )
                if config.normalisation == "layer-norm":
                    target = torch.stack(
                        [(c - c.mean()) / (c.var(unbiased=False) + 1e-5).sqrt() for c in target]
                    )
                predicted = features.heads[stage](decoded[b, unit])
                distance = (predicted - target.flatten()).abs()
                small = distance < config.beta
                error = torch.where(small, distance**2 / (2 * config.beta), distance - config.beta / 2)
                units.append(error.mean())
            samples.append(sum(units) / len(units))
        total.append(sum(samples) / len(samples))
    return sum(total) / len(total)


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_equals_plain_loops_over_units(variant):
    objective = shake(toy_objective(variant))
    batch = toy_batch(objective)
    losses = objective(batch)
    expected = feature_loss_by_loops(objective, batch)
    torch.testing.assert_close(losses["feature"], expected.detach())
    torch.testing.assert_close(losses["loss"].detach(), losses["pixel"] + 0.3 * losses["feature"])
    stages = [losses[f"feature_{stage}"] for stage in objective.features.config.stages]
    torch.testing.assert_close(losses["feature"], torch.stack(stages).mean())


@pytest.mark.parametrize("branches", ["sum", "levels"])
def test_hidden_pixels_change_the_targets_but_no_prediction(branches):
    objective = shake(toy_objective({"branches": branches}))
    batch = toy_batch(objective)
    keep = batch["keep"][:, 0]
    hidden = hidden_units(keep, 16)
    mask = hidden.view(3, 1, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)
    changed = torch.where(mask, 255 - batch["images"], batch["images"])

    def predictions(images):
        embedded, _ = objective.encode(objective.normalise(images), keep)
        decoded = objective.decode(embedded, keep, hidden, (4, 4))
        return [
            objective.head(decoded),
            *objective.features.predict(decoded, embedded, keep, hidden).values(),
        ]

    for before, after in zip(predictions(batch["images"]), predictions(changed), strict=True):
        assert torch.equal(before, after)
    teach = objective.features.teach
    before, after = teach(objective.normalise(batch["images"])), teach(objective.normalise(changed))
    for stage in before:
        assert not torch.allclose(before[stage][hidden], after[stage][hidden])


@pytest.mark.parametrize("variant", [{}, {"branches": "levels"}, {"normalisation": "layer-norm"}])
def test_every_parameter_learns_and_the_teacher_does_not(variant):
    objective = shake(toy_objective(variant, drop_path=0.1, layer_scale=0.1, relative_position_bias=True))
    objective(toy_batch(objective))["loss"].backward()
    for name, parameter in objective.named_parameters():
        if ".teacher." in name or name.endswith("decoder.position"):
            assert not parameter.requires_grad
            assert parameter.grad is None
        elif name.endswith("attn.qkv.bias"):
            query, key, value = parameter.grad.chunk(3)  # softmax is blind to what all keys share
            assert query.abs().max() > 0 and value.abs().max() > 0
            assert key.abs().max() < 1e-6
        else:
            assert parameter.grad.abs().max() > 0, name


def test_teacher_is_the_closed_form_average_after_three_steps():
    objective = toy_objective({"momentum": 0.9})
    first = copy.deepcopy(objective.model.backbone.state_dict())
    students = []
    for step in range(3):
        shake(objective.model.backbone)
        students.append(copy.deepcopy(objective.model.backbone.state_dict()))
        objective.end_step(step, 10)
    m = [1 - 0.1 * (math.cos(math.pi * t / 10) + 1) / 2 for t in range(3)]
    for key, ours in objective.features.teacher.state_dict().items():
        start, (s1, s2, s3) = first[key], [student[key] for student in students]
        closed = (
            m[0] * m[1] * m[2] * start
            + (1 - m[0]) * m[1] * m[2] * s1
            + (1 - m[1]) * m[2] * s2
            + (1 - m[2]) * s3
        )
        torch.testing.assert_close(ours, closed)


def test_each_branch_follows_its_own_level_only():
    objective = shake(toy_objective({"branches": "levels"}))
    batch = toy_batch(objective)
    keep = batch["keep"][:, 0]
    hidden = hidden_units(keep, 16)
    embedded, _ = objective.encode(objective.normalise(batch["images"]), keep)
    before = objective.features.predict(embedded[0], embedded, keep, hidden)
    for level, stage in enumerate(before):
        changed = [e + 1 if i == level else e for i, e in enumerate(embedded)]
        after = objective.features.predict(embedded[0], changed, keep, hidden)
        assert {s for s in before if not torch.equal(before[s], after[s])} == {stage}


def test_several_masks_share_one_teacher_pass(monkeypatch):
    objective = shake(toy_objective({}, masks_per_image=2))
    batch = toy_batch(objective)
    calls = []
    forward = HiViT.forward
    monkeypatch.setattr(
        HiViT, "forward", lambda self, x, *a, **k: calls.append(len(x)) or forward(self, x, *a, **k)
    )
    both = objective(batch)
    assert sorted(calls) == [3, 6]
    single = shake(toy_objective({}))
    losses = [single({**batch, "keep": batch["keep"][:, m : m + 1]})["loss"] for m in range(2)]
    torch.testing.assert_close(both["loss"], torch.stack(losses).mean())


def test_weight_ramp_and_momentum():
    objective = toy_objective({"weight": 0.4, "weight_ramp": 0.5})
    weights = []
    for step in range(8):
        objective.begin_step(step, 8)
        weights.append(objective.features.weight)
    assert weights == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4, 0.4])
    config = FeaturesConfig(momentum=0.9)
    assert momentum_at(0, 100, config) == pytest.approx(0.9)
    assert momentum_at(50, 100, config) == pytest.approx(0.95)
    assert momentum_at(100, 100, config) == pytest.approx(1.0)
    warm = FeaturesConfig(momentum=0.9, momentum_warmup=True)
    assert momentum_at(0, 100, warm) == pytest.approx(0.1)
    assert momentum_at(90, 100, warm) == pytest.approx(91 / 100)


def test_running_statistics_are_the_weighted_mean_and_variance_of_past_steps():
    statistics = RunningStatistics(4, momentum=0.5)
    generator = torch.Generator().manual_seed(0)
    steps = [torch.randn(50, 4, generator=generator) * (i + 1) + i for i in range(3)]
    assert torch.equal(statistics(steps[0]), steps[0])
    statistics.end_step()
    for x in steps[1:]:
        for half in x.chunk(2):  # two micro-batches of one step
            statistics(half)
        statistics.end_step()
    weights = torch.tensor([0.25, 0.5, 1.0]) / 1.75
    mean = sum(w * x.mean(0) for w, x in zip(weights, steps, strict=True))
    square = sum(w * x.square().mean(0) for w, x in zip(weights, steps, strict=True))
    ours = statistics(steps[0])
    torch.testing.assert_close(
        ours, (steps[0] - mean) / (square - mean**2 + 1e-6).sqrt(), rtol=1e-4, atol=1e-5
    )


def test_position_share_knows_position_from_content():
    generator = torch.Generator().manual_seed(0)
    by_position = torch.randn(1, 36, 4, 8, generator=generator).expand(64, -1, -1, -1)
    content = torch.randn(64, 36, 4, 8, generator=generator)
    assert position_share(by_position) == pytest.approx(1.0, abs=1e-3)
    assert position_share(content) == pytest.approx(0.0, abs=0.01)
    assert position_share(by_position + content) == pytest.approx(0.5, abs=0.03)
    assert position_share(content[:1]) == 0


def test_relative_variance_sees_collapse_at_any_scale():
    features = torch.randn(64, 36, 4, 8, generator=torch.Generator().manual_seed(0))
    for scale in (1e-4, 1.0, 1e4):
        assert relative_variance(scale * features) == pytest.approx(1.0, abs=0.01)
        assert relative_variance(scale * (features + 3)) == pytest.approx(0.1, abs=0.01)
    assert relative_variance(torch.ones(4, 9, 1, 8)) == 0


@pytest.mark.parametrize("normalisation", ["standardise", "layer-norm", "none"])
def test_collapse_warns_whatever_the_normalisation(normalisation):
    objective = toy_objective({"normalisation": normalisation})
    with torch.no_grad():
        for name, parameter in objective.features.teacher.named_parameters():
            if "bias" not in name:
                parameter.mul_(1e-6)
            else:
                parameter.add_(1)
    objective(toy_batch(objective))
    with pytest.warns(UserWarning, match="hardly vary"):
        objective.end_step(0, 10)


def test_nothing_needs_double_precision():
    """Apple's GPUs have none."""
    objective = toy_objective({"branches": "levels"})
    assert {value.dtype for value in (*objective.parameters(), *objective.buffers())} == {torch.float32}


def test_wrong_choices_name_their_field():
    with pytest.raises(UserError, match="momentum"):
        FeaturesConfig(momentum=1.5)
    with pytest.raises(UserError, match="weight"):
        FeaturesConfig(weight=-1)
    with pytest.raises(UserError, match="branches"):
        toy_objective({"branches": "levels"}, pyramid=False)


def test_smooth_l1_is_torchs():
    """The loop's error above is spelled out; here it meets torch's own."""
    x = torch.linspace(-3, 3, 31)
    spelled = torch.where(x.abs() < 0.5, x**2, x.abs() - 0.25)
    torch.testing.assert_close(spelled, F.smooth_l1_loss(x, torch.zeros(31), beta=0.5, reduction="none"))


def test_a_step_that_was_left_out_is_no_statistic():
    """The next one begins with nothing pending, so a loss that was not finite cannot spread."""
    objective = toy_objective({"normalisation": "standardise"})
    batch = toy_batch(objective)
    with torch.no_grad():
        kept = objective.features.teacher.stem_proj.bias.clone()
        objective.features.teacher.stem_proj.bias.fill_(math.nan)
        objective.begin_step(0, 10)
        assert objective(batch)["loss"].isnan()
        objective.features.teacher.stem_proj.bias.copy_(kept)
    objective.begin_step(1, 10)
    objective(batch)
    objective.end_step(1, 10)
    assert all(statistics.averages.isfinite().all() for statistics in objective.features.statistics.values())
