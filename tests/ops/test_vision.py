"""The encoder's passes: worked out by hand, against torch, and what they refuse."""

import pytest
import torch
import torch.nn.functional as F

from longllava.errors import BackendError, LongLLaVAError
from longllava.ops.vision import add_layer_norm, quick_gelu_


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def test_the_sum_is_normalised_and_given_back():
    x, delta = torch.tensor([[1.0, 2.0], [0.0, 4.0]]), torch.tensor([[2.0, 3.0], [0.0, 0.0]])
    y, total = add_layer_norm(x, delta, torch.tensor([1.0, 10.0]), torch.tensor([0.5, 0.0]), 0.0)
    assert total.tolist() == [[3.0, 5.0], [0.0, 4.0]]
    assert torch.allclose(y, torch.tensor([[-0.5, 10.0], [-0.5, 10.0]]), atol=1e-6)


def test_quick_gelu_works_in_place():
    x = torch.tensor([-100.0, -1.0, 0.0, 2.0, 100.0])
    found = quick_gelu_(x)
    assert found is x
    expected = [0.0, -1 / (1 + 2.718281828**1.702), 0.0, 2 / (1 + 2.718281828**-3.404), 100.0]
    assert x.tolist() == pytest.approx(expected, abs=1e-6)


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
        quick_gelu_(x, backend="triton")
