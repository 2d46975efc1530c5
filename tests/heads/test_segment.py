"""The heads by hand and by an independent computation; the loss by loops. The maps that they see are compared
with the authors' in tests/weights/test_parity.py."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from itpn.engine.distributed import World
from itpn.errors import UserError
from itpn.heads.drops import RandomDrops
from itpn.heads.segment import SegmentObjective
from itpn.heads.upernet import ConvNorm, FCNHead, SegmenterConfig, UPerHead
from itpn.nn.hivit import HiViT
from tests.toys import toy_backbone, toy_model

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BASE = (384, 512, 768, 768)


def toy_config(**numbers) -> SegmenterConfig:
    toy = {"num_classes": 5, "width": 16, "auxiliary_width": 8, "norm": "group", "dropout": 0.0,
           "mean": IMAGENET[0], "std": IMAGENET[1]}  # fmt: skip
    return SegmenterConfig(**toy | numbers)


def toy_segmenter(pyramid: bool = True, seed: int = 0, drop_path: float = 0.0, **numbers) -> SegmentObjective:
    torch.manual_seed(seed)
    return SegmentObjective(toy_model(pyramid, drop_path=drop_path), toy_config(**numbers), (64, 64))


def toy_batch(size: int = 2, num_classes: int = 5, side: int = 64) -> dict[str, torch.Tensor]:
    draws = torch.Generator().manual_seed(0)
    labels = torch.randint(0, num_classes, (size, side, side), generator=draws, dtype=torch.uint8)
    labels[:, :9] = 255
    images = torch.randint(0, 256, (size, 3, side, side), generator=draws, dtype=torch.uint8)
    return {"images": images, "labels": labels}


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def by_hand(channels: int, width: int, kernel: int) -> int:
    """A convolution without bias and a norm's two numbers per channel."""
    return channels * width * kernel**2 + 2 * width


def test_base_size_head_by_hand() -> None:
    with torch.device("meta"):
        config = SegmenterConfig(num_classes=150)
        head, auxiliary = UPerHead(BASE, config).eval(), FCNHead(768, config).eval()
        maps = [torch.empty(2, C, 128 >> i, 128 >> i) for i, C in enumerate(BASE)]
        assert head(maps).shape == (2, 150, 128, 128)
        assert auxiliary(maps[2]).shape == (2, 150, 32, 32)
    pooling = 4 * by_hand(768, 768, 1) + by_hand(768 + 4 * 768, 768, 3)
    path = sum(by_hand(C, 768, 1) for C in BASE[:3]) + 3 * by_hand(768, 768, 3)
    assert count(head) == pooling + path + by_hand(4 * 768, 768, 3) + 768 * 150 + 150 == 67_472_022
    assert count(auxiliary) == by_hand(768, 256, 3) + 256 * 150 + 150


def test_the_head_is_upernet_step_by_step() -> None:
    torch.manual_seed(0)
    head = UPerHead((6, 7, 8, 9), toy_config(norm="batch", width=12)).eval()
    for layer in head.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 2)
            nn.init.normal_(layer.bias)
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2)
    c4, c8, c16, c32 = (torch.randn(2, C, 16 >> i, 24 >> i) for i, C in enumerate((6, 7, 8, 9)))

    def run(block: ConvNorm, x: torch.Tensor) -> torch.Tensor:
        conv, norm, _ = block
        x = F.conv2d(x, conv.weight, padding=conv.kernel_size[0] // 2)
        x = (x - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + norm.eps).sqrt()
        return (x * norm.weight[:, None, None] + norm.bias[:, None, None]).relu()

    def up(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)

    pools = [
        up(run(block, F.adaptive_avg_pool2d(c32, n)), c32)
        for block, n in zip(head.pools, (1, 2, 3, 6), strict=True)
    ]
    m32 = run(head.pooled, torch.cat([c32, *pools], 1))
    m16 = run(head.laterals[2], c16) + up(m32, c16)
    m8 = run(head.laterals[1], c8) + up(m16, c8)
    m4 = run(head.laterals[0], c4) + up(m8, c4)
    outs = [run(head.outs[0], m4), run(head.outs[1], m8), run(head.outs[2], m16), m32]
    fused = run(head.fuse, torch.cat([up(out, c4) for out in outs], 1))
    last = head.classify[1]
    expected = F.conv2d(fused, last.weight, last.bias)
    torch.testing.assert_close(head([c4, c8, c16, c32]), expected, rtol=1e-4, atol=1e-5)


def test_starting_weights() -> None:
    torch.manual_seed(0)
    head = UPerHead((64, 64, 64, 64), SegmenterConfig(num_classes=150, width=64))
    weight = head.fuse[0].weight
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.02)  # He, over the outputs
    assert head.classify[1].weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not head.classify[1].bias.any()


