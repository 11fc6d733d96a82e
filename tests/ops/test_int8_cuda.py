"""The int8 product for Hopper: what it refuses, its arguments, and its kernel's own source run on a CPU.

The emulation (tests/ops/emulated/hopper.cuh) reads swizzles and operands as the hardware does, lets what is fetched
come at random moments and makes products as late as it may. It proves indices, phases and waits, not speed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from longllava.errors import BackendError
from longllava.ops import native_cuda
from longllava.ops.dispatch import choose
from longllava.ops.int8_linear import BACKENDS, Quantized, cuda, int8_linear, reference
from longllava.ops.int8_linear.cuda import Launch
from tests.ops.emulation import ROOT, emulated, forget
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


@pytest.mark.parametrize(("rows", "outputs", "inputs", "dtype", "bias", "launch"), [
    (130, 264, 272, BF16, BF16, None), (129, 8, 128, FP16, None, Launch(8, True)),
    (300, 1000, 144, BF16, FP32, Launch(1)), (520, 520, 640, FP16, FP16, Launch(16, True)),
    (1030, 264, 128, BF16, None, Launch(2, False)),
])  # fmt: skip
def test_the_kernel_gives_the_bits(rows, outputs, inputs, dtype, bias, launch, on_cpu) -> None:
    values, weight, x_scale, scale, bias_N = call(rows, outputs, inputs, dtype, bias)
    x_scale[rows // 2] = torch.nan  # a row that held NaN, and no other, is NaN
    y = cuda.run(values, weight, scale, bias_N, x_scale, None, "dynamic", dtype, launch)
    wanted = truth(values, weight, x_scale, scale, bias_N).to(dtype)
    assert y.dtype == dtype and int(y.isnan().any(1).sum()) == 1
    assert torch.equal(y.nan_to_num(7), wanted.nan_to_num(7))


def test_the_largest_sums_and_rows_that_lie_apart(on_cpu) -> None:
    values, weight, x_scale, scale, _ = call(130, 16, 4096, BF16, None)
    weight.fill_(-127)
    apart = torch.full((130, 8192), 127, dtype=torch.int8)[:, 2048:6144]
    y = cuda.run(apart, weight, scale, None, x_scale, None, "dynamic", BF16)
    assert torch.equal(y, truth(values.fill_(127), weight, x_scale, scale, None).to(BF16))
    assert y[0, 0] / x_scale[0] / scale[0] == pytest.approx(-127 * 127 * 4096, rel=1e-2)


@pytest.mark.parametrize(("shape", "launch"), [
    ((28672, 4096), Launch(8)), ((16384, 4096), Launch(8)), ((4096, 14336), Launch(16)), ((4096, 8192), Launch(16)),
    ((3072, 1024), Launch(16, True)), ((1024, 1024), Launch(16, True)), ((4096, 1024), Launch(8, True)),
    ((1024, 4096), Launch(8, True)),
])  # fmt: skip
def test_the_launch_is_the_one_that_was_measured_fastest(shape, launch) -> None:
    assert cuda.choose_launch(*shape) == launch


def test_arguments_stand_where_the_kernel_reads_them() -> None:
    source = (ROOT / "csrc/int8_linear_cuda.cuh").read_text()
    body = re.search(r"struct Int8ProductArguments \{(.*?)\};", source, re.DOTALL)
    assert body is not None
    declared = re.sub(r"//.*", "", body[1]).split(";")
    names = [re.sub(r"[\s*]", "", name.split()[-1]) for line in declared if line.strip() for name in line.split(",")]
    values, weight, x_scale, scale, bias = call(66, 24, 128, BF16, FP16)
    y = values.new_empty((66, 24), dtype=BF16)
    packed = cuda.arguments(values, weight, x_scale, scale, bias, y, Launch(5, True))
    fields = dict(zip(names, cuda.FIELDS.unpack(packed), strict=True))
    assert fields == {
        "bytes": 8 * len(names), "dtype": 1, "bias_dtype": 2, "rows": 66, "outputs": 24, "inputs": 128,
        "group": 5, "staggered": 1, "processors": 1, "stream": 0, "x": values.data_ptr(), "weight": weight.data_ptr(),
        "x_scale": x_scale.data_ptr(), "scale": scale.data_ptr(), "bias": bias.data_ptr(), "y": y.data_ptr(),
    }  # fmt: skip


def test_what_it_leaves_to_others_is_a_sentence(on_cpu, monkeypatch) -> None:
    def reason(rows: int = 129, inputs: int = 128, outputs: int = 264, offsets=None, mode: str = "dynamic", dtype=BF16,
               begin: int = 0, x_scale=True):  # fmt: skip
        x = torch.zeros(rows * inputs + begin, dtype=torch.int8 if x_scale else BF16)[begin:].view(rows, inputs)
        x_scale_T = torch.ones(rows) if x_scale else None
        return cuda.why_not(x, torch.zeros(outputs, inputs, dtype=torch.int8), torch.ones(outputs), None, x_scale_T,
                            offsets, mode, dtype)  # fmt: skip

    assert reason() is None
    assert reason(rows=128) == "takes more than 128 rows, got 128"
    assert reason(inputs=136) == "takes inputs in multiples of 16, at least 128, got 136"
    assert reason(inputs=112) == "takes inputs in multiples of 16, at least 128, got 112"
    assert reason(outputs=260) == "takes outputs in multiples of 8, got 260"
    assert reason(mode="weight_only") == "takes mode dynamic, got weight_only"
    assert reason(offsets=torch.zeros(2)) == "takes one layer's weights, got those of experts"
    assert reason(dtype=FP32) == "gives bfloat16 or float16, got float32"
    assert reason(begin=3) == "takes tensors that begin at multiples of 16 bytes, got x 3 after one"
    assert reason(outputs=256) == "takes more tiles of 128 x 256 than half of the 4 processors, got 2"
    assert str(reason(x_scale=False)).startswith("has rows quantised by Triton, which says: needs CUDA tensors")
    monkeypatch.setattr(native_cuda, "DEVICE", "cuda")
    assert reason() == "needs CUDA tensors, got x on cpu"


def test_without_its_library_triton_is_chosen_in_silence(on_cpu, monkeypatch, tmp_path, recwarn, capfd) -> None:
    values, weight, x_scale, scale, _ = call(257, 264, 128, BF16, None)
    args = (values, weight, scale, None, x_scale, None, "dynamic", BF16)
    backends = [replace(x, why_not=lambda *args: None) if x.name == "triton" else x for x in BACKENDS]
    assert choose("int8_linear", backends, *args).name == "cuda"
    for built, path, words in (
        ("for others", native_cuda.PATH, "are built without those for sm_90a; name 90 in LONGLLAVA_CUDA_ARCHS"),
        ("not at all", tmp_path / "none.so", "are not built"),
    ):
        cuda._cannot_run_on.cache_clear()
        forget()
        monkeypatch.setattr(native_cuda, "PATH", path)
        monkeypatch.setattr(native_cuda, "has", lambda name: False)
        assert choose("int8_linear", backends, *args).name == "triton", built
        assert f"the CUDA kernels {words}" in str(cuda.why_not(*args))
    cuda._cannot_run_on.cache_clear()
    assert not recwarn.list and capfd.readouterr() == ("", "")


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
        int8_linear(torch.ones(130, 128).half(), torch.ones(8, 128, dtype=torch.int8), torch.ones(8), backend="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "outputs", "inputs", "dtype", "bias"), [
    (8191, 3072, 1024, BF16, BF16), (8191, 1000, 14336, FP16, None), (36001, 136, 144, BF16, FP32),
])  # fmt: skip
def test_the_bits_on_a_gpu(rows, outputs, inputs, dtype, bias) -> None:
    args = call(rows, outputs, inputs, dtype, bias)
    values, weight, x_scale, scale, bias_N = (None if x is None else x.to("cuda") for x in args)
    quantized = Quantized(values, x_scale, dtype)
    if reason := cuda.why_not(values, weight, scale, bias_N, x_scale, None, "dynamic", dtype):
        pytest.skip(reason)
    y = int8_linear(quantized, weight, scale, bias_N, backend="cuda")
    assert torch.equal(y, int8_linear(quantized, weight, scale, bias_N, backend="triton"))
