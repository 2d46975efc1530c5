"""A frozen teacher beside the pixels. Its targets and loss are compared with loops in test_distill.py."""

import math

import pytest
import torch

from itpn.errors import UserError
from itpn.objectives.pixel import PixelConfig
from itpn.objectives.stages import FrozenConfig
from tests.objectives.test_distill import toy_teacher
from tests.toys import toy_batch, toy_objective

STAGES = FrozenConfig(weight=0.5, width=64, normalisation="none")


def taught(features=None, frozen=STAGES, **fields):
    objective = toy_objective(features, frozen=frozen, **fields)
    objective.attach(toy_teacher(objective.teacher_config))
    return objective


@pytest.mark.parametrize("features", [None, {}])
def test_its_loss_is_added_to_the_others(features):
    objective, without = taught(features), toy_objective(features)
    batch = toy_batch(objective)
    with_teacher, others = objective(batch), without(batch)
    assert all(torch.equal(with_teacher[name], value) for name, value in others.items() if name != "loss")
    torch.testing.assert_close(with_teacher["loss"], others["loss"] + 0.5 * with_teacher["frozen"])


def test_the_heads_read_the_decoders_output():
    objective = taught(frozen=FrozenConfig(weight=0.5, width=64, normalisation="none", stages=("c16",)))
    batch = toy_batch(objective)
    keep = batch["keep"][:, 0]
    hidden = torch.ones(3, 16, dtype=torch.bool).scatter(1, keep, False)
    embedded, _ = objective.encode(objective.normalise(batch["images"]), keep)
    predicted = objective.frozen.heads["c16"](objective.decode(embedded, keep, hidden, (4, 4)))
    target = objective.teachers[0].teach(batch["images"]).blocks[-1].float()
    expected = torch.nn.functional.smooth_l1_loss(predicted[hidden], target[hidden])  # all hide as many
    torch.testing.assert_close(objective(batch)["frozen"], expected.detach())


def test_several_masks_share_one_look():
    objective, looks = taught(masks_per_image=2), []
    objective.teachers[0].register_forward_hook(lambda *_: looks.append(1))
    batch = toy_batch(objective)
    both = objective(batch)
    assert len(looks) == 1
    single = taught()
    losses = [single({**batch, "keep": batch["keep"][:, m : m + 1]})["loss"] for m in range(2)]
    torch.testing.assert_close(both["loss"], torch.stack(losses).mean())


def test_the_teacher_is_neither_trained_nor_saved():
    objective = taught({})
    kept = {name.split(".")[0] for name in objective.state_dict()}
    assert kept == {"model", "embed", "mask_token", "decoder", "head", "features", "frozen"}
    objective(toy_batch(objective))["loss"].backward()
    average, frozen = objective.teachers
    assert all(weight.grad is None for teacher in (average, frozen) for weight in teacher.parameters())
    assert all(head.weight.grad.abs().max() > 0 for head in objective.frozen.heads.values())


def test_without_weight_the_model_is_the_same():
    before, now = toy_objective({}), toy_objective({}, frozen=FrozenConfig(width=5))
    assert now.state_dict().keys() == before.state_dict().keys()
    assert now.teacher_config is None


@pytest.mark.parametrize("masks", [1, 2])
def test_flops_are_those_of_heads_and_teacher_more(masks):
    """6 for each multiply-add of the heads on every unit, 2 for each of the teacher's."""
    objective, without = taught({}, masks_per_image=masks), toy_objective({}, masks_per_image=masks)
    heads = masks * 16 * 32 * (16 + 4 + 1) * 64
    teacher, _ = objective.teachers[1].flops_per_image()
    assert objective.flops_per_image() == without.flops_per_image() + 6 * heads + teacher


def test_weight_ramp():
    objective = taught(frozen=FrozenConfig(weight=0.4, weight_ramp=0.5, width=64))
    weights = []
    for step in range(4):
        objective.begin_step(step, 4)
        weights.append(objective.frozen.weight)
    assert weights == pytest.approx([0.2, 0.4, 0.4, 0.4])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weight", -1), ("weight", math.nan), ("weight", math.inf), ("weight_ramp", 1.5), ("width", 0),
        ("width", 1 << 20), ("beta", 0), ("stages", ()), ("stages", ("c4", "c4")),
    ],
)  # fmt: skip
def test_wrong_choices_name_their_field(field, value):
    with pytest.raises(UserError, match=rf"objective\.frozen\.{field}: "):
        FrozenConfig(**{field: value})


def test_a_teacher_that_would_teach_nothing_is_refused():
    with pytest.raises(UserError, match=r"--objective\.teacher .*--objective\.frozen\.weight"):
        PixelConfig(teacher="test_vit")
    with pytest.raises(UserError, match=r"frozen\.width is 32.* 64 channels"):
        taught(frozen=FrozenConfig(weight=1.0, width=32))
