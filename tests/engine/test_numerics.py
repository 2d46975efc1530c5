"""Precision: what is cast once is what autocast casts for every batch."""

import pytest
import torch

from itpn.engine.numerics import cast_linears
from itpn.heads.classify import Classifier, ClassifierConfig
from itpn.nn.hivit import HiViT, HiViTConfig
from tests.toys import toy_backbone

FAST = HiViTConfig(size="fast_itpn_tiny", image_size=32)


@pytest.mark.parametrize("config", [toy_backbone(relative_position_bias=True), FAST], ids=["toy", "fast"])
def test_linear_layers_cast_once_give_the_same_bits(config):
    torch.manual_seed(0)
    model = Classifier(HiViT(config), ClassifierConfig(num_classes=5)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(images)
        cast_linears(model, torch.bfloat16)
        assert torch.equal(model(images), expected)
    assert expected.std() > 0
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.float32}
