"""Int8 linear layers: exact integer sums, the rule of quantisation, gradients, every backend against the reference."""

from __future__ import annotations

import pytest
import torch

from longllava.errors import BackendError, LongLLaVAError
from longllava.ops import native
from longllava.ops.dispatch import Backend
from longllava.ops.int8_linear import (
    BACKENDS,
    MAX_INPUTS,
    QUANTIZE_BACKENDS,
    Quantized,
    cases,
    cpu,
    int8_grouped_linear,
    int8_linear,
    quantize_rows,
    quantize_weight,
    reference,
    triton,
)
from tests.kernels import FORMS, needs_kernels, run_in_form
from tests.ops.parity import error, poison_empty


def available(backends: tuple[Backend, ...], *args) -> list[str]:
    return [backend.name for backend in backends if backend.why_not(*args) is None]


HERE = available(BACKENDS, *cases.CASES[0].inputs_of())
QUANTIZERS_HERE = available(QUANTIZE_BACKENDS, torch.ones(1, 1), None)
# every backend that runs here, and the compiled one in each of the ways in which it can take products
WAYS = HERE + (["cpu in twos", "cpu in fours"] if "cpu" in HERE else [])  # cpu alone: by tiles, where there are


def run(way: str, *args) -> torch.Tensor:
    name, _, depth = way.partition(" in ")
    options = {"depth": {"twos": 2, "fours": 4}[depth]} if depth else {}
    return next(backend for backend in BACKENDS if backend.name == name).run(*args, **options)


