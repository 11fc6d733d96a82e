"""The CUDA backends: what they refuse, their plans, their kernels emulated on the CPU, compiled ahead, and on a GPU.

The emulation runs the kernels' own source (tests/ops/emulated), a block's threads one after the other. It proves
arithmetic, indices and barriers; speed and the memory model of a GPU it does not.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longllava.errors import BackendError
from longllava.nn import Context
from longllava.ops import native_cuda
from longllava.ops import selective_scan as scan_op
from longllava.ops.causal_conv1d import cases as conv_cases
from longllava.ops.causal_conv1d import cuda as conv
from longllava.ops.causal_conv1d import reference as conv_reference
from longllava.ops.int8_linear import quantize_rows
from longllava.ops.selective_scan import cases as scan_cases
from longllava.ops.selective_scan import cuda as scan
from longllava.ops.selective_scan import cuda_launch as launch
from longllava.ops.selective_scan import reference as scan_reference
from longllava.quant import Int8Config, fuse_scans_, quantize_
from tests.ops.emulation import ROOT, emulated, forget
from tests.ops.parity import assert_matches, error, poison_empty, split_equals_whole
from tests.tiny import tiny_model

SLACK = 2e-6
PLAIN = scan_cases.PLAIN
WIDE = replace(PLAIN, name="wide", batch=1, length=40, channels=72)  # rows that are read 16 bytes at a time
CASES = [case for case in scan_cases.CASES if case.n_states <= launch.MAX_STATES]
CASES += [replace(WIDE, name=f"wide-{dtype}", dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
CASES += [replace(WIDE, name="wide-wild", packing="wild", length=90, batch=2, dtype=torch.bfloat16)]
# the scan: blocks of at most 512 threads, backward 256; the convolution of eight taps took 125 and 175 by nvcc 13.0
MOST_REGISTERS = {"selective_scan_backward": 232, "selective_scan": 128, "trial": 16}
MOST_REGISTERS |= {"causal_conv1d_cuda_backward": 184, "causal_conv1d_cuda": 128}
MOST_REGISTERS["int8_linear"] = 168  # three warpgroups; two of them take more from the third, once they run
CONV_CASES = [*conv_cases.CASES]
CONV_CASES += [
    replace(conv_cases.PLAIN, name=f"wide-wild-{n_taps}-{dtype}", channels=16, n_taps=n_taps, dtype=dtype,
            packing="wild", length=90, batch=3)
    for n_taps, dtype in ((4, torch.bfloat16), (4, torch.float32), (8, torch.float16), (1, torch.float32))
]  # fmt: skip
CONV_CASES += [
    replace(conv_cases.PLAIN, name=f"wide-{dtype}", channels=20, length=length, dtype=dtype)
    for dtype, length in ((torch.bfloat16, 70), (torch.float16, 129), (torch.float32, 64))
]


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    poison_empty(monkeypatch)
    with emulated(monkeypatch):
        yield


@pytest.fixture
def several_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "MIN_SPAN", 8)
    monkeypatch.setattr(native_cuda, "n_processors", lambda device: 1000)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scan_matches_the_reference(case, on_cpu) -> None:
    assert_matches(scan.run, scan_reference.run, scan_cases.NAMES, case.inputs(), SLACK)


@pytest.mark.parametrize("case", [case for case in CASES if case.name in ("wild", "wide-torch.bfloat16")], ids=str)
def test_scan_over_several_spans_matches_too(case, on_cpu, several_spans) -> None:
    case = replace(case, length=200)
    assert launch.spans(case.batch, case.length, case.channels, torch.device("cpu")) == (7, 32)
    assert_matches(scan.run, scan_reference.run, scan_cases.NAMES, case.inputs(), SLACK)


@pytest.mark.parametrize("case", [case for case in CASES if case.name in ("plain", "wide-wild")], ids=str)
def test_scan_backward_with_less_shared_memory_matches_too(case, on_cpu, monkeypatch) -> None:
    monkeypatch.setattr(launch, "backward_block", lambda device: 32)
    assert_matches(scan.run, scan_reference.run, scan_cases.NAMES, case.inputs(), SLACK)


def test_scan_in_place_and_inputs_of_several_dtypes(on_cpu) -> None:
    with torch.no_grad():
        for length in (1, 20):
            args = list(replace(WIDE, length=length).inputs())
            state = args[scan_cases.NAMES.index("state")]
            args[1] = args[1].bfloat16()
            y, end = scan.run(*args)
            expected, expected_end = scan_reference.run(*args)
            assert error(y, expected) < SLACK and error(end, expected_end) < SLACK
            assert torch.equal(scan.run_(*args), y) and torch.equal(state, end)


def test_int8_rows_of_the_scan_are_the_quantisation_of_its_y(on_cpu) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for length, channels, packing in ((1, 72, None), (40, 72, None), (40, 30, None), (45, 64, "wild")):
            case = replace(WIDE, length=length, channels=channels, batch=2, dtype=dtype, packing=packing)
            args = list(case.inputs())
            args[0][0, -1] = torch.nan  # nothing hides it
            args[6][:, : length // 3] = 0  # rows of zeros
            y, end = scan.run(*args)
            rows, again = scan_op.selective_scan(*args, quantized=True, backend="cuda")
            truth = quantize_rows(y, backend="reference")
            assert rows.dtype == dtype and torch.equal(rows.values, truth.values)
            assert torch.equal(end.nan_to_num(7), again.nan_to_num(7))
            assert torch.equal(rows.scale.nan_to_num(7), truth.scale.nan_to_num(7))
            real = packing is None or args[-1][0, -1] >= 0
            assert bool(rows.scale[0, -1].isnan()) == real and not rows.scale[1].isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("length", "channels"), [(2, 8), (31, 72), (33, 136), (160, 136)])
def test_the_kernel_itself_writes_the_int8_rows(length, channels, dtype, on_cpu, monkeypatch) -> None:
    """Blocks get far apart in the emulation; one that did not wait for the others' maxima would be seen."""
    monkeypatch.setattr(native_cuda, "n_processors", lambda device: 6)
    monkeypatch.setattr(launch, "EPILOGUE", "int8")
    args = list(replace(WIDE, length=length, channels=channels, batch=2, dtype=dtype).inputs())
    args[0][0, -1], args[6][1, 0] = torch.nan, 0
    args[6] = args[6] * torch.linspace(0.1, 10, channels).to(dtype)  # the largest are in the last block
    names = ("u", "delta", "B", "C", "z", "seq_idx")
    assert launch.writes_int8(*(args[scan_cases.NAMES.index(name)] for name in names))
    y, end = scan.run(*args)
    written = []
    honest = scan.compute
    monkeypatch.setattr(scan, "compute", lambda *args: written.append(len(args)) or honest(*args))
    rows, again = scan_op.selective_scan(*args, quantized=True, backend="cuda")
    truth = quantize_rows(y, backend="reference")
    assert written == [15] and rows.dtype == dtype and torch.equal(rows.values, truth.values)
    assert torch.equal(rows.scale.nan_to_num(7), truth.scale.nan_to_num(7)) and rows.scale[0, -1].isnan()
    assert torch.equal(end.nan_to_num(7), again.nan_to_num(7))


