"""Calls at the edges of what the CUDA backends take: tensors that lie oddly, elsewhere, or on GPUs with less memory."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from longllava.errors import BackendError
from longllava.ops import native_cuda
from longllava.ops import selective_scan as scan_op
from longllava.ops.causal_conv1d import cases as conv_cases
from longllava.ops.causal_conv1d import cuda as conv
from longllava.ops.causal_conv1d import reference as conv_reference
from longllava.ops.int8_linear import cuda as int8
from longllava.ops.selective_scan import cases as scan_cases
from longllava.ops.selective_scan import cuda as scan
from longllava.ops.selective_scan import cuda_launch as launch
from longllava.ops.selective_scan import reference as scan_reference
from tests.ops.emulation import emulated
from tests.ops.parity import assert_matches, poison_empty

WIDE = replace(scan_cases.PLAIN, name="wide", batch=1, length=200, channels=72, dtype=torch.bfloat16)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    poison_empty(monkeypatch)
    with emulated(monkeypatch):
        yield


@pytest.mark.parametrize(("op", "reference", "cases"), [
    (scan, scan_reference, scan_cases), (conv, conv_reference, conv_cases),
], ids=("scan", "convolution"))  # fmt: skip
def test_seq_idx_may_lie_column_by_column(op, reference, cases, on_cpu) -> None:
    args = list(replace(cases.PLAIN, batch=3, length=40, packing="wild").inputs())
    at = cases.NAMES.index("seq_idx")
    args[at] = args[at].t().contiguous().t()
    assert_matches(op.run, reference.run, cases.NAMES, args, 2e-6)


def on_devices(args, elsewhere: int, other: str) -> list:
    """Tensors of a GPU that is not there, but one of another device; others as they are."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return [
            torch.empty(x.shape, dtype=x.dtype, device=other if i == elsewhere else "cuda:0")
            if isinstance(x, torch.Tensor) else x
            for i, x in enumerate(args)
        ]  # fmt: skip


@pytest.mark.parametrize("other", ["cpu", "cuda:1"])
def test_a_tensor_on_another_device_is_refused_by_name(other, monkeypatch) -> None:
    """Its address would be read on the first one: an illegal access, after which no CUDA call works any more."""
    monkeypatch.setattr(native_cuda, "missing", lambda: None)
    monkeypatch.setattr(launch, "lacks_room", lambda *args: None)
    monkeypatch.setattr(int8, "_cannot_run_on", lambda device: None)
    monkeypatch.setattr(native_cuda, "n_processors", lambda device: 4)
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda x: 0)
    product = (torch.zeros(300, 128, dtype=torch.int8), torch.zeros(264, 128, dtype=torch.int8), torch.ones(264))
    for op, names, args in (
        (scan, scan_cases.NAMES, replace(scan_cases.PLAIN, packing="left").inputs()),
        (conv, conv_cases.NAMES, replace(conv_cases.PLAIN, packing="left").inputs()),
        (int8, ("x", "weight", "scale", "bias", "x_scale"), (*product, torch.ones(264), torch.ones(300))),
    ):
        rest = (None, "dynamic", torch.bfloat16) if op is int8 else ()
        assert op.why_not(*on_devices(args, -1, other), *rest) is None
        for i, (name, x) in enumerate(zip(names, args)):
            if isinstance(x, torch.Tensor):
                reason = str(op.why_not(*on_devices(args, i, other), *rest))
                assert f"got {name} on {other}" in reason or (i == 0 and "on cuda:0 and" in reason), (op, reason)


@pytest.mark.parametrize(("dtype", "gradients", "words"), [
    (torch.bfloat16, False, None),
    (torch.float16, True, "needs 101664 bytes of shared memory for gradients, and cpu has 101376 for a block"),
    (torch.float32, False, "needs 138240 bytes of shared memory for float32, and cpu has 101376 for a block"),
])  # fmt: skip
def test_a_gpu_of_little_shared_memory_gets_the_scan_that_fits(dtype, gradients, words, on_cpu, monkeypatch) -> None:
    args = replace(scan_cases.PLAIN, dtype=dtype).inputs()
    args[0].requires_grad_(gradients)
    assert scan.why_not(*args) is None
    monkeypatch.setattr(launch, "shared_memory", lambda device: 99 * 1024)  # compute capability 8.6, 8.9, 12.0
    launch._lacks_room.cache_clear()
    found = scan.why_not(*args)
    launch._lacks_room.cache_clear()
    assert found == words


