"""The Triton kernels of the int8 linear layers and of norm and SwiGLU in Triton's interpreter.

    TRITON_INTERPRET=1 python -m pytest tests/ops/int8_interpreted.py

test_triton.py runs this file in a process of its own. The interpreter cuts bf16's bits off instead of rounding,
and multiplies matrices of bf16 as if they were integers: fp16 stands in for it where results are compared closely.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from longllava.ops import fused
from longllava.ops.fused import reference as fused_reference
from longllava.ops.fused import triton as fused_triton
from longllava.ops.int8_linear import cases, int8_linear, quantize_rows, reference, triton
from longllava.ops.quantized import quantize, rotate
from tests.ops.parity import error, poison_empty

# numpy's words for what a GPU does without one
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
CUT = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
TILES = (
    triton.Tiles(16, 32, 32, group=2, warps=4),
    triton.Tiles(32, 16, 16, group=3, described=False, flatten=False),
    triton.Tiles(16, 16, 64, group=1, persistent=False, flatten=False),
)


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_product_matches_the_reference(case, monkeypatch) -> None:
    poison_empty(monkeypatch)
    if case.mode == "weight_only" and case.dtype == torch.bfloat16:
        case = replace(case, dtype=torch.float16 if case.outliers == 1 else torch.float32)  # fp16 ends at 65,504
    args = case.inputs_of()
    got, truth = triton.run(*args), reference.run(*args)
    assert got.dtype == truth.dtype and got.shape == truth.shape
    assert got.numel() == 0 or error(got, truth) <= CUT[case.dtype]


@pytest.mark.parametrize("tiles", TILES, ids=str)
@pytest.mark.parametrize("name", ["two-tiles", "experts"])
def test_every_way_through_the_tiles_gives_the_same_bits(name, tiles, monkeypatch) -> None:
    monkeypatch.setattr(triton.triton_support, "n_processors", lambda device: 3)
    poison_empty(monkeypatch)
    case = replace(next(case for case in cases.CASES if case.name == name), inputs=112, rows=40, outputs=50)
    args = case.inputs_of()
    assert torch.equal(triton.run(*args, tiles=tiles), reference.run(*args))


def test_sums_over_spans_are_added_in_order(monkeypatch) -> None:
    monkeypatch.setattr(triton.triton_support, "n_processors", lambda device: 20)
    monkeypatch.setattr(triton, "FEW_INPUTS", 16)
    for name in ("weights-one-row", "experts-weights"):
        args = replace(next(case for case in cases.CASES if case.name == name), inputs=155).inputs_of()
        got = triton.run(*args)
        assert error(got, reference.run(*args)) <= 1e-6
        assert torch.equal(got, triton.run(*args))


def test_autocast_changes_no_product() -> None:
    x, (weight, scale) = torch.randn(triton.FEW_ROWS + 1, 64), reference.quantize_rows(torch.randn(8, 64))
    args = (x, weight, scale, None, None, None, "weight_only", x.dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert error(triton.run(*args), reference.run(*args)) <= CUT[torch.float32]


def test_sums_that_fp16_does_not_hold_before_they_are_scaled() -> None:
    """Of more rows than the kernel for few takes, which adds in fp32."""
    x, scale = torch.full((triton.FEW_ROWS + 1, 64), 100.0).half(), torch.tensor([1e-3, 2e-3])
    several = torch.full((1, 2, 64), 127, dtype=torch.int8), scale[None], torch.tensor([0, len(x)], dtype=torch.int32)
    for weight, scales, offsets in ((several[0][0], scale, None), several):
        args = (x, weight, scales, None, None, offsets, "weight_only", x.dtype)
        assert torch.equal(triton.run(*args), reference.run(*args))


@pytest.mark.parametrize("width", [1, 37, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_are_quantised_to_the_same_bits(width, dtype, monkeypatch) -> None:
    monkeypatch.setattr(triton, "ROW_BLOCK", 64)  # the widest is read in pieces
    x = torch.randn(9, 2 * width)[:, :width] * torch.logspace(-20, 4, 9)[:, None]
    x[1], x[2, 0], x[3, -1], x[4] = 0, torch.nan, -torch.inf, 1e-35
    x[5, 0], x[6] = 4e6, torch.arange(width) - 63.5  # ties
    x = x.to(dtype)
    for absmax in (None, x.float().abs().amax(1)):
        got, truth = triton.quantize_rows(x, absmax), reference.quantize_rows(x, absmax)
        assert torch.equal(got[0], truth[0])
        assert torch.equal(got[1], truth[1]) or torch.equal(got[1].isnan(), truth[1].isnan())
        assert torch.equal(got[1].nan_to_num(), truth[1].nan_to_num())


@pytest.mark.parametrize(("rows", "pieces"), [(67, 1), (9, 13), (6, 70)])  # 64, 4 rows a program, one
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_are_rotated_to_the_same_bits(rows: int, pieces: int, dtype: torch.dtype) -> None:
    width = 16 * pieces
    both = torch.randn(rows, 2 * width) * torch.logspace(-20, 4, rows)[:, None]
    both[1], both[2, 0], both[3, width - 1], both[4, :width] = 0, torch.nan, -torch.inf, 1e-35
    x, up = both.to(dtype).chunk(2, 1)
    (values, scale), truth = triton.quantize_rows(x, None, True), quantize(rotate(x))
    assert torch.equal(values, truth[0]) and torch.equal(scale.nan_to_num(7), truth[1].nan_to_num(7))
    if dtype != torch.bfloat16:
        assert torch.equal(triton.rotate_rows(x).nan_to_num(7), rotate(x).to(dtype).nan_to_num(7))
    hidden, _ = fused_triton.swiglu(x, up, None, False)
    (values, scale), truth = fused_triton.swiglu(x, up, None, True, True), quantize(rotate(hidden))
    assert torch.equal(values, truth[0]) and torch.equal(scale.nan_to_num(7), truth[1].nan_to_num(7))
    assert triton.rotate_rows(x[:0]).shape == (0, width)


def test_a_smaller_absmax_than_is_true_saturates() -> None:
    x = torch.tensor([[1.0, -1.0, 0.25]])
    values, _ = triton.quantize_rows(x, torch.tensor([0.5]))
    assert values.tolist() == [[127, -127, 64]]


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(5, 40), (3, 1000), (1, 3000), (3, 1), (0, 8), (2, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_norm_and_swiglu_match_the_reference(rows, width, dtype, quantized, monkeypatch) -> None:
    poison_empty(monkeypatch)
    x, residual = torch.randn(rows, 2 * width + 1).to(dtype)[:, :width], torch.randn(rows, width).to(dtype)
    weight = torch.randn(width).to(dtype)
    calls = [("rms_norm", (x, weight, 1e-6, other, quantized)) for other in (None, residual)]
    calls.append(("swiglu", (x, residual, None, quantized)))
    if quantized and width:
        calls.append(("swiglu", (x, residual, torch.full((rows,), 9.0), quantized)))
    for name, args in calls:
        for got, truth in zip(getattr(fused_triton, name)(*args), getattr(fused_reference, name)(*args)):
            assert (got is None) == (truth is None)
            if got is not None and got.numel():
                assert got.dtype == truth.dtype and got.shape == truth.shape
                # an int8 value on the edge may fall to either side
                assert error(got, truth) <= (1.6e-2 if got.dtype == torch.int8 else CUT[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_sum_is_rounded_before_it_is_normalised(dtype) -> None:
    x, residual, weight = torch.randn(4, 300).to(dtype), torch.randn(4, 300).to(dtype), torch.randn(300).to(dtype)
    y, _, total = fused_triton.rms_norm(x, weight, 1e-6, residual, False)
    assert torch.equal(y, fused_triton.rms_norm(total, weight, 1e-6, None, False)[0])


@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_result_is_in_the_dtype_that_is_asked_for(dtype, out) -> None:
    """As under autocast: the weight in fp32."""
    x, weight = torch.randn(4, 300).to(dtype), torch.randn(300)
    y, truth = (fused.rms_norm(x, weight, 1e-6, dtype=out, backend=b)[0] for b in ("triton", "reference"))
    assert y.dtype == out and error(y, truth) <= CUT[torch.bfloat16 if torch.bfloat16 in (dtype, out) else out]
    assert fused.rms_norm(x, weight, 1e-6, backend="triton")[0].dtype == torch.float32


def test_nan_and_infinity_of_a_row_stay_in_it() -> None:
    x, weight = torch.randn(3, 8), torch.ones(8)
    x[1, 2], x[2, 0] = torch.nan, torch.inf
    for quantized in (False, True):
        for y, scale in (fused_triton.rms_norm(x, weight, 1e-6, None, quantized)[:2],
                         fused_triton.swiglu(x, x, None, quantized)):  # fmt: skip
            seen = (y if scale is None else scale[:, None] * y).isnan().any(1) | (y.abs() == torch.inf).any(1)
            assert seen.tolist() == [False, True, True]


def test_gradients_are_the_references() -> None:
    x, residual, weight = (torch.randn(*shape, requires_grad=True) for shape in ((4, 24), (4, 24), (24,)))

    def gradients(backend: str) -> tuple[torch.Tensor, ...]:
        y, total = fused.rms_norm(x, weight, 1e-6, residual, backend=backend)
        z = fused.swiglu(total, y, backend=backend)
        return torch.autograd.grad((z * torch.arange(24)).sum() + total.sin().sum(), (x, residual, weight))

    for got, truth in zip(gradients("triton"), gradients("reference")):
        assert error(got, truth) <= 1e-6
    _, total = fused.rms_norm(x, weight, 1e-6, residual, quantized=True, backend="triton")
    assert error(torch.autograd.grad(total.sum(), x)[0], torch.ones(4, 24)) == 0


def test_ops_choose_it_here_and_keep_torchs_rules() -> None:
    x, (weight, scale) = torch.randn(2, 3, 48), reference.quantize_rows(torch.randn(20, 48))
    assert torch.equal(int8_linear(x, weight, scale, backend="triton"), int8_linear(x, weight, scale))
    assert torch.equal(quantize_rows(x, backend="triton").values, quantize_rows(x, backend="reference").values)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    rows = x[0].detach().requires_grad_()
    other = torch.randn(3, 48, requires_grad=True)
    for quantized in (False, True):
        args = (rows, scale.new_ones(48), 1e-6, other, quantized, rows.dtype, "triton")
        torch.library.opcheck(fused.call.rms_norm, args, test_utils=tests)
        for rotated in {False, quantized}:
            torch.library.opcheck(fused.call.swiglu, (rows, other, None, quantized, rotated, "triton"),
                                  test_utils=tests)  # fmt: skip


def far_apart(x: torch.Tensor) -> torch.Tensor:
    """x with its rows 2^26 elements apart: the 33rd lies 2^31 from the first. Only touched pages take memory."""
    try:
        room = torch.empty(x.shape[0] * 2**26 + x.shape[1], dtype=x.dtype)
    except RuntimeError as refused:
        pytest.skip(f"4 GiB of address space: {refused}")
    return room.as_strided(x.shape, (2**26, 1)).copy_(x)


def test_offsets_beyond_32_bits() -> None:
    x, weight = torch.randn(34, 16).half(), torch.ones(16).half()
    far = far_apart(x)
    assert torch.equal(triton.quantize_rows(far)[0], triton.quantize_rows(x)[0])
    assert torch.equal(fused_triton.swiglu(far, far, None, False)[0], fused_triton.swiglu(x, x, None, False)[0])
    pairs = zip(*(fused_triton.rms_norm(t, weight, 1e-6, t, True) for t in (far, x)))
    assert all(torch.equal(a, b) for a, b in pairs)
    w, scale = reference.quantize_rows(torch.randn(5, 16))
    args = (w, scale, None, None, None, "weight_only", torch.float16)
    assert torch.equal(triton.run(far, *args), triton.run(x, *args))


def test_few_rows_of_experts_ask_no_host(monkeypatch) -> None:
    """What generation/decoding.py captures in a CUDA graph, and what it therefore leaves out."""
    weight, scale = torch.ones(3, 8, 32, dtype=torch.int8), torch.ones(3, 8)
    offsets = torch.tensor([0, 5, 5, triton.FEW_ROWS], dtype=torch.int32)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: pytest.fail("the host was asked"))

    def multiply(n_rows: int) -> None:
        triton.run(torch.ones(n_rows, 32), weight, scale, None, None, offsets, "weight_only", torch.float32)

    multiply(triton.FEW_ROWS)
    with pytest.raises(pytest.fail.Exception, match="the host was asked"):
        multiply(triton.FEW_ROWS + 1)
