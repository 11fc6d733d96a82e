"""Products of bf16 on a processor without instructions for them, made in fp32 and rounded once, and on one with them,
of few numbers of rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from longllava.nn import linear
from longllava.nn.linear import MANY, Conv2d, Linear, product


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradients", [False, True])
def test_is_compiled_once_for_all_numbers_of_rows(dtype, gradients) -> None:
    torch.compiler.reset()
    layer, traced = Linear(8, 5).to(dtype), []
    compiled = torch.compile(layer, backend=lambda graph, _: traced.append(graph) or graph.forward, dynamic=True)
    with torch.set_grad_enabled(gradients):
        for rows in (MANY + 1, MANY + 2, 3 * MANY + 7):
            x = torch.randn(2, rows, 8, dtype=dtype)
            torch.testing.assert_close(compiled(x), layer(x))
    assert len(traced) == 1


@pytest.fixture
def rows_met(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    met, linear_of_torch = set(), F.linear
    monkeypatch.setattr(F, "linear", lambda x, *rest: met.add(x.shape[:-1].numel()) or linear_of_torch(x, *rest))
    return met


def test_torch_meets_few_numbers_of_rows(rows_met) -> None:
    """For each it keeps code of its own: a process that read prompts of 600 lengths held a gigabyte of it."""
    weight = torch.randn(3, 2, dtype=torch.bfloat16)
    for rows in range(2050):
        before = set(rows_met)
        with torch.no_grad():
            y = product(torch.ones(rows, 2, dtype=torch.bfloat16), weight)
        assert y.shape == (rows, 3)
        for met in rows_met - before:
            assert rows <= met <= min(rows * 9 / 8, rows + 63)
    assert len(rows_met) == 82


@pytest.mark.parametrize("under_autocast", [False, True])
def test_rows_of_zeros_change_nothing_else(under_autocast, rows_met) -> None:
    dtype = torch.float32 if under_autocast else torch.bfloat16
    x, weight, bias = torch.randn(3, 7, 48, dtype=dtype), torch.randn(5, 48, dtype=dtype), torch.randn(5, dtype=dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=under_autocast):
        y, wanted = product(x, weight, bias), F.linear(x, weight, bias)
    assert rows_met == {21, 22} and y.dtype == torch.bfloat16
    torch.testing.assert_close(y, wanted)


def test_fp32_and_gradients_have_the_rows_they_come_with(rows_met) -> None:
    product(torch.randn(21, 4, dtype=torch.bfloat16, requires_grad=True), torch.randn(5, 4, dtype=torch.bfloat16))
    with torch.no_grad():
        product(torch.randn(21, 4), torch.randn(5, 4))
    assert rows_met == {21}
