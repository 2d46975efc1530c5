"""The fast ways of the layers against the plain ones."""

import pytest
import torch
import torch.nn.functional as F

from itpn.nn.layers import SHORT, add_branch, attend, attend_biased, cells_of, units_of


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


@pytest.mark.parametrize("bias_shape", [None, (4, 9, 9), (2, 4, 9, 9), (2, 1, 9, 9)])
def test_gradient_of_bf16_attention(bias_shape):
    inputs = [torch.randn(2, 4, 9, 16) for _ in range(3)]
    inputs += [] if bias_shape is None else [torch.randn(bias_shape)]
    ours = [x.bfloat16().requires_grad_() for x in inputs]
    exact = [x.detach().float().requires_grad_() for x in ours]
    upstream = torch.randn(2, 4, 9, 16).bfloat16()
    attend(*ours).backward(upstream)
    F.scaled_dot_product_attention(*exact).backward(upstream.float())
    for ours_x, exact_x in zip(ours, exact, strict=True):
        torch.testing.assert_close(ours_x.grad.float(), exact_x.grad, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("branch_dtype", [torch.float32, torch.bfloat16])
def test_adding_a_branch_is_a_sum(x_dtype, branch_dtype):
    x = torch.randn(2, 3, 4).to(x_dtype).requires_grad_()
    branch = torch.randn(2, 3, 4).to(branch_dtype).requires_grad_()
    results = []
    for added in (add_branch(x, branch), x + branch):
        results.append([added, *torch.autograd.grad((added * added).sum(), (x, branch))])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_flex_attention_adds_the_bias(monkeypatch):
    """Traced whole as on a GPU, and computed by torch's plain implementation, which it keeps from CPUs."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 3, 20, 16, generator=generator) for _ in range(3)]
    inputs.append(torch.randn(3, 20, 20, generator=generator))
    upstream = torch.randn(2, 3, 20, 16, generator=generator)
    for tensor in inputs:
        tensor.requires_grad_()
    q, k, v, bias = inputs
    results = []
    for attention in (attend_biased, torch.compile(attend_biased, backend="eager", fullgraph=True)):
        out = attention(q, k, v, bias)
        results.append([out, *torch.autograd.grad(out, inputs, upstream)])
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    expected = [expected, *torch.autograd.grad(expected, inputs, upstream)]
    for result in results:
        for ours, theirs in zip(result, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_compiled_attention_on_a_gpu_is_attention():
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 196, 64)] * 3 + [(4, 196, 196), (2, 4, 196, 64)]
    *inputs, upstream = [torch.randn(shape, generator=generator).cuda() for shape in shapes]
    for tensor in inputs:
        tensor.requires_grad_()
    q, k, v, bias = inputs
    results = []
    for attention in (torch.compile(attend), F.scaled_dot_product_attention):
        out = attention(q, k, v, bias)
        results.append([out, *torch.autograd.grad(out, inputs, upstream)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