def test_where_the_kernel_cannot_write_int8_itself(on_cpu, monkeypatch) -> None:
    monkeypatch.setattr(native_cuda, "n_processors", lambda device: 132)
    names = ("u", "delta", "B", "C", "z", "seq_idx")

    def possible(**changes) -> bool:
        args = replace(WIDE, dtype=torch.bfloat16, **changes).inputs()
        return launch.writes_int8(*(args[scan_cases.NAMES.index(name)] for name in names))

    assert possible(channels=8192, length=2) and not possible(channels=8192, length=2, batch=2)
    assert not possible(length=1) and not possible(channels=30) and not possible(packing="middle")
    assert not possible(channels=64, length=2048)  # time is cut
    u = torch.zeros(1, 9, 64)
    assert not launch.writes_int8(u, u, u[..., :16], u[..., :16], None, None)


def test_int8_rows_where_the_kernels_y_is_wider(on_cpu) -> None:
    args = list(replace(WIDE, dtype=torch.bfloat16).inputs())
    args[1] = args[1].float()
    rows, _ = scan_op.selective_scan(*args, quantized=True, backend="cuda")
    assert torch.equal(rows.values, quantize_rows(scan.run(*args)[0]).values)


def test_an_int8_model_gets_its_scans_rows_from_the_kernels(on_cpu, monkeypatch) -> None:
    model, x_BLD, calls = quantize_(tiny_model().model, Int8Config(rotated=())), torch.randn(2, 33, 32), []
    found = {}
    whole = launch.compute
    monkeypatch.setattr(scan, "compute", lambda *args: calls.append(len(args) > 13) or whole(*args))
    for backend in ("reference", "cuda"):
        for wanted in (True, False):
            monkeypatch.setenv("LONGLLAVA_SELECTIVE_SCAN", backend)
            fuse_scans_(model, wanted)
            with torch.no_grad():
                found[backend, wanted] = model(x_BLD, Context())[0]
    assert calls == [True] * 3  # three layers of Mamba; without, another compute is called, which `run` holds
    for backend in ("reference", "cuda"):
        assert torch.equal(found[backend, True], found[backend, False])
    # a y that rounds to another int8 value moves what follows by a step
    assert error(found["cuda", True], found["reference", True]) < 1e-2


