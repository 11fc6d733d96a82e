"""The linear layer of few rows: torch's product where no kernel serves, its gradients, and what it refuses."""

import sys
from types import SimpleNamespace

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


def test_a_bias_of_any_stride_is_the_same_bias(monkeypatch):
    """The kernel, here what it reads, takes its numbers one after another."""

    def multiply(x, weight, scale, bias, y, n_outputs, weight_row, **shape):
        y.copy_(x @ weight.T + bias.as_strided((n_outputs,), (1,)))

    name = "longllava.ops.few_rows.triton_kernels"
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(multiply={(5,): multiply}))
    x, weight, bias = torch.randn(2, 6), torch.randn(5, 6), torch.randn(10)[::2]
    torch.testing.assert_close(triton.run(x, weight, bias), F.linear(x, weight, bias))


@pytest.mark.parametrize(("outputs", "inputs", "bytes_each", "rows", "expected"), [
    (28672, 4096, 1, 1, (2, 4096)), (4096, 14336, 1, 1, (4, 2048)), (1024, 4096, 1, 1, (1, 4096)),
    (65536, 4096, 2, 1, (2, 2048)), (4096, 14336, 2, 1, (2, 2048)), (288, 8192, 2, 1, (1, 4096)),
    (8192, 256, 2, 1, (4, 256)), (8192, 256, 1, 1, (4, 256)), (4096, 4096, 2, 3, (2, 1024)), (8192, 5, 4, 4, (4, 16)),
])  # fmt: skip
def test_a_program_has_the_outputs_and_inputs_that_a_gpu_was_fastest_with(
    outputs, inputs, bytes_each, rows, expected
) -> None:
    assert triton.shape(outputs, inputs, bytes_each, rows) == expected