def multiply(way: str, values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The sums themselves: all scales are 1."""
    ones = torch.ones(len(values)), torch.ones(len(weight))
    return run(way, values, weight, ones[1], None, ones[0], None, "dynamic", torch.float32)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [
    (1, 1, 1), (1, 64, 16), (3, 63, 17), (7, 129, 33), (13, 256, 65), (12, 48, 32), (31, 7, 5), (2, 20_003, 3),
    (130, 192, 200), (121, 500, 33), (2045, 70, 9), (14, 4100, 140), (110, 8300, 70),
])  # fmt: skip
def test_sums_are_the_integers(rows: int, inputs: int, outputs: int, way: str) -> None:
    values, weight = (torch.randint(-128, 128, (n, inputs)).to(torch.int8) for n in (rows, outputs))
    assert torch.equal(multiply(way, values, weight), (values.long() @ weight.long().T).float())


@pytest.mark.parametrize("way", WAYS)
def test_the_largest_sums_do_not_wrap(way: str) -> None:
    values = torch.full((5, MAX_INPUTS), -128, dtype=torch.int8)
    for number in (-128, 127):
        weight = torch.full((3, MAX_INPUTS), number, dtype=torch.int8)
        truth = -128 * number * MAX_INPUTS
        assert 0.99 * 2**31 < abs(truth) < 2**31
        assert torch.equal(multiply(way, values, weight), torch.full((5, 3), float(truth)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_matches_the_reference(case: cases.Case, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = case.inputs_of()
    if way.startswith("cpu") and (reason := cpu.why_not(*args)) is not None:
        pytest.skip(reason)
    poison_empty(monkeypatch)
    got, truth = run(way, *args), reference.run(*args)
    assert got.dtype == truth.dtype == case.dtype and got.shape == truth.shape
    # a sum on the edge may be rounded to either side
    slack = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[case.dtype]
    assert got.numel() == 0 or error(got, truth) <= slack


@needs_kernels
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_kernels_gives_the_same(form: str) -> None:
    code = (
        "import torch; from longllava.ops.int8_linear import cases, cpu, reference\n"
        "for case in cases.CASES:\n"
        "    args = case.inputs_of()\n"
        "    for depth in (0, 2, 4):\n"
        "        if cpu.why_not(*args) is None:\n"
        "            a, b = cpu.run(*args, depth=depth), reference.run(*args)\n"
        "            assert b.numel() == 0 or (a - b).abs().max() <= 1e-2 * b.abs().max(), case\n"
        "    if args[0].is_floating_point():\n"
        "        pairs = zip(cpu.quantize_rows(args[0]), reference.quantize_rows(args[0]))\n"
        "        assert all(torch.equal(a, b) for a, b in pairs), case\n"
    )
    run_in_form(form, code)


@pytest.mark.parametrize("backend", QUANTIZERS_HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_follow_the_rule(dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    poison_empty(monkeypatch)
    for width in (1, 7, 16, 37, 64, 200):
        x = torch.randn(9, 2 * width)[:, :width] * torch.logspace(-20, 4, 9)[:, None]
        x[1], x[2, 0], x[3, -1], x[4] = 0, torch.nan, -torch.inf, 1e-35
        x[5, 0], x[6] = 6e4, torch.arange(width) - 63.5
        x = x.to(dtype)
        values, scale, kept = quantize_rows(x, backend=backend)
        assert values.dtype == torch.int8 and scale.dtype == torch.float32 and kept == dtype
        absmax = x.float().abs().amax(1)
        assert torch.equal(scale[[0, 5, 6, 7, 8]], torch.where(absmax < 2**-100, 1, absmax / 127)[[0, 5, 6, 7, 8]])
        assert scale[1] == 1 and scale[4] == 1 and bool(scale[2:4].isnan().all()) and not values[1:5].any()
        exact = x[5:].double() * 127 / absmax[5:, None].double()
        assert float((values[5:] - exact).abs().max()) <= 0.5 + 1e-4
        again = quantize_rows(x, absmax, backend=backend)
        assert torch.equal(again.values, values) and torch.equal(again.scale.nan_to_num(7), scale.nan_to_num(7))


@pytest.mark.parametrize("backend", QUANTIZERS_HERE)
def test_ties_go_to_even_and_too_small_a_maximum_saturates(backend: str) -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    assert quantize_rows(x, backend=backend).values.tolist() == [[127, 0, 2, 2, 0, -2, -2]]
    x = torch.tensor([[88.125, 44.0625]])  # 127 times a rounded reciprocal would give 63
    assert quantize_rows(x, backend=backend).values.tolist() == [[127, 64]]
    for times in (1, 70):  # alone, and in rows that are taken several vectors at a time
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.tensor([[1.0, -1.0, 0.25]], dtype=dtype).repeat(1, times)
            values = quantize_rows(x, torch.tensor([0.5]), backend=backend).values
            assert values.tolist() == [[127, -127, 64] * times]


@pytest.mark.parametrize("backend", HERE)
def test_a_row_is_the_same_whatever_stands_beside_it(backend: str) -> None:
    x = torch.randn(300, 90)
    weight, scale = quantize_weight(torch.randn(50, 90))
    whole = int8_linear(x, weight, scale, backend=backend)
    x[::2] = torch.nan
    spoiled = int8_linear(x, weight, scale, backend=backend)
    assert bool(spoiled[::2].isnan().all()) and torch.equal(spoiled[1::2], whole[1::2])
    for start, end in ((0, 1), (1, 2), (5, 9), (131, 300)):
        part = int8_linear(x[start:end], weight, scale, backend=backend)
        assert torch.equal(part.nan_to_num(7), spoiled[start:end].nan_to_num(7))


@needs_kernels
def test_few_rows_of_bf16_are_multiplied_as_they_are() -> None:
    """By tiles each to the same bits, however many others these are."""
    x = torch.randn(64, 345).bfloat16()
    weight, scale = quantize_weight(torch.randn(50, 345))
    whole = int8_linear(x, weight, scale, mode="weight_only", backend="cpu")
    assert error(whole, x.double() @ (weight.double() * scale[:, None].double()).T) < 4e-3
    spoiled = x.clone()
    spoiled[::2] = torch.nan
    y = int8_linear(spoiled, weight, scale, mode="weight_only", backend="cpu")
    assert bool(y[::2].isnan().all())
    for start, end in ((0, 1), (1, 2), (5, 9), (15, 18), (31, 64)):
        part = int8_linear(x[start:end], weight, scale, mode="weight_only", backend="cpu")
        if native.uses_amx() and end - start > 1:  # one alone is multiplied without tiles
            assert torch.equal(part, whole[start:end])
        assert error(part, whole[start:end]) < 4e-3
    assert error(y[1::2], whole[1::2]) < 4e-3


@pytest.mark.parametrize("backend", HERE)
def test_a_weight_of_a_row_that_holds_infinity_is_nan(backend: str) -> None:
    weight, scale = quantize_weight(torch.randn(5, 20))
    x = torch.randn(2, 20)
    x[0, 3] = torch.inf
    y = int8_linear(x, weight, scale, backend=backend)
    assert bool(y[0].isnan().all()) and bool(y[1].isfinite().all())
    few = int8_linear(x, weight, scale, mode="weight_only", backend=backend)
    assert not bool(few[0].isfinite().any()) and bool(few[1].isfinite().all())


def sqnr(got: torch.Tensor, truth: torch.Tensor) -> float:
    return float(10 * torch.log10(truth.double().square().sum() / (got.double() - truth.double()).square().sum()))


@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
def test_noise_is_35_db_below_what_normal_numbers_give(mode: str) -> None:
    x, weight = torch.randn(60, 512), torch.randn(300, 512)
    values, scale = quantize_weight(weight)
    assert sqnr(int8_linear(x, values, scale, mode=mode), x @ weight.T) > 39
    rows = x * torch.logspace(-6, 6, 60)[:, None]  # a scale for each row: none drowns
    y, truth = int8_linear(rows, values, scale, mode=mode), rows @ weight.T
    assert min(sqnr(a, b) for a, b in zip(y, truth)) > 35


def test_outputs_of_zeros_and_rows_of_zeros_are_zeros() -> None:
    weight = torch.randn(6, 40)
    weight[2] = 0
    values, scale = quantize_weight(weight)
    assert scale[2] == 1 and not values[2].any()
    x = torch.randn(4, 40)
    x[1] = 0
    bias = torch.randn(6)
    for mode in ("dynamic", "weight_only"):
        y = int8_linear(x, values, scale, bias, mode=mode)
        assert torch.equal(y[1], bias) and torch.equal(y[:, 2], bias[2].expand(4))


def test_weights_that_are_not_finite_are_refused() -> None:
    for number in (torch.nan, torch.inf):
        weight = torch.randn(3, 4)
        weight[1, 1] = number
        with pytest.raises(LongLLaVAError, match="NaN or infinity"):
            quantize_weight(weight)


@pytest.mark.parametrize("backend", HERE)
def test_shapes_views_and_quantised_rows(backend: str) -> None:
    weight, scale = quantize_weight(torch.randn(24, 30))
    wide = torch.randn(2, 3, 2 * 30)
    x = wide[..., 30:]
    y = int8_linear(x, weight, scale, backend=backend)
    assert y.shape == (2, 3, 24) and torch.equal(y, int8_linear(x.contiguous(), weight, scale, backend=backend))
    transposed = x.transpose(0, 1)
    assert torch.equal(int8_linear(transposed, weight, scale, backend=backend), y.transpose(0, 1))
    quantized = quantize_rows(x)
    assert torch.equal(int8_linear(quantized, weight, scale, backend=backend), y)
    column = weight.T.contiguous().T  # weights that lie the other way
    assert torch.equal(int8_linear(x, column, scale, backend=backend), y)
    half = int8_linear(Quantized(*quantized[:2], torch.bfloat16), weight, scale, backend=backend)
    assert half.dtype == torch.bfloat16 and error(half, y) < 4e-3
    assert int8_linear(x[0, 0], weight, scale, backend=backend).shape == (24,)
    assert int8_linear(x[:, :0], weight, scale, backend=backend).shape == (2, 0, 24)


@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
@pytest.mark.parametrize("backend", HERE)
def test_experts_are_their_own_layers(backend: str, mode: str) -> None:
    weight, scale = quantize_weight(torch.randn(4, 24, 30))
    x, bias, offsets = torch.randn(50, 30), torch.randn(4, 24), torch.tensor([0, 13, 13, 14, 50], dtype=torch.int32)
    y = int8_grouped_linear(x, weight, scale, offsets, bias, mode=mode, backend=backend)
    for expert, (start, end) in enumerate(((0, 13), (13, 13), (13, 14), (14, 50))):
        alone = int8_linear(x[start:end], weight[expert], scale[expert], bias[expert], mode=mode, backend=backend)
        assert torch.equal(y[start:end], alone)


def test_gradients_reach_x_alone_and_are_those_of_the_widened_weights() -> None:
    weight, scale = quantize_weight(torch.randn(24, 30))
    bias = torch.randn(24)
    for mode in ("dynamic", "weight_only"):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(2, 5, 30).to(dtype).requires_grad_()
            y = int8_linear(x, weight, scale, bias, mode=mode)
            grad = torch.randn(2, 5, 24).to(dtype)
            (got,) = torch.autograd.grad(y, x, grad)
            assert got.dtype == dtype
            assert error(got, grad.double() @ (weight * scale[:, None]).double()) < 2 * torch.finfo(dtype).eps * 8
    with torch.no_grad():
        assert torch.equal(int8_linear(x, weight, scale, bias, mode=mode), y)
    with pytest.raises(RuntimeError, match="does not require grad"):
        int8_linear(quantize_rows(x), weight, scale, bias).sum().backward()


def test_gradients_of_experts() -> None:
    weight, scale = quantize_weight(torch.randn(3, 8, 12))
    x, offsets = torch.randn(9, 12, requires_grad=True), torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    grad = torch.randn(9, 8)
    (got,) = torch.autograd.grad(int8_grouped_linear(x, weight, scale, offsets), x, grad)
    wide = weight * scale[..., None]
    assert error(got, torch.cat([grad[:4] @ wide[0], grad[4:] @ wide[2]])) < 1e-6


def test_custom_ops_keep_torchs_rules() -> None:
    weight, scale = quantize_weight(torch.randn(8, 12))
    x = torch.randn(3, 12, requires_grad=True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for mode in ("dynamic", "weight_only"):
        args = (x, weight, scale, None, None, None, mode, torch.float32, None)
        torch.library.opcheck(torch.ops.longllava.int8_linear, args, test_utils=tests)
    torch.library.opcheck(torch.ops.longllava.quantize_rows, (x.detach(), None, False, None), test_utils=tests)

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(x: torch.Tensor) -> torch.Tensor:
        return int8_linear(quantize_rows(x), weight, scale)

    torch.compiler.reset()
    assert torch.equal(compiled(x.detach()), int8_linear(x.detach(), weight, scale))


def test_what_does_not_fit_is_refused_by_name() -> None:
    weight, scale = quantize_weight(torch.randn(8, 12))
    x = torch.randn(3, 12)
    wide = torch.zeros(1, MAX_INPUTS + 1, dtype=torch.int8)
    offsets = torch.tensor([0, 3], dtype=torch.int32)
    for call, words in (
        (lambda: int8_linear(x, weight.float(), scale), r"weight must be \(N, K\) int8"),
        (lambda: int8_linear(x[:, 1:], weight, scale), r"x must be \(\.\.\., K\), K = 12, got \(3, 11\)"),
        (lambda: int8_linear(x, weight, scale[1:]), r"scale must be \(8,\), got \(7,\)"),
        (lambda: int8_linear(x, weight, scale, scale[1:]), r"bias must be \(8,\)"),
        (lambda: int8_linear(x, weight, scale.double()), "scale must be float32"),
        (
            lambda: int8_linear(x, weight, scale, mode="static"),
            "mode must be one of dynamic, weight_only, got 'static'",
        ),
        (lambda: int8_linear(x.to(torch.int8), weight, scale), "x must be floats, or Quantized"),
        (lambda: int8_linear(quantize_rows(x), weight, scale, mode="weight_only"), "need mode='dynamic'"),
        (lambda: int8_linear(Quantized(x.to(torch.int8), scale, x.dtype), weight, scale), "with a scale"),
        (lambda: int8_linear(wide.float(), wide, scale[:1]), "may leave int32; at most 131071"),
        (lambda: int8_grouped_linear(x, weight, scale, offsets), r"weight must be \(X, N, K\) int8"),
        (lambda: int8_grouped_linear(x, weight[None], scale[None], offsets.long()), "offsets must be .* int32"),
        (lambda: int8_grouped_linear(x[None], weight[None], scale[None], offsets), r"x must be \(T, K\)"),
        (lambda: quantize_rows(x, x), r"absmax must be \(3,\)"),
        (lambda: quantize_rows(x.int()), "x must be rows of floats"),
    ):
        with pytest.raises(LongLLaVAError, match=words):
            call()
    with pytest.raises(BackendError, match="triton: needs CUDA tensors, got x on cpu"):
        int8_linear(x, weight, scale, backend="triton")
    assert triton.why_not(x.double(), weight) == "takes float32, bfloat16 or float16, got x in float64"
    if "cpu" in HERE:
        with pytest.raises(BackendError, match="takes at most 64 rows in mode weight_only, got 65"):
            int8_linear(x.repeat(22, 1)[:65], weight, scale, mode="weight_only", backend="cpu")