def test_scan_cut_anywhere_is_the_scan(on_cpu) -> None:
    with torch.no_grad():
        split_equals_whole(scan.run, scan_cases.NAMES, WIDE.inputs(), (0, 1, 17, 33), 1e-6)


@pytest.mark.parametrize("case", CONV_CASES, ids=str)
def test_conv_matches_the_reference(case, on_cpu) -> None:
    assert_matches(conv.run, conv_reference.run, conv_cases.NAMES, case.inputs(), SLACK)


def test_conv_gradients_of_packed_rows_reach_far_and_not_beyond(on_cpu) -> None:
    """A window that passes over more padding than a thread's run has tokens; NaN in a gradient at padding."""
    x, weight, bias, state, _, _ = replace(conv_cases.PLAIN, batch=1, length=200, channels=8, n_taps=4).inputs()
    seq_idx = torch.full((1, 200), -1, dtype=torch.int32)
    seq_idx[0, :2], seq_idx[0, 150:152], seq_idx[0, 160:] = 0, 0, 7
    found = []
    for run in (conv.run, conv_reference.run):
        leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias, state)]
        y, end = run(*leaves, seq_idx, "silu")
        grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        grad_y[seq_idx < 0] = torch.nan if run is conv.run else 0
        found.append(torch.autograd.grad([y, end], leaves, [grad_y, torch.ones_like(end)]))
    for got, truth in zip(*found):
        assert error(got, truth) < SLACK
    assert found[0][0][0, :2].abs().min() > 0 and (found[0][0][seq_idx < 0] == 0).all()


def test_conv_in_place_and_cut_anywhere(on_cpu) -> None:
    with torch.no_grad():
        wide = CONV_CASES[-1]
        far = replace(wide, length=60, packing="left")
        for case in (wide, replace(wide, length=1), replace(wide, n_taps=8, packing="middle"), far):
            split_equals_whole(conv.run, conv_cases.NAMES, case.inputs(), (0, 1, 2, 33), 1e-6)
            args = case.inputs()
            if case is far:
                args[conv_cases.NAMES.index("seq_idx")][:, :33] = -1  # a second thread reads the state
            y, end = conv.run(*args)
            assert torch.equal(conv.run_(*args), y) and torch.equal(args[conv_cases.NAMES.index("state")], end)


@pytest.mark.parametrize("n_taps", [3, 4])
@pytest.mark.parametrize(("channels", "length"), [(16, 130), (5, 3)])  # four at a time, and one by one
def test_conv_reads_taps_and_bias_in_their_own_dtype(channels, length, n_taps, on_cpu) -> None:
    case = replace(conv_cases.PLAIN, channels=channels, length=length, n_taps=n_taps, dtype=torch.bfloat16)
    x, weight, bias, *rest = case.inputs()
    for dtype, of_bias in ((torch.bfloat16,) * 2, (torch.float16,) * 2, (torch.float64,) * 2, (torch.half, x.dtype)):
        narrow, last = weight.to(dtype), bias.to(of_bias)
        for got, wide in zip(conv.run(x, narrow, last, *rest), conv.run(x, narrow.float(), last.float(), *rest)):
            assert torch.equal(got, wide)
    grown = torch.cat([weight[:1], weight]).bfloat16()[1:]  # at an address that 16 does not divide
    assert torch.equal(conv.run(x, grown, bias, *rest)[0], conv.run(x, grown.float(), bias, *rest)[0])