def test_rows_scales_in_16_bits_are_read_as_such(on_cpu, monkeypatch) -> None:
    monkeypatch.setattr(native_cuda, "n_processors", lambda device: 4)
    x, weight = torch.ones(130, 128, dtype=torch.int8), torch.ones(8, 128, dtype=torch.int8)
    x_scale = torch.arange(130).half()
    y = int8.run(x, weight, torch.ones(8), None, x_scale, None, "dynamic", torch.bfloat16)
    assert torch.equal(y, (128 * x_scale.float()).bfloat16()[:, None].expand(130, 8))


@pytest.mark.parametrize("entry", ["longllava_cuda_conv_forward", "longllava_cuda_conv_backward"])
def test_more_threads_than_32_bits_count_are_an_error(entry, on_cpu) -> None:
    """Of 2^26 rows of a token of 65 channels the last were left as they were."""
    batch, length, channels, taps = 2**26, 1, 65, 1
    fields = [conv.FIELDS.size, 0, batch, length, channels, taps]
    code = native_cuda.function(entry)(conv.FIELDS.pack(*fields, *[0] * 36))
    with pytest.raises(BackendError, match="convolution: a CUDA kernel could not be launched"):
        native_cuda.succeed(code, "convolution")


@pytest.mark.parametrize("case", [scan_cases.PLAIN, WIDE], ids=str)
def test_an_early_scan_reads_nothing_before_the_kernel_ahead_has_ended(case, on_cpu, monkeypatch) -> None:
    monkeypatch.setattr(launch, "EARLY", "prefetch")
    args = replace(case, packing=None).inputs()
    truth = scan.run(*args)
    written = [x for x in args if isinstance(x, torch.Tensor) and x.is_floating_point()]
    values = [x.untyped_storage().clone() for x in written]
    for x, value in zip(written, values):
        emulation = native_cuda._loaded()[0].longllava_emulated_kernel_ahead
        at = (ctypes.c_void_p(memory.data_ptr()) for memory in (x.untyped_storage(), value))
        emulation(*at, ctypes.c_int64(value.nbytes()))
        x.fill_(torch.nan)
    assert all(torch.equal(a, b) for a, b in zip(scan.run(*args), truth, strict=True))


def test_wide_rows_are_those_that_all_begin_at_a_multiple() -> None:
    x = torch.zeros(3, 5, 24, dtype=torch.bfloat16)
    assert native_cuda.is_wide(16, x, None, x[..., :16], x[:, :0]) and native_cuda.is_wide(8, x[..., 4:8])
    assert not native_cuda.is_wide(16, x, x[..., 4:20]) and not native_cuda.is_wide(16, x[..., :12])
    apart = torch.zeros(900, dtype=torch.bfloat16)
    for strides, wide in (((120, 24, 1), True), ((120, 20, 1), False), ((100, 16, 1), False)):
        assert native_cuda.is_wide(16, apart.as_strided((3, 5, 16), strides)) is wide
    assert native_cuda.is_wide(16, apart.as_strided((1, 5, 16), (7, 16, 1)))  # there is no second row
    assert native_cuda.is_wide(16, apart.as_strided((3, 1, 16), (16, 7, 1)))


@pytest.mark.parametrize(("variable", "allowed"), [("EPILOGUE", "maxima, int8"), ("EARLY", "no, yes, prefetch")])
def test_a_word_of_a_variable_that_is_none_is_named(variable, allowed, on_cpu, monkeypatch) -> None:
    monkeypatch.setattr(launch, variable, "in8")
    with pytest.raises(BackendError, match=f"LONGLLAVA_SCAN_{variable}: got 'in8', allowed: {allowed}; or unset it"):
        scan_op.selective_scan(*WIDE.inputs(), quantized=True, backend="cuda")
