"""Rows that are rotated before they become int8: the matrix, every backend's bits, gradients. On a GPU:
int8_interpreted.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longllava.errors import BackendError, LongLLaVAError
from longllava.ops import native
from longllava.ops.fused import swiglu
from longllava.ops.int8_linear import int8_linear, quantize_rows, quantize_weight, rotate_rows
from longllava.ops.quantized import Quantized, quantize, rotate
from tests.kernels import FORMS, needs_kernels, run_in_form

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HERE = ["reference"] + ["cpu"] * (native.why_not() is None)


def matrix(width: int) -> torch.Tensor:
    """Of order 16 by Sylvester's construction, between numbers that lie width / 16 apart."""
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(4):
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), hadamard)
    return torch.kron(hadamard / 4, torch.eye(width // 16, dtype=torch.float64))


@pytest.mark.parametrize("width", [16, 48, 160])
def test_rows_meet_the_matrix_which_is_its_own_inverse(width: int) -> None:
    x = torch.randn(2, 3, width, dtype=torch.float64)
    turned = rotate_rows(x)
    torch.testing.assert_close(turned, x @ matrix(width), rtol=0, atol=1e-14)
    torch.testing.assert_close(rotate_rows(turned), x, rtol=0, atol=1e-14)
    assert torch.equal(matrix(width) @ matrix(width), torch.eye(width, dtype=torch.float64))


def odd_rows(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """A view with rows of zeros, NaN, infinity, almost nothing, one number far above the others."""
    x = torch.randn(rows, 2 * width)[:, :width] * torch.logspace(-20, 4, rows)[:, None]
    x[1], x[2, 0], x[3, -1], x[4] = 0, torch.nan, -torch.inf, 1e-35
    x[5, 0] = 6e4
    return x.to(dtype)


def same(got: Quantized, values: torch.Tensor, scale: torch.Tensor) -> bool:
    return torch.equal(got.values, values) and torch.equal(got.scale.nan_to_num(7), scale.nan_to_num(7))


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_rows_are_those_of_the_rotated_floats_to_the_bit(dtype: torch.dtype, backend: str) -> None:
    for width in (16, 48, 208, 1040):
        x = odd_rows(9, width, dtype)
        got = quantize_rows(x, rotated=True, backend=backend)
        assert same(got, *quantize(rotate(x))) and got.dtype == dtype and bool(got.scale[2:4].isnan().all())
        floats = rotate_rows(x, backend=backend)
        assert floats.dtype == dtype and torch.equal(floats.nan_to_num(7), rotate(x).to(dtype).nan_to_num(7))
        if backend == "cpu" and dtype == torch.float16:
            continue  # which SwiGLU's kernel does not take
        product = swiglu(x, x, backend=backend)
        hidden = swiglu(x, x, quantized=True, rotated=True, backend=backend)
        assert same(hidden, *quantize(rotate(product)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gpu_makes_the_same_bits(dtype: torch.dtype) -> None:
    for rows, width in ((9, 16), (300, 208), (9, 8192), (70, 14336), (9, 32768)):
        x = odd_rows(rows, width, dtype)
        there = x.to("cuda")
        got = quantize_rows(there, rotated=True, backend="triton")
        assert same(Quantized(got.values.cpu(), got.scale.cpu(), dtype), *quantize(rotate(x)))
        floats = rotate_rows(there, backend="triton").cpu()
        assert torch.equal(floats.nan_to_num(7), rotate(x).to(dtype).nan_to_num(7))
        product = swiglu(there, there, backend="triton")
        hidden = swiglu(there, there, quantized=True, rotated=True, backend="triton")
        assert same(hidden, *quantize(rotate(product)))


@needs_kernels
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_kernels_makes_the_same_bits(form: str) -> None:
    code = (
        "import torch; from longllava.ops.quantized import quantize, rotate\n"
        "from longllava.ops.int8_linear import quantize_rows, rotate_rows\n"
        "for width in (16, 48, 208, 1040):\n"
        "    for dtype in (torch.float32, torch.bfloat16):\n"
        "        x = torch.randn(200, width).to(dtype)\n"
        "        pairs = zip(quantize_rows(x, rotated=True, backend='cpu'), quantize(rotate(x)))\n"
        "        assert all(torch.equal(a, b) for a, b in pairs), (width, dtype)\n"
        "        assert torch.equal(rotate_rows(x, backend='cpu'), rotate(x).to(dtype)), (width, dtype)\n"
    )
    run_in_form(form, code)


@given(rows=st.integers(0, 40), pieces=st.integers(1, 20), outputs=st.integers(1, 9))
def test_the_product_is_that_of_rows_as_they_are(rows: int, pieces: int, outputs: int) -> None:
    x, weight = torch.randn(rows, 16 * pieces), torch.randn(outputs, 16 * pieces)
    values, scale = quantize_weight(weight, rotated=True)
    truth = x.double() @ weight.double().T
    bound = 0.04 * x.norm(dim=1)[:, None] * weight.norm(dim=1)
    y = int8_linear(quantize_rows(x, rotated=True), values, scale)
    assert bool(((y - truth).abs() <= bound).all())
    y = int8_linear(rotate_rows(x), values, scale, mode="weight_only")
    assert bool(((y - truth).abs() <= bound / 2).all())


def test_numbers_that_stand_alone_cost_less() -> None:
    """One in fifty is ten times the others, as out_proj's and down_proj's inputs are: 7 dB."""
    x = torch.randn(64, 512) * torch.where(torch.rand(64, 512) < 0.02, 10, 1)
    weight = torch.randn(96, 512)
    truth, noise = x.double() @ weight.double().T, []
    for rotated in (False, True):
        y = int8_linear(quantize_rows(x, rotated=rotated), *quantize_weight(weight, rotated=rotated))
        noise.append(float((y - truth).square().sum()))
    assert noise[1] < noise[0] / 10**0.6


def test_gradients_are_rotated_too() -> None:
    x = torch.randn(3, 32, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: rotate_rows(x, backend="reference"), x)
    x = torch.randn(3, 32, requires_grad=True)
    (got,) = torch.autograd.grad(rotate_rows(x).square().sum(), x)
    torch.testing.assert_close(got, 2 * x)


def test_as_a_custom_op_it_keeps_torchs_rules() -> None:
    x = torch.randn(3, 32, requires_grad=True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.longllava.rotate_rows, (x, None), test_utils=tests)
    torch.library.opcheck(torch.ops.longllava.quantize_rows, (x.detach(), None, True, None), test_utils=tests)

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(x: torch.Tensor) -> torch.Tensor:
        return rotate_rows(x) + quantize_rows(x, rotated=True).dequantized()

    torch.compiler.reset()
    plain = x.detach()
    assert torch.equal(compiled(plain), rotate_rows(plain) + quantize_rows(plain, rotated=True).dequantized())


def test_what_cannot_be_rotated_is_refused_by_name() -> None:
    x = torch.randn(3, 32)
    for call, words in (
        (lambda: rotate_rows(x[:, :24]), r"a multiple of 16 each, got \(3, 24\)"),
        (lambda: rotate_rows(x.int()), "must be floats"),
        (lambda: rotate_rows(x[:, :0]), r"a multiple of 16 each, got \(3, 0\)"),
        (lambda: quantize_rows(x[:, :24], rotated=True), r"quantize_rows: .* got \(3, 24\)"),
        (lambda: quantize_rows(x, torch.ones(3), rotated=True), "absmax is of rows that are not rotated"),
        (lambda: quantize_weight(x[:, :8], rotated=True), r"got \(3, 8\)"),
        (lambda: swiglu(x, x, rotated=True), "rotated is for quantized=True"),
        (lambda: swiglu(x[:, :8], x[:, :8], quantized=True, rotated=True), r"a multiple of 16, got \(3, 8\)"),
    ):
        with pytest.raises(LongLLaVAError, match=words):
            call()
    if "cpu" in HERE:
        with pytest.raises(BackendError, match="rotates rows of at most 32768, got 32784"):
            rotate_rows(torch.zeros(1, 32784), backend="cpu")
    assert rotate_rows(torch.zeros(1, 32784)).shape == (1, 32784)  # by the reference
