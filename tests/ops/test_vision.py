"""The encoder's passes: worked out by hand, against torch, and what they refuse."""

import math

import pytest
import torch
import torch.nn.functional as F

from longllava.errors import BackendError, LongLLaVAError
from longllava.ops.int8_linear import quantize_rows
from longllava.ops.vision import ACTIVATIONS, Quantized, activate_, activated_rows, add_layer_norm


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def test_the_sum_is_normalised_and_given_back():
    x, delta = torch.tensor([[1.0, 2.0], [0.0, 4.0]]), torch.tensor([[2.0, 3.0], [0.0, 0.0]])
    y, total = add_layer_norm(x, delta, torch.tensor([1.0, 10.0]), torch.tensor([0.5, 0.0]), 0.0)
    assert total.tolist() == [[3.0, 5.0], [0.0, 4.0]]
    assert torch.allclose(y, torch.tensor([[-0.5, 10.0], [-0.5, 10.0]]), atol=1e-6)


def test_activations_work_in_place():
    for activation, factor in (("quick_gelu", 1.702), ("gelu_tanh", 2 * (2 / math.pi) ** 0.5 * 1.044715)):
        x = torch.tensor([-100.0, -1.0, 0.0, 1.0, 100.0])
        found = activate_(x, activation)
        assert found is x
        expected = [0.0, -1 / (1 + math.exp(factor)), 0.0, 1 / (1 + math.exp(-factor)), 100.0]
        assert x.tolist() == pytest.approx(expected, abs=1e-6)
    x = torch.tensor([-100.0, -1.0, 0.0, 1.0, 100.0])
    assert activate_(x, "gelu") is x
    assert x.tolist() == pytest.approx([0.0, -0.158655254, 0.0, 0.841344746, 100.0], abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_output_is_the_quantisation_of_the_other(dtype):
    x, delta, weight, bias = rows(2, 5, 48).to(dtype), rows(2, 5, 48).mul(3).to(dtype), rows(48), rows(48).mul(2)
    x[0, 0], delta[0, 0], x[0, 1, 3] = 0, 0, torch.nan
    pairs = [
        [add_layer_norm(x, delta, weight.to(dtype), bias.to(dtype), 1e-5, quantized=q)[0] for q in (False, True)],
        *([activate_(x.clone(), name), activated_rows(x.clone(), name)] for name in ACTIVATIONS),
    ]
    for floats, int8 in pairs:
        expected = quantize_rows(floats, backend="reference")
        assert isinstance(int8, Quantized) and int8.dtype == dtype and int8.scale[0, 1].isnan()
        assert torch.equal(int8.values, expected.values)
        assert torch.equal(int8.scale.nan_to_num(7), expected.scale.nan_to_num(7))
    leaf = rows(2, 8).requires_grad_()
    int8, total = add_layer_norm(leaf, rows(2, 8), rows(8), rows(8), 1e-5, quantized=True)
    assert torch.equal(torch.autograd.grad(total.sum(), leaf)[0], torch.ones(2, 8)) and not int8.scale.requires_grad


def test_gradients_go_to_all():
    leaves = [rows(3, 8).requires_grad_(), rows(3, 8).mul(2).requires_grad_(), rows(8).requires_grad_()]
    bias = rows(8).mul(3).requires_grad_()
    y, total = add_layer_norm(*leaves, bias, 1e-5)
    found = torch.autograd.grad((y.square() + total).sum(), [*leaves, bias])
    together = leaves[0] + leaves[1]
    same = F.layer_norm(together, (8,), leaves[2], bias, 1e-5).square() + together
    for got, truth in zip(found, torch.autograd.grad(same.sum(), [*leaves, bias])):
        assert torch.allclose(got, truth, atol=1e-5)


def test_what_does_not_fit_is_named():
    x = rows(2, 8)
    with pytest.raises(LongLLaVAError, match=r"x and delta must agree, got \(2, 8\) in torch.float32, \(2, 7\)"):
        add_layer_norm(x, rows(2, 7), rows(8), rows(8), 1e-5)
    with pytest.raises(LongLLaVAError, match=r"weight and bias must be \(8,\), got \(7,\)"):
        add_layer_norm(x, x, rows(7), rows(8), 1e-5)
    with pytest.raises(BackendError, match="needs CUDA tensors, got x on cpu"):
        activate_(x, "gelu", backend="triton")
    with pytest.raises(LongLLaVAError, match="activation: got 'relu', allowed: gelu, gelu_tanh, quick_gelu"):
        activated_rows(x, "relu")
    with pytest.raises(LongLLaVAError, match=r"x must be rows \(\.\.\., F\), got a scalar"):
        activated_rows(torch.ones(()), "gelu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [192, 1024, 1152, 4096])
def test_on_a_gpu_int8_output_has_the_bits_of_the_other(width, dtype):
    """Sums over a row are made in the same order, whatever the rows are written as."""
    x, delta = (factor * rows(1000, width).to("cuda", dtype) for factor in (1, 3))
    weight, bias = (factor * rows(width).to("cuda", dtype) for factor in (1, 2))
    plain, total = add_layer_norm(x, delta, weight, bias, 1e-5, backend="triton")
    int8, same = add_layer_norm(x, delta, weight, bias, 1e-5, quantized=True, backend="triton")
    truth, _ = add_layer_norm(*(t.double() for t in (x, delta, weight, bias)), 1e-5)
    assert torch.equal(total, same) and (plain - truth).norm() < 5e-3 * truth.norm()
    pairs = [(plain, int8)]
    for name in ACTIVATIONS:
        pairs.append((activate_(x.clone(), name, backend="triton"), activated_rows(x, name, backend="triton")))
        truth = activate_(x.double(), name)
        assert (pairs[-1][0] - truth).norm() < 5e-3 * truth.norm()
    for floats, found in pairs:
        expected = quantize_rows(floats)
        assert torch.equal(found.values, expected.values) and torch.equal(found.scale, expected.scale)
