"""The int8 product for Hopper: what it refuses, its arguments, and its kernel's own source run on a CPU.

The emulation (tests/ops/emulated/hopper.cuh) reads swizzles and operands as the hardware does, lets what is fetched
come at random moments and makes products as late as it may. It proves indices, phases and waits, not speed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from longllava.errors import BackendError
from longllava.ops import native_cuda
from longllava.ops.int8_linear import BACKENDS, Quantized, cuda, int8_linear, reference
from tests.ops.emulation import ROOT, emulated
from tests.ops.parity import poison_empty

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    poison_empty(monkeypatch)
    monkeypatch.setattr(native_cuda, "n_processors", lambda device: 4)
    with emulated(monkeypatch):
        yield


def call(rows: int, outputs: int, inputs: int, dtype: torch.dtype, bias: torch.dtype | None) -> tuple[Tensor, ...]:
    """(values, weight, x_scale, scale, bias)."""
    generator = torch.Generator().manual_seed(rows + outputs + inputs)

    def integers(n: int) -> Tensor:
        return torch.randint(-127, 128, (n, inputs), generator=generator).to(torch.int8)

    def scales(n: int) -> Tensor:
        return torch.rand(n, generator=generator) * 0.01 + 0.001

    bias_N = None if bias is None else torch.randn(outputs, generator=generator).to(bias)
    return integers(rows), integers(outputs), scales(rows), scales(outputs), bias_N  # type: ignore[return-value]


def truth(values: Tensor, weight: Tensor, x_scale: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """fp32: sums times scale, times x_scale and plus bias in one rounding, which fp64 does exactly enough here."""
    y = (reference.integer_product(values, weight).float() * scale).double() * x_scale.double()[:, None]
    return (y if bias is None else y + bias.double()).float()


@pytest.mark.parametrize(("rows", "outputs", "inputs", "dtype", "bias"), [
    (130, 264, 272, BF16, BF16), (65, 8, 128, FP16, None), (300, 1000, 144, BF16, FP32), (129, 7, 400, FP32, FP16),
    (260, 257, 160, FP16, None), (520, 520, 640, FP16, FP16), (1030, 264, 128, BF16, None),
])  # fmt: skip
def test_the_kernel_gives_the_bits(rows, outputs, inputs, dtype, bias, on_cpu) -> None:
    values, weight, x_scale, scale, bias_N = call(rows, outputs, inputs, dtype, bias)
    x_scale[rows // 2] = torch.nan  # a row that held NaN, and no other, is NaN
    y = int8_linear(Quantized(values, x_scale, dtype), weight, scale, bias_N, backend="cuda")
    wanted = truth(values, weight, x_scale, scale, bias_N).to(dtype)
    assert y.dtype == dtype and int(y.isnan().any(1).sum()) == 1
    assert torch.equal(y.nan_to_num(7), wanted.nan_to_num(7))


def test_the_largest_sums_and_rows_that_begin_anywhere(on_cpu) -> None:
    values, weight, x_scale, scale, _ = call(66, 16, 4096, FP32, None)
    values.fill_(127), weight.fill_(-127)
    shifted = torch.empty(values.numel() + 1, dtype=torch.int8)[1:].view_as(values).copy_(values)
    y = int8_linear(Quantized(shifted, x_scale, FP32), weight, scale, backend="cuda")
    assert torch.equal(y, truth(values, weight, x_scale, scale, None))
    assert y[0, 0] / x_scale[0] / scale[0] == pytest.approx(-127 * 127 * 4096, rel=1e-6)


def test_arguments_stand_where_the_kernel_reads_them() -> None:
    source = (ROOT / "csrc/int8_linear_cuda.cuh").read_text()
    body = re.search(r"struct Int8ProductArguments \{(.*?)\};", source, re.DOTALL)
    assert body is not None
    declared = re.sub(r"//.*", "", body[1]).split(";")
    names = [re.sub(r"[\s*]", "", name.split()[-1]) for line in declared if line.strip() for name in line.split(",")]
    values, weight, x_scale, scale, bias = call(66, 24, 128, BF16, FP16)
    y = values.new_empty((66, 24), dtype=BF16)
    fields = dict(zip(names, cuda.FIELDS.unpack(cuda.arguments(values, weight, x_scale, scale, bias, y)), strict=True))
    assert fields == {
        "bytes": 8 * len(names), "dtype": 1, "bias_dtype": 2, "rows": 66, "outputs": 24, "inputs": 128,
        "group": cuda.GROUP, "processors": 1, "stream": 0, "x": values.data_ptr(), "weight": weight.data_ptr(),
        "x_scale": x_scale.data_ptr(), "scale": scale.data_ptr(), "bias": bias.data_ptr(), "y": y.data_ptr(),
    }  # fmt: skip


def test_what_it_leaves_to_others_is_a_sentence(on_cpu, monkeypatch) -> None:
    def reason(rows: int = 65, inputs: int = 128, offsets=None, mode: str = "dynamic", dtype=BF16, x_scale=True):
        x = torch.zeros(rows, inputs, dtype=torch.int8 if x_scale else BF16)
        x_scale_T = torch.ones(rows) if x_scale else None
        return cuda.why_not(x, torch.zeros(8, inputs, dtype=torch.int8), torch.ones(8), None, x_scale_T, offsets, mode,
                            dtype)  # fmt: skip

    assert reason() is None
    assert reason(rows=64) == "takes more than 64 rows, got 64"
    assert reason(inputs=136) == "takes inputs in multiples of 16, at least 128, got 136"
    assert reason(inputs=112) == "takes inputs in multiples of 16, at least 128, got 112"
    assert reason(mode="weight_only") == "takes mode dynamic, got weight_only"
    assert reason(offsets=torch.zeros(2)) == "takes one layer's weights, got those of experts"
    assert reason(dtype=torch.float64) == "gives float32, bfloat16 or float16, got float64"
    assert str(reason(x_scale=False)).startswith("has rows quantised by Triton, which says: needs CUDA tensors")
    cuda._cannot_run_on.cache_clear()
    monkeypatch.setattr(native_cuda, "has", lambda name: False)
    assert str(reason()).startswith("the CUDA kernels are built without those for sm_90a; name 90 in LONGLLAVA_CUDA_A")
    cuda._cannot_run_on.cache_clear()
    monkeypatch.setattr(native_cuda, "DEVICE", "cuda")
    assert reason() == "needs CUDA tensors, got x on cpu"


@pytest.mark.parametrize(("capability", "words"), [((8, 0), "got 8.0"), ((10, 0), "got 10.0"), ((9, 0), None)])
def test_only_hopper_runs_it(capability, words, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(native_cuda, "has", lambda name: name == cuda.ENTRY)
    cuda._cannot_run_on.cache_clear()
    found = cuda._cannot_run_on(torch.device("cuda"))
    cuda._cannot_run_on.cache_clear()
    assert found is None if words is None else str(found).endswith(words)


def test_a_forced_call_without_a_gpu_says_why() -> None:
    assert "cuda" in [backend.name for backend in BACKENDS]
    with pytest.raises(BackendError, match="cuda: needs CUDA tensors, got x on cpu"):
        int8_linear(torch.ones(65, 128), torch.ones(8, 128, dtype=torch.int8), torch.ones(8), backend="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "outputs", "inputs", "dtype", "bias"), [
    (8191, 3072, 1024, BF16, BF16), (127, 1000, 14336, FP16, None), (129, 1001, 144, FP32, FP32),
])  # fmt: skip
def test_the_bits_on_a_gpu(rows, outputs, inputs, dtype, bias) -> None:
    args = call(rows, outputs, inputs, dtype, bias)
    values, weight, x_scale, scale, bias_N = (None if x is None else x.to("cuda") for x in args)
    quantized = Quantized(values, x_scale, dtype)
    if reason := cuda.why_not(values, weight, scale, bias_N, x_scale, None, "dynamic", dtype):
        pytest.skip(reason)
    y = int8_linear(quantized, weight, scale, bias_N, backend="cuda")
    assert torch.equal(y, int8_linear(quantized, weight, scale, bias_N, backend="triton"))