def test_a_tensor_that_is_not_on_a_gpu_and_other_calls_are_refused() -> None:
    u = torch.ones(1, 2, 4)
    with pytest.raises(BackendError, match="cuda: needs CUDA tensors, got u on cpu"):
        scan_op.selective_scan(*scan_cases.Case("small", length=3).inputs(), backend="cuda")
    assert scan.why_not(u, u, torch.ones(4, 17), u, u) == "takes 1 to 16 states per channel, got 17"


def test_a_library_that_is_missing_or_of_another_interface_is_a_reason(on_cpu, monkeypatch, tmp_path: Path) -> None:
    u = torch.ones(1, 2, 4)
    assert scan.why_not(u, u, u[0], u, u) is None
    assert scan.why_not(u, u.double(), u[0], u, u) == "takes float32, bfloat16 or float16, got delta in float64"
    monkeypatch.setattr(native_cuda, "ABI", 99)
    forget()
    assert str(native_cuda.missing()).startswith("the CUDA kernels speak interface 7, this longllava needs 99; run `")
    monkeypatch.setattr(native_cuda, "PATH", tmp_path / "nowhere.so")
    forget()
    assert str(native_cuda.missing()).startswith("the CUDA kernels are not built (")
    (tmp_path / "nowhere.so").write_bytes(b"no library")
    forget()
    assert str(native_cuda.missing()).startswith("the CUDA kernels cannot be loaded (")
    with pytest.raises(BackendError, match="of another version"):
        native_cuda.succeed(-1, "op")


@pytest.mark.parametrize(("batch", "channels", "length", "expected"), [
    (1, 8192, 36_000, 1), (8, 1536, 4096, 1), (1, 4096, 4096, 1), (1, 512, 2048, 16), (1, 512, 36_000, 16),
    (1, 512, 300, 1), (1, 512, 1, 1),
])  # fmt: skip
def test_time_is_cut_only_where_channels_do_not_fill_the_gpu(
    batch: int, channels: int, length: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_cuda, "n_processors", lambda device: 132)
    n_spans, span = launch.spans(batch, length, channels, torch.device("cpu"))
    assert n_spans == expected
    assert span % launch.CHUNK == 0 and (n_spans - 1) * span < length <= n_spans * span


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize("source", [
    pytest.param(source.name, marks=() if source.stem in ("selective_scan_cuda", "trial") else pytest.mark.long)
    for source in sorted((ROOT / "csrc").glob("*.cu"))
])  # fmt: skip
def test_kernels_compile_for_gpus_that_are_not_here_and_nothing_spills(source: str, tmp_path: Path) -> None:
    for arch in ("90a",) if source.endswith("_sm90a.cu") else (80, 90):
        command = ["nvcc", "-std=c++17", "-O3", "-Xptxas", "-v", f"-I{ROOT}/csrc", "-cubin"]
        command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", str(ROOT / "csrc" / source)]
        done = subprocess.run([*command, "-o", str(tmp_path / "x")], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
        registers = [int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)]
        assert registers and len(spills) == len(registers)
        assert set(spills) == {("0", "0", "0")}
        assert "serialized" not in done.stderr  # products that would wait for each other
        assert max(registers) <= next(most for name, most in MOST_REGISTERS.items() if source.startswith(name))


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_scan_matches_the_reference_on_a_gpu(case) -> None:
    if reason := native_cuda.missing():
        pytest.skip(reason)
    args = [x.to("cuda") if isinstance(x, torch.Tensor) else x for x in case.inputs()]
    assert_matches(scan.run, scan_reference.run, scan_cases.NAMES, args, SLACK)
