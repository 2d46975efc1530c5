"""The classifier against the authors' fine-tuned model, and its loss against torch's own."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from itpn.heads.classify import Classifier, smoothed_cross_entropy
from itpn.nn.hivit import HiViT
from itpn.weights.convert import from_official
from tests.toys import toy_backbone

REFERENCE = Path(__file__).parents[1] / "reference"


@pytest.mark.parametrize("bias", [True, False])
def test_logits_are_the_authors(bias):
    tensors = load_file(REFERENCE / f"pixel_finetune_{'rpe' if bias else 'norpe'}.safetensors")
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    model = Classifier(HiViT(toy_backbone(mlp_ratio=4.0, relative_position_bias=bias)), num_classes=10).eval()
    ours = {key.removeprefix("model."): value for key, value in from_official(state).items()}
    for part, theirs in (("norm", "fc_norm"), ("head", "head")):
        ours |= {f"{part}.{kind}": state[f"{theirs}.{kind}"] for kind in ("weight", "bias")}
    model.load_state_dict(ours)
    torch.testing.assert_close(model(tensors["input"]), tensors["logits"], atol=1e-5, rtol=0)


def test_loss_and_accuracy():
    logits, labels = torch.tensor([[2.0, 0, 0], [0, 0, 1], [1, 0, 0]]), torch.tensor([0, 2, 1])
    found = smoothed_cross_entropy(logits, labels)
    assert found["accuracy"].item() == pytest.approx(2 / 3)
    torch.testing.assert_close(found["loss"], F.cross_entropy(logits, labels, label_smoothing=0.1))
