"""The detector as a whole: what its losses depend on, what they reach, and that it learns."""

from dataclasses import replace

import pytest
import torch
from torchvision.ops import box_iou

from itpn.engine.distributed import World
from itpn.errors import UserError
from itpn.heads.boxes import Objects
from itpn.heads.detect import DetectObjective, DetectorConfig
from itpn.heads.masks import paste_masks
from itpn.heads.regions import RegionConfig
from itpn.nn.hivit import HiViTConfig
from itpn.nn.pyramid import ModelConfig, PyramidConfig
from tests.engine.test_loop import metrics
from tests.heads.ranks import fine_tune
from tests.launch import torchrun
from tests.toys import toy_detector, toy_model, toy_objective, toy_scenes

PARTS = {"rpn_objectness", "rpn_box", "class", "box", "mask"}


@pytest.mark.parametrize("cascade", [False, True])
def test_the_loss_is_the_sum_of_its_parts(cascade):
    model, batch = toy_detector(cascade), toy_scenes()
    found = model(batch)
    stages = (
        {f"stage{i}_{name}" for i in (1, 2, 3) for name in ("class", "box", "mask")} if cascade else set()
    )
    assert set(found) == {"loss", *PARTS, *stages}
    assert all(part.shape == () and part.isfinite() for part in found.values())
    assert found["loss"].item() == pytest.approx(sum(found[name].item() for name in PARTS), rel=1e-6)
    assert [name for name, part in found.items() if part.requires_grad] == ["loss"]
    for name, weight in (("class", 1), ("box", 10), ("mask", 1)):
        if cascade:
            parts = [found[f"stage{i}_{name}"].item() for i in (1, 2, 3)]
            weighted = parts[0] + parts[1] / 2 + parts[2] / 4
            assert found[name].item() == pytest.approx(weight * weighted, rel=1e-5)


