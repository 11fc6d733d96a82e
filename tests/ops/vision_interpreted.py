"""The Triton kernels of the encoder's passes in Triton's interpreter, as triton_interpreted.py has the others."""

from __future__ import annotations

import pytest
import torch

from longllava.ops import vision
from longllava.ops.int8_linear import quantize_rows
from longllava.ops.quantized import Quantized
from longllava.ops.vision import triton as vision_triton
from tests.ops.parity import error, poison_empty

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy's; a GPU says nothing


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 24, 64, 1500])
def test_norm_matches_the_reference(width, dtype, monkeypatch) -> None:
    poison_empty(monkeypatch)
    x, delta = (torch.randn(2, 7, width).to(dtype) for _ in "xd")
    weight, bias = torch.randn(width).to(dtype), torch.randn(width).to(dtype)
    truth = vision.add_layer_norm(*(t.double() for t in (x, delta, weight, bias)), 1e-5, backend="reference")
    y, total = vision.add_layer_norm(x, delta, weight, bias, 1e-5, backend="triton")
    slack = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for got, expected in zip((y, total), truth):
        assert got.dtype == dtype and error(got, expected) < slack
    int8, same = vision.add_layer_norm(x, delta, weight, bias, 1e-5, quantized=True, backend="triton")
    assert torch.equal(same, total)
    expect_bits(int8, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", vision.ACTIVATIONS)
def test_activations_match_the_reference(activation, dtype, monkeypatch) -> None:
    poison_empty(monkeypatch)
    for width in (1, 40, 1100):
        every_second = (4 * torch.randn(2, 5, 2 * width)).to(dtype)[..., ::2]
        every_second[0, 0], every_second[0, 1, 0], every_second[0, 2, 0] = 0, torch.nan, -200
        alike = every_second.clone()
        truth = vision.activate_(every_second.double(), activation, backend="reference")
        got = vision.activate_(every_second, activation, backend="triton")
        slack = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
        assert got is every_second and error(got.nan_to_num(7), truth.nan_to_num(7)) < slack
        for rows in (alike, alike[:, :, : width // 2 + 1]):
            expect_bits(vision.activated_rows(rows, activation, backend="triton"), got[:, :, : rows.shape[2]])


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("activation", vision.ACTIVATIONS)
def test_product_is_activated_before_it_is_rounded(activation, with_bias, monkeypatch) -> None:
    """Tiles and steps over the inputs that are not full."""
    poison_empty(monkeypatch)
    monkeypatch.setattr(vision_triton, "LEAST_TILES", 1)
    x, weight = torch.randn(3, 50, 72).half()[:, 5:], torch.randn(264, 72).half()
    bias = 4 * torch.randn(264).half() if with_bias else None
    args = [None if t is None else t.double() for t in (x, weight, bias)]
    truth = vision.linear_activated(*args, activation, backend="reference")
    got = vision.linear_activated(x, weight, bias, activation, backend="triton")
    assert got.dtype == torch.float16 and got.shape == (3, 45, 264)
    # half a unit in the last place, which a rounding in between would add to
    assert ((got - truth).abs() <= 2**-11 * 1.05 * truth.abs() + 2e-6).all()


def expect_bits(int8: Quantized, floats: torch.Tensor) -> None:
    """Int8 rows are those of the floats that the kernel would have written, and nothing else."""
    truth = quantize_rows(floats, backend="reference")
    assert torch.equal(int8.values, truth.values) and int8.dtype == floats.dtype
    assert torch.equal(int8.scale.nan_to_num(7), truth.scale.nan_to_num(7))
