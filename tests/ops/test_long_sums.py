"""Sums over 100,000 tokens by the compiled kernels: one chain of additions loses what is far smaller than its sum."""

from __future__ import annotations

import pytest

from tests.kernels import FORMS, needs_kernels, run_in_form

PRELUDE = """
import torch

def error(got, truth):
    return float((got.double() - truth).abs().max() / truth.abs().max())
"""

# sixteen sequences, so that the keys of each are taken by one task; few rows and many have kernels of their own, and so
# have channels that fill no vector
ATTENTION = """
from longllava.ops.attention import attention
random = torch.Generator().manual_seed(0)
k, v = (torch.randn(1, 100_000, 1, 17, generator=random) for _ in range(2))
for n_queries, size in ((2, 1), (2, 6), (16, 1), (16, 6)):
    q = torch.randn(1, n_queries, 1, 17, generator=random) * size
    wide = [x.double().transpose(1, 2) for x in (q, k, v + 1)]
    scores = wide[0] @ wide[1].transpose(2, 3) / 17**0.5
    truth, truth_lse = (scores.softmax(-1) @ wide[2]).transpose(1, 2), scores.logsumexp(-1).transpose(1, 2)
    inputs = [x.expand(16, -1, -1, -1) for x in (q, k, v + 1)]
    y, lse = attention(*inputs, causal=False, return_lse=True, backend="cpu")
    assert error(y, truth) < 4e-6 and error(lse, truth_lse) < 4e-7
"""

ATTENTION_GRADIENTS = """
from longllava.ops.attention import attention
random = torch.Generator().manual_seed(0)
q, k, v, grad = (torch.randn(1, n, 1, 16, generator=random) for n in (100_000, 24, 24, 100_000))
wide = [x.double() for x in (q, k, v, grad + 1)]
p = (torch.einsum("blhk,bshk->bhls", wide[0], wide[1]) / 4).softmax(-1)
dp = torch.einsum("blhk,bshk->bhls", wide[3], wide[2])
ds = p * (dp - (p * dp).sum(-1, keepdim=True)) / 4
truth = torch.einsum("bhls,blhk->bshk", ds, wide[0]), torch.einsum("bhls,blhk->bshk", p, wide[3])
inputs = [x.requires_grad_() for x in (q, k, v)]
attention(*inputs, causal=False, backend="cpu").backward(grad + 1)
assert error(k.grad, truth[0]) < 4e-6 and error(v.grad, truth[1]) < 4e-6
"""

# The truth of D and bias from the gradients of the tokens, which are no sums over them; that of A since steps twice as
# long, with u and A half as large, change nothing but D u: A grad_A = sum (delta grad_delta - u (grad_u - grad D)).
SCAN = """
from longllava.ops.selective_scan import selective_scan
random = torch.Generator().manual_seed(0)
u, delta, grad = (torch.randn(1, 100_000, 37, generator=random) + 1 for _ in range(3))
B, C = (torch.randn(1, 100_000, 1, generator=random) + 1 for _ in range(2))
A, D, bias = -torch.rand(37, 1, generator=random) - 0.5, torch.ones(37), torch.ones(37) / 2
inputs = [x.requires_grad_() for x in (u, delta.abs(), A, B, C, D)]
selective_scan(*inputs, delta_bias=bias.requires_grad_(), backend="cpu")[0].backward(grad)
with torch.no_grad():
    u, delta, A, B, C, D = inputs
    grad_u, grad_delta = u.grad.double(), delta.grad.double()
    steps = (delta.double() + bias) * grad_delta - u * (grad_u - grad.double())
    assert error(A.grad[:, 0], steps.sum((0, 1)) / A[:, 0].double()) < 6e-7
    assert error(D.grad, (u.double() * grad).sum((0, 1))) < 6e-7
    assert error(bias.grad, grad_delta.sum((0, 1))) < 6e-7
"""

CONVOLUTION = """
from longllava.ops.causal_conv1d import causal_conv1d
random = torch.Generator().manual_seed(0)
x, grad = (torch.randn(1, 100_000, 37, generator=random) + 1 for _ in range(2))
weight, bias = torch.randn(37, 4, generator=random), torch.randn(37, generator=random)
def gradients(dtype, backend):
    inputs = [x.to(dtype), *(p.detach().to(dtype).requires_grad_() for p in (weight, bias))]
    causal_conv1d(*inputs, activation="silu", backend=backend)[0].backward(grad.to(dtype))
    return inputs[1].grad, inputs[2].grad
found, truth = gradients(torch.float32, "cpu"), gradients(torch.float64, "reference")
assert error(found[0], truth[0]) < 6e-7 and error(found[1], truth[1]) < 6e-7
"""

NORM = """
from longllava.ops.fused import rms_norm
random = torch.Generator().manual_seed(0)
x, grad = (torch.randn(100_000, 37, generator=random) + 1 for _ in range(2))
weight = torch.ones(37, requires_grad=True)
rms_norm(x, weight, 1e-6, backend="cpu")[0].backward(grad)
wide = x.double()
truth = (grad * wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()).sum(0)
assert error(weight.grad, truth) < 3e-7
"""


@needs_kernels
@pytest.mark.parametrize("form", FORMS[:3])
def test_long_sums_of_attention_are_right(form):
    run_in_form(form, PRELUDE + ATTENTION + ATTENTION_GRADIENTS)


@needs_kernels
@pytest.mark.parametrize("form", FORMS[:3])
def test_long_sums_of_scan_are_right(form):
    run_in_form(form, PRELUDE + SCAN)


@needs_kernels
@pytest.mark.parametrize("form", FORMS[:3])
def test_long_sums_of_convolution_are_right(form):
    run_in_form(form, PRELUDE + CONVOLUTION)


@needs_kernels
@pytest.mark.parametrize("form", FORMS[:3])
def test_long_sums_of_norm_are_right(form):
    run_in_form(form, PRELUDE + NORM)
