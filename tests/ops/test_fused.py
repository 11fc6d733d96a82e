"""Norm with residual, and SwiGLU: their numbers, int8 output, gradients. Their kernels: int8_interpreted.py."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from longllava.errors import BackendError, LongLLaVAError
from longllava.ops.fused import Quantized, call, rms_norm, swiglu
from longllava.ops.int8_linear import quantize_rows
from tests.kernels import needs_kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_is_the_formula_in_the_published_order(dtype) -> None:
    x, residual, weight = torch.randn(2, 5, 48).to(dtype), torch.randn(2, 5, 48).to(dtype), torch.randn(48).to(dtype)
    y, total = rms_norm(x, weight, 1e-5, residual)
    assert torch.equal(total, residual + x) and total.dtype == y.dtype == dtype
    wide = total.double()
    normed = (wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).to(dtype)
    torch.testing.assert_close(y, normed * weight, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    alone, same = rms_norm(total, weight, 1e-5)
    assert torch.equal(alone, y) and same is total


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu_is_the_formula_rounded_once(dtype) -> None:
    both = torch.randn(3, 4, 2 * 33).to(dtype)
    gate, up = both.double().chunk(2, -1)
    truth = gate * torch.sigmoid(gate) * up
    y = swiglu(both)
    assert y.dtype == dtype and y.shape == (3, 4, 33)
    # the kernel's exponential and reciprocal add 3e-7 to the rounding
    torch.testing.assert_close(y.double(), truth, rtol=torch.finfo(dtype).eps + 3e-7, atol=1e-7)
    assert torch.equal(swiglu(both[..., :33], both[..., 33:]), y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_output_is_the_quantisation_of_the_other(dtype) -> None:
    x, residual, weight = torch.randn(2, 5, 48).to(dtype), torch.randn(2, 5, 48).to(dtype), torch.randn(48).to(dtype)
    x[0, 0], residual[0, 0], x[0, 1, 3] = 0, 0, torch.nan
    pairs = [
        (rms_norm(x, weight, 1e-5, residual, quantized=q)[0], swiglu(x, residual, quantized=q)) for q in (False, True)
    ]
    for plain, quantized in zip(*pairs):
        expected = quantize_rows(plain, backend="reference")
        assert isinstance(quantized, Quantized) and quantized.dtype == dtype
        assert torch.equal(quantized.values, expected.values)
        assert torch.equal(quantized.scale.nan_to_num(7), expected.scale.nan_to_num(7))
        assert quantized.scale[0, 1].isnan()
    known = swiglu(x, residual, swiglu(x, residual).float().abs().amax(-1), quantized=True)
    assert torch.equal(known.values, pairs[1][1].values)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_the_compiled_kernels_are_the_reference(dtype) -> None:
    compare(dtype)
    compare_gradients(dtype)


def compare(dtype: torch.dtype) -> None:
    """Widths below, at and beside a vector's, more rows than a task has, views, rows of many magnitudes. Every form of
    the kernels comes here from test_forms.py."""
    torch.manual_seed(0)
    # bf16: two roundings, each of which may fall to the other side
    close = {"rtol": 2e-6, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 2**-6, "atol": 1e-6}
    for width in (1, 3, 8, 33, 200, 1024):
        magnitude = 10 ** torch.linspace(-3, 3, 37)[:, None]
        both = (torch.randn(37, 2 * width) * magnitude).to(dtype)
        x, residual, weight = both[:, :width], both[:, width:], torch.randn(width).to(dtype)
        for other in (None, residual):
            (y, total), (expected, sums) = (rms_norm(x, weight, 1e-6, other, backend=b) for b in ("cpu", "reference"))
            torch.testing.assert_close(y, expected, **close)
            assert torch.equal(total, sums)
            assert dtype == torch.float32 or (y != expected).float().mean() < 0.01  # nearly all fall to the same side
            int8, _ = rms_norm(x, weight, 1e-6, other, quantized=True, backend="cpu")
            same = quantize_rows(y, backend="reference")
            assert torch.equal(int8.values, same.values) and torch.equal(int8.scale, same.scale)
        y, expected = (swiglu(x, residual, backend=b) for b in ("cpu", "reference"))
        torch.testing.assert_close(y, expected, **close)
        same, known = quantize_rows(y, backend="reference"), y.float().abs().amax(-1)
        for absmax in (None, known):
            int8 = swiglu(x, residual, absmax, quantized=True, backend="cpu")
            assert torch.equal(int8.values, same.values) and torch.equal(int8.scale, same.scale)


def compare_gradients(dtype: torch.dtype) -> None:
    """With those of fp64: the kernels' own, of rows of many magnitudes, of views, and of every mixture of dtypes, such
    as autocast's: rows and weight in fp32, y in bf16."""
    torch.manual_seed(0)
    # rows of 1,000 and of 0.001 each by their own largest gradient; bf16: two roundings
    most = 2e-6 if dtype == torch.float32 else 2**-7
    for width in (1, 3, 8, 33, 200, 1024):
        magnitude = 10 ** torch.linspace(-3, 3, 37)[:, None]
        x, up = (torch.randn(37, 2 * width) * magnitude).to(dtype).chunk(2, -1)
        for other, out in itertools.product(DTYPES[:2], DTYPES[:2]):
            weight, grad = torch.randn(width).to(other), torch.randn(37, 2 * width).to(out)[:, ::2]
            got = gradients_of(lambda x, w, y=out: rms_norm(x, w, 1e-6, dtype=y, backend="cpu")[0], grad, x, weight)
            expected = gradients_of(lambda x, w: rms_norm(x, w, 1e-6)[0], grad.double(), x.double(), weight.double())
            assert got[0].dtype == dtype and got[1].dtype == other
            bound = most if dtype == other == torch.float32 else 2**-7
            if width > 1:  # of one number alone the gradient is what rounding leaves of 0
                assert error(got[0], expected[0], -1) < bound
            assert error(got[1], expected[1], None) < bound
        grad = torch.randn(37, width).to(dtype)
        got = gradients_of(lambda x, up: swiglu(x, up, backend="cpu"), grad, x, up)
        expected = gradients_of(swiglu, grad.double(), x.double(), up.double())
        for ours, truth in zip(got, expected):
            assert ours.dtype == dtype and error(ours, truth, -1) < most


