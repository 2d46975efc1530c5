"""The classifier's loss against torch's own; its logits are compared in tests/weights/test_parity.py."""

import pytest
import torch
import torch.nn.functional as F

from itpn.heads.classify import smoothed_cross_entropy


def test_loss_and_accuracy():
    logits, labels = torch.tensor([[2.0, 0, 0], [0, 0, 1], [1, 0, 0]]), torch.tensor([0, 2, 1])
    found = smoothed_cross_entropy(logits, labels)
    assert found["accuracy"].item() == pytest.approx(2 / 3)
    torch.testing.assert_close(found["loss"], F.cross_entropy(logits, labels, label_smoothing=0.1))