def test_gradients_reach_every_parameter_down_to_the_stem():
    model = toy_detector(cascade=True)
    model(toy_scenes())["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    pretrained = dict(model.model.named_parameters())
    assert all(p.grad.abs().sum() > 0 for p in pretrained.values())
    assert {name.split(".")[0] for name in pretrained} == {"backbone", "pyramid"}


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_images_without_objects(norm):
    model, batch = toy_detector(cascade=True, norm=norm), toy_scenes()
    nothing = {
        "labels": batch["labels"][:, :0],
        "boxes": batch["boxes"][:, :0],
        "masks": batch["masks"][:, :0],
    }
    for empty in (batch | {"labels": torch.full_like(batch["labels"], -1)}, batch | nothing):
        found = model(empty)
        assert [found[name].item() for name in ("rpn_box", "box", "mask")] == [0, 0, 0]
        model.zero_grad()
        found["loss"].backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_no_image_changes_what_another_one_costs():
    """So that accumulation and ranks change nothing: a batch is the mean of its parts, gradients too."""
    model, batch = toy_detector(cascade=True), toy_scenes(4)
    batch["labels"][3] = -1
    model(batch)["loss"].backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    whole = model(batch)
    parts = []
    for ids in ([0], [1, 2], [3]):
        parts.append(model({name: tensor[ids] for name, tensor in batch.items()}))
        (parts[-1]["loss"] * len(ids) / 4).backward()
    for name in whole:
        mean = (parts[0][name] + 2 * parts[1][name] + parts[2][name]) / 4
        torch.testing.assert_close(whole[name], mean, atol=1e-5, rtol=1e-5)
    for together, apart in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(together, apart.grad, atol=1e-5, rtol=1e-4)


def test_two_ranks_train_as_one_does(tmp_path):
    fine_tune(tmp_path / "one", World(0, 1, torch.device("cpu")), device_batch=4)
    torchrun("tests.heads.ranks", tmp_path / "two", directory=tmp_path)
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(one) == 4
    for name in ("loss", *PARTS):
        assert [line[name] for line in two] == pytest.approx([line[name] for line in one], abs=1e-5)


def test_what_is_drawn_follows_the_seeds_and_else_torchs_own_generator():
    model, batch = toy_detector(), toy_scenes()
    assert model(batch)["loss"] == model(batch)["loss"]
    others = batch | {"sampling": batch["sampling"] + 1}
    assert model(batch)["loss"] != model(others)["loss"]
    del batch["sampling"]
    torch.manual_seed(3)
    first = model(batch)["loss"]
    assert model(batch)["loss"] != first
    torch.manual_seed(3)
    assert model(batch)["loss"] == first


def test_the_loader_draws_seeds_and_drop_path():
    plain, dropping = toy_detector(), toy_detector(drop_path=0.5)
    assert set(plain.draw(torch.Generator())) == {"sampling"}
    drawn = dropping.draw(torch.Generator().manual_seed(0))
    assert drawn["drop"].shape == (dropping.model.backbone.num_drops,)
    assert drawn["sampling"].dtype == torch.long and drawn["sampling"].shape == ()
    batch = toy_scenes()
    never = torch.zeros(2, dropping.model.backbone.num_drops)
    assert dropping(batch | {"drop": never})["loss"] != dropping(batch | {"drop": never + 1})["loss"]


def test_padding_holds_neither_anchors_nor_detections():
    model, batch = toy_detector(), toy_scenes(pixels=(64, 96))
    batch["images"][:, :, 40:], batch["images"][:, :, :, 70:] = 0, 0
    batch["sizes"] = torch.tensor([[40, 70], [64, 96]])
    seen = []
    original = model.regions.losses
    model.regions.losses = lambda maps, boxes, *rest: seen.append(boxes) or original(maps, boxes, *rest)
    model(batch)
    assert (seen[0][0][:, 2:] <= torch.tensor([70, 40])).all()
    assert (seen[0][1][:, 2:].amax(0) > torch.tensor([70, 40])).all()
    model.regions.config = replace(model.regions.config, min_score=0.0)
    found = model.eval().predict(batch["images"], batch["sizes"])
    assert len(found[0].boxes) and (found[0].boxes[:, 2:] <= torch.tensor([70, 40])).all()
    assert (found[0].boxes >= 0).all()


def test_under_autocast_boxes_and_losses_stay_in_fp32():
    model, batch = toy_detector(), toy_scenes()
    with torch.autocast("cpu", torch.bfloat16):
        found = model(batch)
    assert all(part.dtype == torch.float32 for part in found.values())
    assert found["loss"].item() == pytest.approx(model(batch)["loss"].item(), rel=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        detections = model.eval().predict(batch["images"], batch["sizes"])
    assert {part.dtype for image in detections for part in image} <= {torch.float32, torch.int64}


def test_pre_trained_weights_fit_strictly():
    pretrained, model = toy_objective({}), toy_detector(seed=1)
    names = {name for name in pretrained.state_dict() if name.startswith("model.")}
    assert names == {name for name in model.state_dict() if name.startswith("model.")}
    model.model.load_state_dict(pretrained.model.state_dict())


@pytest.mark.parametrize("cascade", [False, True])
def test_published_size(cascade):
    """Backbone and pyramid count as the authors' detection backbone, the heads as their shapes say."""
    regions = RegionConfig(cascade=cascade)
    with torch.device("meta"):
        pretrained = ModelConfig(backbone=HiViTConfig(size="itpn_base"), pyramid=PyramidConfig(depth=1))
        model = DetectObjective(pretrained, DetectorConfig(mean=(0.5,), std=(0.5,), regions=regions))
    conv, biased = 256 * 256 * 9, 256 * 256 * 9 + 256
    box = 4 * (conv + 2 * 256) + (256 * 49 + 1) * 1024 + 1025 * (81 + 320)
    mask = 4 * biased + 4 * 256 * 256 + 256 + 257 * 80
    proposals = biased + 257 * 15
    counts = [sum(p.numel() for p in part.parameters()) for part in (model.model, model)]
    assert counts[0] == 81_552_000
    assert counts[1] == counts[0] + proposals + (3 if cascade else 1) * (box + mask)


def test_boxes_alone():
    model, batch = toy_detector(masks=False), toy_scenes()
    del batch["masks"]
    found = model(batch)
    assert set(found) == {"loss", *PARTS} - {"mask"}
    assert all(image.masks is None for image in model.eval().predict(batch["images"], batch["sizes"]))


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_it_learns_images_by_heart(norm):
    """Every object is found, with its class, box and mask, and nothing else is believed."""
    torch.manual_seed(0)
    model, batch = toy_detector(norm=norm, width=64), toy_scenes(3)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    steps = 180
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 10) * (1 if step < 0.7 * steps else 0.1)
        batch["sampling"] = torch.arange(3) + 1000 * step
        optimizer.zero_grad()
        model(batch)["loss"].backward()
        optimizer.step()
    found = model.eval().predict(batch["images"], batch["sizes"])
    for i, image in enumerate(found):
        real = batch["labels"][i] >= 0
        truth = Objects(batch["boxes"][i][real], batch["labels"][i][real], batch["masks"][i][real])
        believed = image.scores > 0.5
        overlaps = box_iou(truth.boxes, image.boxes[believed])
        best = overlaps.argmax(1)
        assert sorted(best.tolist()) == list(range(int(believed.sum()))), "each once, and nothing else"
        assert overlaps.amax(1).min() > 0.75
        assert torch.equal(image.labels[believed][best], truth.labels)
        pasted = paste_masks(image.masks[believed][best], image.boxes[believed][best], (64, 64))
        expected = paste_masks(truth.masks.float(), truth.boxes, (64, 64))
        both, either = (pasted & expected).sum((1, 2)), (pasted | expected).sum((1, 2))
        assert (both / either).min() > 0.7


def test_what_does_not_go_together_is_refused():
    with pytest.raises(UserError, match="pyramid"):
        DetectObjective(toy_model(pyramid=False), DetectorConfig(mean=(0.5,), std=(0.5,)))
    with pytest.raises(UserError, match="num_classes"):
        DetectorConfig(num_classes=0)
    with pytest.raises(UserError, match="32 x 64"):
        toy_detector().maps(torch.zeros(1, 3, 32, 64))
    with pytest.raises(UserError, match="multiple"):
        toy_detector().maps(torch.zeros(1, 3, 72, 64))
