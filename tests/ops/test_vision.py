"""The encoder's passes: worked out by hand, against torch, and what they refuse."""

import math

import pytest
import torch
import torch.nn.functional as F

from longllava.errors import BackendError, LongLLaVAError
from longllava.ops import triton_support
from longllava.ops.int8_linear import quantize_rows
from longllava.ops.vision import (
    ACTIVATIONS,
    LINEAR_ACTIVATED_BACKENDS,
    Quantized,
    activate_,
    activated_rows,
    add_layer_norm,
    linear_activated,
    triton,
)


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


@pytest.mark.parametrize("backend", [None, "apart", "reference"])
def test_a_product_is_activated(backend):
    x, weight = torch.tensor([[[1.0, 2.0]], [[-1.0, 0.5]]]), torch.tensor([[3.0, -1.0], [0.0, 2.0]])
    y = linear_activated(x, weight.requires_grad_(), torch.ones(2), "quick_gelu", backend=backend)
    expected = [value / (1 + math.exp(-1.702 * value)) for value in (2.0, 5.0, -2.5, 2.0)]
    assert y.shape == (2, 1, 2) and y.flatten().tolist() == pytest.approx(expected, abs=1e-6) and not y.requires_grad
    bare = linear_activated(x, weight, None, "gelu", backend=backend).flatten()
    assert bare.tolist() == pytest.approx([0.841344746, 3.99987332, -0.000814, 0.841344746], abs=1e-5)
    assert linear_activated(x[:0], weight, None, "gelu", backend=backend).shape == (0, 1, 2)


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
    with pytest.raises(LongLLaVAError, match=r"linear_activated: x must be .* got \(2, 8\) and \(4, 7\)"):
        linear_activated(x, rows(4, 7), None, "gelu")
    with pytest.raises(LongLLaVAError, match=r"linear_activated: bias must be \(4,\), got \(8,\)"):
        linear_activated(x, rows(4, 8), rows(8), "gelu")
    with pytest.raises(LongLLaVAError, match="activation: got 'silu'"):
        linear_activated(x, rows(4, 8), None, "silu")


def test_a_product_that_the_kernel_does_not_take_is_named(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the CPU would do
    monkeypatch.setattr(triton_support, "missing", lambda: None)

    def why_not(n_rows=4096, n_outputs=4096, n_inputs=64, dtype=torch.bfloat16, weight_dtype=torch.bfloat16):
        x, weight = torch.empty(n_rows, n_inputs, dtype=dtype), torch.empty(n_outputs, n_inputs, dtype=weight_dtype)
        return triton.why_not_linear(x, weight, None, "gelu")

    assert why_not() is None and why_not(4096 - 127) is None and why_not(4096, 4304 - 256) is None
    assert why_not(4096 - 128) == "takes 512 tiles of 128 rows x 256 outputs at least, got 496"
    assert why_not(n_outputs=4092) == "takes rows that begin at multiples of 16 bytes, got 64 inputs and 4092 outputs"
    assert why_not(n_inputs=588).endswith("got 588 inputs and 4096 outputs")
    assert why_not(n_inputs=0).endswith("got 0 inputs and 4096 outputs")
    assert why_not(dtype=torch.float16) == "takes one dtype, bfloat16 or float16, got float16, bfloat16"
    assert why_not(dtype=torch.float32, weight_dtype=torch.float32).endswith("got float32, float32")
    assert why_not(dtype=torch.float64).startswith("takes float32, bfloat16 or float16, got x in float64")
    monkeypatch.setattr(triton, "_has_room", lambda device: False)
    assert why_not() == "needs Hopper's tensor memory accelerator and 180248 bytes of shared memory a block"
    assert [backend.name for backend in LINEAR_ACTIVATED_BACKENDS] == ["triton", "apart", "reference"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [192, 1024, 1152, 4096])
def test_on_a_gpu_int8_output_has_the_bits_of_the_other(width, dtype):
    """But for a norm in fp32: its threads then hold eight numbers of a row, not four, and add them in that order."""
    x, delta = (factor * rows(1000, width).to("cuda", dtype) for factor in (1, 3))
    weight, bias = (factor * rows(width).to("cuda", dtype) for factor in (1, 2))
    plain, total = add_layer_norm(x, delta, weight, bias, 1e-5, backend="triton")
    int8, same = add_layer_norm(x, delta, weight, bias, 1e-5, quantized=True, backend="triton")
    truth, _ = add_layer_norm(*(t.double() for t in (x, delta, weight, bias)), 1e-5)
    assert torch.equal(total, same) and (plain - truth).norm() < 5e-3 * truth.norm()
    pairs = [] if dtype is torch.float32 else [(plain, int8)]
    expected = quantize_rows(plain)
    assert (int8.values.int() - expected.values.int()).abs().max() <= 1
    assert torch.allclose(int8.scale, expected.scale, rtol=1e-5)
    for name in ACTIVATIONS:
        pairs.append((activate_(x.clone(), name, backend="triton"), activated_rows(x, name, backend="triton")))
        truth = activate_(x.double(), name)
        assert (pairs[-1][0] - truth).norm() < 5e-3 * truth.norm()
    for floats, found in pairs:
        expected = quantize_rows(floats)
        assert torch.equal(found.values, expected.values) and torch.equal(found.scale, expected.scale)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("n_rows", "n_outputs", "n_inputs"), [(4096, 4096, 1024), (5001, 4304, 1152)])
def test_on_a_gpu_a_product_is_activated_before_it_is_rounded(n_rows, n_outputs, n_inputs, activation):
    x, weight = rows(n_rows, n_inputs).to("cuda", torch.bfloat16), rows(n_outputs, n_inputs).to("cuda", torch.bfloat16)
    weight, bias = weight / 32, rows(n_outputs).to("cuda", torch.bfloat16)
    if reason := triton.why_not_linear(x, weight, bias, activation):
        pytest.skip(reason)
    truth = linear_activated(*(t.double() for t in (x, weight, bias)), activation, backend="reference")
    found, apart = (linear_activated(x, weight, bias, activation, backend=name) for name in ("triton", "apart"))
    assert (found - truth).norm() < 2e-3 * truth.norm() and (found - truth).norm() < (apart - truth).norm()
