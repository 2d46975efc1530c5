"""The fast ways of the layers against the plain ones."""

import pytest
import torch
import torch.nn.functional as F

from itpn.nn.layers import SHORT, attend, cells_of, units_of


@pytest.mark.parametrize("patch_size", [8, 16])
def test_cells_of_some_units_are_those_of_all(patch_size):
    images = torch.randn(2, 3, 32, 48)
    everything = cells_of(images, patch_size)
    ids = torch.stack([torch.randperm(everything.shape[1])[:3] for _ in images])
    some = cells_of(images, patch_size, ids)
    for cells, of_all, kept in zip(some, everything, ids, strict=True):
        assert torch.equal(cells, of_all[kept])


def test_cells_are_cut_from_units():
    """Row 1, column 2 of a unit's cells holds its pixels from row 4 and column 8 on, colours changing
    fastest."""
    images = torch.randn(1, 3, 32, 32)
    unit = units_of(images, 16)[0, 3]
    assert torch.equal(cells_of(images, 16)[0, 3, 1, 2], unit[4:8, 8:12].flatten())


@pytest.mark.parametrize("length", [7, SHORT + 1])
@pytest.mark.parametrize("biased", [False, True])
def test_bf16_attention_is_attention(length, biased):
    q, k, v = torch.randn(3, 2, 4, length, 16).bfloat16()
    bias = torch.randn(4, length, length).bfloat16() if biased else None
    ours = attend(q, k, v, bias)
    exact = F.scaled_dot_product_attention(
        *(x.detach().float() for x in (q, k, v)), bias if bias is None else bias.float()
    )
    torch.testing.assert_close(ours.float(), exact, rtol=0.02, atol=0.02)


def test_gradient_of_bf16_attention():
    inputs = torch.randn(3, 2, 4, 9, 16).bfloat16().requires_grad_()
    exact = inputs.detach().float().requires_grad_()
    upstream = torch.randn(2, 4, 9, 16).bfloat16()
    attend(*inputs.unbind()).backward(upstream)
    F.scaled_dot_product_attention(*exact.unbind()).backward(upstream.float())
    torch.testing.assert_close(inputs.grad.float(), exact.grad, rtol=0.05, atol=0.05)