@pytest.mark.parametrize("width", [1, 3, 16, 24, 768])
def test_groups_have_more_than_one_channel(width: int) -> None:
    norm = ConvNorm(3, width, 1, "group")[1]
    assert norm.num_groups <= 32 and (width == 1 or width // norm.num_groups > 1)


def test_the_loss_by_loops() -> None:
    objective, batch = toy_segmenter(), toy_batch()
    batch["labels"][1, 20:] = 255
    found = objective(batch)
    maps = objective.maps(objective.normalise(batch["images"]))
    means: dict[str, list[float]] = {"decode": [], "auxiliary": [], "accuracy": []}
    for name, logits in (
        ("decode", objective.decode_head(maps)),
        ("auxiliary", objective.auxiliary_head(maps[2])),
    ):
        logits = F.interpolate(logits, (64, 64), mode="bilinear", align_corners=False)
        for scores, labels in zip(logits, batch["labels"], strict=True):
            labelled = labels != 255
            log_p, truth = scores[:, labelled].log_softmax(0), labels[labelled].long()
            means[name].append(-log_p.gather(0, truth[None]).mean().item())
            if name == "decode":
                means["accuracy"].append((log_p.argmax(0) == truth).float().mean().item())
    for name, values in means.items():
        assert found[name].item() == pytest.approx(sum(values) / 2, rel=1e-4)
    assert found["loss"].item() == pytest.approx(
        (found["decode"] + 0.4 * found["auxiliary"]).item(), rel=1e-5
    )


def test_the_published_mean_counts_every_pixel() -> None:
    batch = toy_batch()
    batch["labels"][0, 16:] = 255
    published = toy_segmenter(loss_over="all")
    logits = F.interpolate(
        published.decode_head(published.maps(published.normalise(batch["images"]))), (64, 64), mode="bilinear"
    )
    expected = F.cross_entropy(logits, batch["labels"].long(), ignore_index=255, reduction="none").mean()
    torch.testing.assert_close(published(batch)["decode"], expected.detach())
    assert toy_segmenter()(batch)["decode"] != published(batch)["decode"]


def test_a_sample_without_labels_counts_as_nothing() -> None:
    objective, batch = toy_segmenter(), toy_batch()
    alone = {name: tensor[:1] for name, tensor in batch.items()}
    batch["labels"][1] = 255
    both, one = objective(batch), objective(alone)
    assert both["decode"].item() == pytest.approx(one["decode"].item() / 2, rel=1e-4)
    batch["labels"][:] = 255
    none = objective(batch)
    none["loss"].backward()
    assert none["loss"] == 0 and none["accuracy"] == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in objective.parameters())


def test_with_group_norm_a_batch_is_the_mean_of_its_parts() -> None:
    objective, batch = toy_segmenter(), toy_batch(4)
    whole = objective(batch)
    parts = [objective({name: tensor[i : i + 2] for name, tensor in batch.items()}) for i in (0, 2)]
    for name, value in whole.items():
        torch.testing.assert_close(value, (parts[0][name] + parts[1][name]) / 2)


def test_drop_path_is_drawn_by_the_loader() -> None:
    objective, batch = toy_segmenter(drop_path=0.9), toy_batch()
    draws = objective.draw
    assert draws == RandomDrops(objective.model.backbone.num_drops)
    keep = torch.ones(2, draws.num_drops) * 0.999
    dropped, kept = (objective({**batch, "drop": drop}) for drop in (torch.zeros_like(keep), keep))
    assert dropped["loss"] != kept["loss"]
    torch.manual_seed(1)
    again = objective({**batch, "drop": keep})
    assert again["loss"] == kept["loss"]
    drawn = draws(torch.Generator().manual_seed(0))["drop"]
    assert drawn.shape == (draws.num_drops,) and 0 <= drawn.min() <= drawn.max() < 1
    assert RandomDrops.of(HiViT(toy_backbone()))(torch.Generator()) == {}


def test_without_the_auxiliary_head() -> None:
    objective = toy_segmenter(auxiliary_weight=0.0)
    assert objective.auxiliary_head is None and set(objective(toy_batch())) == {"loss", "decode", "accuracy"}


def test_every_trained_parameter_gets_a_gradient() -> None:
    objective = toy_segmenter()
    objective(toy_batch())["loss"].backward()
    missing = [n for n, p in objective.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing
    assert objective.flops_per_image() > 0
    assert objective.decode_head in objective.compile_blocks()


def test_logits_of_an_image_of_any_size() -> None:
    objective = toy_segmenter().eval()
    images = torch.randint(0, 256, (1, 3, 70, 33), dtype=torch.uint8)
    logits = objective.logits(images)
    assert logits.shape == (1, 5, 70, 33)
    grey = (255 * objective.normalise.mean).expand(1, 3, 96, 64) / 255  # filled with the mean colour
    grey = grey.clone()
    grey[..., :70, :33] = images / 255
    torch.testing.assert_close(objective.logits(grey)[..., :70, :33], logits, rtol=1e-4, atol=1e-4)


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="needs a pyramid"):
        toy_segmenter(pyramid=False)
    with pytest.raises(UserError, match="one image at a time"):
        toy_segmenter(norm="batch")(toy_batch(1))
    toy_segmenter(norm="batch").eval()(toy_batch(1))
    with pytest.raises(UserError, match="80 x 64 pixels: each side must be a multiple of 32"):
        SegmentObjective(toy_model(), toy_config(), (80, 64))
    with pytest.raises(ValueError, match="not settled"):
        SegmentObjective(toy_model(), toy_config(mean=None, std=None), (64, 64))
    for wrong in (
        {"num_classes": 0}, {"width": 0}, {"pools": ()}, {"pools": (0,)}, {"dropout": 1.0},
        {"auxiliary_weight": -1.0}, {"auxiliary_weight": math.nan}, {"num_classes": 70_000}, {"mean": None},
    ):  # fmt: skip
        with pytest.raises(UserError, match=r"segmenter\."):
            toy_config(**wrong)


def test_batch_norms_of_several_gpus_are_one() -> None:
    objective = toy_segmenter(norm="batch")
    names = set(objective.state_dict())
    for alone in (World(0, 1, torch.device("cpu")), World(0, 2, torch.device("cpu"))):
        alone._synchronise_norms(objective)
        assert nn.SyncBatchNorm not in {type(layer) for layer in objective.modules()}
    World(0, 2, torch.device("cuda"))._synchronise_norms(objective)
    kinds = {type(layer) for layer in objective.modules()}
    assert nn.SyncBatchNorm in kinds and nn.BatchNorm2d not in kinds
    assert set(objective.state_dict()) == names