def gradients_of(run, grad, *inputs):
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    return torch.autograd.grad(run(*inputs), inputs, grad)


def error(got, truth, dim):
    """The largest, relative to the largest value along `dim` (of all, with None)."""
    most = truth.abs().max() if dim is None else truth.abs().amax(dim, keepdim=True)
    return float(((got.double() - truth).abs() / most.clamp(min=1e-20)).max())


@needs_kernels
def test_gradients_of_rows_of_no_length_and_no_rows_and_of_one_input_alone() -> None:
    for shape in ((0, 8), (2, 0), (0, 0)):
        x, weight, y = torch.ones(shape), torch.ones(shape[1]), torch.ones(shape)
        for ours in (gradients_of(lambda x, w: rms_norm(x, w, 1e-6)[0], y, x, weight), gradients_of(swiglu, y, x, x)):
            assert ours[0].shape == shape and not ours[1].any() if shape[0] == 0 else ours[1].shape[0] in shape
    x, weight = torch.randn(3, 8), torch.randn(8)
    both = gradients_of(lambda x, w: rms_norm(x, w, 1e-6)[0], torch.ones(3, 8), x, weight)
    alone = gradients_of(lambda x: rms_norm(x, weight, 1e-6)[0], torch.ones(3, 8), x)
    frozen = gradients_of(lambda w: rms_norm(x, w, 1e-6)[0], torch.ones(3, 8), weight)
    assert torch.equal(alone[0], both[0]) and torch.equal(frozen[0], both[1])


@needs_kernels
def test_gradients_do_not_depend_on_threads() -> None:
    x, weight, threads = torch.randn(4096, 512), torch.randn(512), torch.get_num_threads()
    found = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(gradients_of(lambda x, w: rms_norm(x, w, 1e-6)[0], torch.ones(4096, 512), x, weight))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0]))


@needs_kernels
def test_the_compiled_kernels_say_what_they_do_not_take() -> None:
    x = torch.ones(2, 8)
    for run, words in (
        (lambda: rms_norm(x.half(), torch.ones(8).half(), 1e-6, backend="cpu"), "and bfloat16, got float16"),
        (lambda: rms_norm(x, torch.ones(8), 1e-6, dtype=torch.half, backend="cpu"), "and bfloat16, got float16"),
        (lambda: swiglu(torch.ones(1, 2 * 32769), backend="cpu"), "at most 32768, got 32769"),
    ):
        with pytest.raises(BackendError, match=words):
            run()


