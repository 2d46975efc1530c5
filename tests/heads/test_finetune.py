"""The fine-tuning objective against a plain reference: one image at a time, torch's own loss."""

import pytest
import torch
import torch.nn.functional as F

from itpn.errors import UserError
from itpn.heads.classify import ClassifierConfig
from itpn.heads.finetune import ClassifyObjective, FinetuneConfig, forward_flops
from itpn.heads.mixing import MixConfig, noise
from tests.toys import toy_backbone

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
NUM_CLASSES, SIZE = 5, (64, 32)


def objective_of(mix=None, seed=0, **fields):
    torch.manual_seed(seed)
    backbone = {"relative_position_bias": True, "layer_scale": 0.1} | fields.pop("backbone", {})
    config = FinetuneConfig(mix=MixConfig(**(mix or {})), mean=MEAN, std=STD, **fields)
    head = ClassifierConfig(num_classes=NUM_CLASSES, init_std=0.5)
    return ClassifyObjective(toy_backbone(**backbone), head, config, SIZE)


def batch_of(objective, size=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draws = [objective.draw(generator) for _ in range(size)]
    batch = {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}
    batch["images"] = torch.randint(0, 256, (size, 3, *SIZE), dtype=torch.uint8, generator=generator)
    batch["labels"] = torch.randint(NUM_CLASSES, (size,), generator=generator)
    return batch


def plain_loss(objective, batch):
    """Erase, mix and weigh by loops over samples and pixels' slices."""
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (MEAN, STD))
    images = [(image / 255 - mean) / std for image in batch["images"].float()]
    for image, (top, left, h, w), seed in zip(
        images, batch["erase"].tolist(), batch["noise_seed"], strict=True
    ):
        grains = noise(seed.view(1), (3, *SIZE))[0]
        image[:, top : top + h, left : left + w] = grains[:, top : top + h, left : left + w]
    losses = []
    for i in range(len(images)):
        partner, first = i ^ 1, i - i % 2
        lam, (top, left, h, w) = batch["lam"][first].item(), batch["box"][first].tolist()
        if h * w:
            mixed = images[i].clone()
            mixed[:, top : top + h, left : left + w] = images[partner][:, top : top + h, left : left + w]
            assert lam == pytest.approx(1 - h * w / (SIZE[0] * SIZE[1]))
        else:
            mixed = lam * images[i] + (1 - lam) * images[partner]
        logits = objective.model(mixed[None])[0]
        smoothing = objective.config.mix.smoothing
        for label, share in ((batch["labels"][i], lam), (batch["labels"][partner], 1 - lam)):
            losses.append(share * F.cross_entropy(logits, label, label_smoothing=smoothing))
    return torch.stack(losses).sum() / len(images)


@pytest.mark.parametrize(
    "mix", [{}, {"cutmix": 0.0}, {"mixup": 0.0}, {"prob": 0.5, "erasing": 1.0}, {"smoothing": 0.0}]
)
def test_loss_and_gradient_are_the_plain_ones(mix):
    ours, plain = objective_of(mix), objective_of(mix)
    batch = batch_of(ours, seed=3)
    found, expected = ours(batch)["loss"], plain_loss(plain, batch)
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    for (name, mine), own in zip(ours.model.named_parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, own.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_batch_is_the_mean_of_its_pairs():
    objective = objective_of()
    batch = batch_of(objective)
    parts = [objective({name: x[i : i + 2] for name, x in batch.items()})["loss"] for i in (0, 2, 4)]
    torch.testing.assert_close(objective(batch)["loss"], torch.stack(parts).mean())


def test_accuracy_counts_what_most_of_an_image_shows():
    objective = objective_of({"mixup": 0.0, "cutmix": 0.0, "erasing": 0.0})
    batch = batch_of(objective)
    right = objective.model(objective.normalise(batch["images"])).argmax(1) == batch["labels"]
    assert objective(batch)["accuracy"].item() == pytest.approx(right.float().mean().item())


def test_drop_path_goes_by_the_drawn_numbers():
    objective = objective_of(backbone={"drop_path": 0.5}).train()
    batch = batch_of(objective)
    assert batch["drop"].shape == (6, objective.model.backbone.num_drops)
    first = objective(batch)["loss"]
    torch.testing.assert_close(objective(batch)["loss"], first)
    assert not torch.equal(objective(batch | {"drop": 1 - batch["drop"]})["loss"], first)


def test_the_average_follows_with_its_decay():
    objective = objective_of(average=0.5)
    expected = objective.model.head.weight.detach().clone()
    for step in range(4):
        with torch.no_grad():
            objective.model.head.weight.add_(1.0)
        objective.end_step(step, 10)
        decay = min(0.5, (step + 1) / (step + 10))
        expected = decay * expected + (1 - decay) * objective.model.head.weight
    torch.testing.assert_close(objective.evaluated.head.weight, expected)
    assert not any(parameter.requires_grad for parameter in objective.average.parameters())
    objective.restart_average()
    assert torch.equal(objective.evaluated.head.weight, objective.model.head.weight)


def test_without_an_average_the_weights_are_evaluated():
    objective = objective_of()
    assert objective.evaluated is objective.model
    assert not any("average" in name for name in objective.state_dict())


def test_work_is_three_forward_passes():
    objective = objective_of()
    assert objective.flops_per_image() == 3 * forward_flops(objective.model, SIZE)


def test_an_odd_batch_names_the_cure():
    objective = objective_of()
    with pytest.raises(UserError, match="--device-batch"):
        objective(batch_of(objective, size=3))
    plain = objective_of({"mixup": 0.0, "cutmix": 0.0})
    assert plain(batch_of(plain, size=3))["loss"].isfinite()


@pytest.mark.parametrize("fields", [{"average": 1.0}, {"average": -0.1}, {"mean": MEAN}])
def test_wrong_numbers(fields):
    with pytest.raises(UserError, match=r"finetune\."):
        FinetuneConfig(**fields)
