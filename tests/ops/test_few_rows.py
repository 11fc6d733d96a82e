"""The linear layer of few rows: torch's product where no kernel serves, its gradients, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F

from longllava.errors import BackendError, LongLLaVAError
from longllava.nn.linear import Linear
from longllava.ops.few_rows import few_rows_linear, triton


def test_it_is_the_product_with_its_gradients():
    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((2, 1, 6), (5, 6), (5,)))
    y, truth = few_rows_linear(x, weight, bias), F.linear(x, weight, bias)
    assert torch.equal(y, truth)
    grads = [torch.autograd.grad(out.square().sum(), (x, weight, bias)) for out in (y, truth)]
    assert all(torch.equal(a, b) for a, b in zip(*grads))
    layer = Linear(6, 5)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_what_does_not_fit_is_named():
    x, weight = torch.randn(5, 6), torch.randn(4, 6)
    with pytest.raises(LongLLaVAError, match=r"x must be \(..., K\) and weight \(N, K\), got \(5, 6\) and \(4, 5\)"):
        few_rows_linear(x, weight[:, :5])
    with pytest.raises(LongLLaVAError, match=r"bias must be \(4,\), got \(5,\)"):
        few_rows_linear(x, weight, torch.randn(5))
    with pytest.raises(BackendError, match="takes 1 to 4 rows, got 5"):
        few_rows_linear(x, weight, backend="triton")
    assert "in rows, of x's dtype" in str(triton.why_not(x[:4].half(), weight))
    assert "has no backward" in str(triton.why_not(x[:4].requires_grad_(), weight))