@needs_kernels
def test_as_custom_ops_they_keep_torchs_rules_and_have_the_references_gradients() -> None:
    x, residual, weight = (torch.randn(shape, requires_grad=True) for shape in ((3, 48), (3, 48), (48,)))
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    for quantized in (False, True):
        args = (x, weight, 1e-6, residual, quantized, torch.float32, "cpu")
        torch.library.opcheck(call.rms_norm, args, test_utils=tests)
        torch.library.opcheck(call.swiglu, (x, residual, None, quantized, False, "cpu"), test_utils=tests)
    torch.library.opcheck(call.rms_norm, (x, weight, 1e-6, None, False, torch.bfloat16, "cpu"), test_utils=tests)
    grad = torch.randn(3, 48)
    torch.library.opcheck(call.rms_norm_gradients, (grad, grad, weight.detach(), 1e-6), test_utils=tests[:2])
    torch.library.opcheck(call.swiglu_gradients, (grad, grad, grad), test_utils=tests[:2])
    found = []
    inputs = x, residual, weight
    for backend in ("cpu", "reference"):
        y, total = rms_norm(x, weight, 1e-6, residual, backend=backend)
        y, _ = rms_norm(y, weight, 1e-6, backend=backend)
        loss = (y + swiglu(total, y, backend=backend)).square().mean()
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        found.append((*first, *torch.autograd.grad(sum(grad.square().sum() for grad in first), inputs)))
    for got, expected in zip(*found):  # of first and second order
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_gradients() -> None:
    x, residual, weight = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 8), (3, 8), (8,))
    )
    torch.autograd.gradcheck(lambda *args: rms_norm(args[0], args[2], 1e-6, args[1]), (x, residual, weight))
    torch.autograd.gradcheck(lambda *args: swiglu(*args), (x, residual))
    y, total = rms_norm(x, weight, 1e-6, residual, quantized=True)
    assert not y.values.is_floating_point() and total.requires_grad


def test_rows_of_no_length_and_no_rows() -> None:
    for shape in ((0, 8), (2, 0), (0, 0)):
        x = torch.ones(shape)
        for quantized in (False, True):
            for y in (
                rms_norm(x, x.new_ones(shape[1]), 1e-6, x, quantized=quantized)[0],
                swiglu(x, x, quantized=quantized),
            ):
                assert (y.values if isinstance(y, Quantized) else y).shape == shape


def test_what_does_not_fit_is_refused_by_name() -> None:
    x = torch.ones(2, 8)
    for run, words in (
        (lambda: rms_norm(x, torch.ones(7), 1e-6), r"weight must be \(8,\), got \(7,\)"),
        (lambda: rms_norm(x, torch.ones(8), 1e-6, x[:1]), r"residual must be \(2, 8\)"),
        (lambda: rms_norm(x, torch.ones(8), 1e-6, x.half()), "residual must be .* in torch.float32, got .*float16"),
        (lambda: swiglu(torch.ones(2, 7)), r"must be \(\.\.\., 2 F\), got \(2, 7\)"),
        (lambda: swiglu(x, x[:, :4]), r"up must be \(2, 8\)"),
        (lambda: swiglu(x, x, torch.ones(2)), "absmax is for quantized=True"),
        (lambda: swiglu(x, x, torch.ones(3), quantized=True), r"must be \(2,\), got \(3,\)"),
    ):
        with pytest.raises(LongLLaVAError, match=words):
            run()
    for op in (lambda: rms_norm(x, torch.ones(8), 1e-6, backend="triton"), lambda: swiglu(x, x, backend="triton")):
        with pytest.raises(BackendError, match="triton: needs CUDA tensors, got (x|gate) on cpu"):
            op()


def test_compiled_code_goes_through() -> None:
    x, weight = torch.randn(3, 16), torch.randn(16)

    @torch.compile(backend="eager", fullgraph=True)
    def both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, total = rms_norm(x, weight, 1e-6, x)
        quantized = swiglu(total, y, quantized=True)
        return quantized.values, quantized.scale

    torch.compiler.reset()
    values, scale = both(x)
    expected = swiglu(x + x, weight * F.rms_norm(x + x, (16,), eps=1e-6), quantized=True)
    assert int((values - expected.values).abs().max()) <= 1 and torch.allclose(scale, expected.scale)


@pytest.mark.parametrize("function, op", [(call._rms_norm, call.rms_norm), (call._swiglu, call.swiglu)])
def test_schemas_are_what_the_annotations_say(function, op) -> None:
    """torch 2.6 cannot read list[Tensor]: there this file is imported thanks to the written schemas."""
    try:
        read = torch.library.infer_schema(function, mutates_args=())
    except ValueError:
        pytest.skip("this torch cannot read list[Tensor]")
    assert str(op._opoverload._schema) == op._qualname + read
