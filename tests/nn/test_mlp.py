"""The mixture of experts: sorted by expert once, the same bits as the published loop over experts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longllava.config import BackboneConfig
from longllava.nn.mlp import MixtureOfExperts
from tests.tiny import tiny_config


def mixture(n_experts: int, n_per_token: int, seed: int = 0) -> MixtureOfExperts:
    config: BackboneConfig = dataclasses.replace(tiny_config().backbone, n_experts=n_experts,
                                                 n_experts_per_token=n_per_token)  # fmt: skip
    torch.manual_seed(seed)
    module = MixtureOfExperts(config)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def published(module: MixtureOfExperts, x_BLD: torch.Tensor) -> torch.Tensor:
    """modeling_jamba.py's loop: expert after expert picks its tokens and adds to them."""
    x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
    weights_TX = torch.softmax(module.router(x_TD).float(), dim=-1)
    weight_TJ, expert_TJ = weights_TX.topk(module.n_per_token, dim=-1)
    y_TD = torch.zeros_like(x_TD)
    for number, expert in enumerate(module.experts):
        token_I, rank_I = torch.where(expert_TJ == number)
        if len(token_I):
            scaled = expert(x_TD[token_I]) * weight_TJ[token_I, rank_I, None].to(x_TD.dtype)
            y_TD = y_TD.index_add(0, token_I, scaled.to(y_TD.dtype))
    return y_TD.view_as(x_BLD)


@given(
    batch=st.integers(1, 3), length=st.integers(0, 40), n_experts=st.integers(1, 9), n_per_token=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_the_same_bits_as_the_published_loop(batch, length, n_experts, n_per_token, dtype, seed):
    module = mixture(n_experts, min(n_per_token, n_experts), seed).to(dtype)
    x_BLD = torch.randn(batch, length, 32).to(dtype)
    with torch.no_grad():
        assert torch.equal(module(x_BLD), published(module, x_BLD))


def test_gradients_are_those_of_the_published_loop():
    module = mixture(5, 2).double()
    x_BLD = torch.randn(2, 17, 32, dtype=torch.float64, requires_grad=True)
    leaves = [x_BLD, *module.parameters()]
    got = torch.autograd.grad(module(x_BLD).square().sum(), leaves, allow_unused=True)
    expected = torch.autograd.grad(published(module, x_BLD).square().sum(), leaves, allow_unused=True)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert all(gradient.abs().max() > 0 for gradient in got)


@pytest.mark.parametrize("chosen", [[0], [2, 4]])
def test_experts_without_tokens_are_left_out(chosen):
    module = mixture(5, len(chosen))
    module.router.weight.data.zero_()[chosen] = 10.0  # for positive inputs
    x_BLD = torch.rand(1, 7, 32) + 0.5
    for number in set(range(5)) - set(chosen):
        module.experts[number].forward = None  # would fail if called
    with torch.no_grad():
        y_BLD = module(x_BLD)
    assert torch.isfinite(y_BLD).all() and y_BLD.abs().min() > 0
