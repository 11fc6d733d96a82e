"""Products of bf16 on a processor without instructions for them: made in fp32, rounded once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from longllava.nn import linear
from longllava.nn.linear import MANY, Conv2d, Linear


@pytest.fixture(autouse=True)
def without_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "has_products", lambda dtype: dtype == torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_many_rows_are_the_fp32_product_rounded_once(dtype) -> None:
    layer, x = Linear(48, 7).to(dtype), torch.randn(2, MANY, 48).to(dtype)
    exact = F.linear(x.float(), layer.weight.float(), layer.bias.float())
    with torch.no_grad():
        assert torch.equal(layer(x), exact.to(dtype))
        torch.testing.assert_close(layer(x[:1, :3]).float(), exact[:1, :3], rtol=3 * torch.finfo(dtype).eps, atol=1e-2)
    assert layer(x).dtype == dtype and layer(x).requires_grad  # training is torch's own


def test_an_activated_product_likewise(monkeypatch) -> None:
    layer, x, given, product = Linear(48, 7).bfloat16(), torch.randn(2, MANY, 48).bfloat16(), [], F.linear
    monkeypatch.setattr(F, "linear", lambda *args: given.append(args[0].dtype) or product(*args))
    with torch.no_grad():
        y = layer.activated(x, "gelu")
        assert given == [torch.float32] and torch.equal(y, F.gelu(layer(x)))


def test_a_convolution_likewise() -> None:
    layer, x = Conv2d(3, 5, 4, 2, 1).bfloat16(), torch.randn(2, 3, 8, 8).bfloat16()
    with torch.no_grad():
        exact = F.conv2d(x.float(), layer.weight.float(), layer.bias.float(), 2, 1)
        assert torch.equal(layer(x), exact.bfloat16())


def test_fp32_and_mixed_dtypes_go_to_torch() -> None:
    layer, x = Linear(48, 7), torch.randn(MANY, 48)
    with torch.no_grad():
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
        with pytest.raises(RuntimeError, match="dtype"):
            layer(x.bfloat16())


def test_torch_is_asked_what_this_processor_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    linear._has_products.cache_clear()
    assert linear.has_products(torch.float32)
    assert linear.has_products(torch.bfloat16) == torch.ops.mkldnn._is_mkldnn_bf16_supported()


def test_compiles_in_one_graph_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the processor has is asked beside the graph: torch.compile does not trace the question."""
    monkeypatch.undo()
    torch.compiler.reset()
    layer, x = Linear(48, 7).bfloat16(), torch.randn(MANY, 48).bfloat16()
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))
