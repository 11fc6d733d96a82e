"""The Triton backends: what they refuse, their tables of windows, and their kernels, interpreted and compiled ahead.

The interpreter needs a process of its own: it is chosen when triton is first imported. No GPU is needed, and none used.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longllava.errors import BackendError
from longllava.ops import triton_support
from longllava.ops.attention import attention
from longllava.ops.attention import triton as triton_attention
from longllava.ops.causal_conv1d import causal_conv1d, reference
from longllava.ops.causal_conv1d import triton as triton_conv
from longllava.ops.selective_scan import selective_scan, triton_launch
from longllava.ops.selective_scan import triton as triton_scan
from longllava.ops.selective_scan.cases import Case
from longllava.ops.sequences import sample_seq_idx

ROOT = Path(__file__).resolve().parents[2]
installed = importlib.util.find_spec("triton") is not None and importlib.metadata.version("triton")
needs_triton = pytest.mark.skipif(not installed, reason="triton is not installed (pip install triton)")
needs_interpreter = pytest.mark.skipif(
    not installed or int(installed.split(".")[1]) < 9,
    reason=f"triton's interpreter works with numpy 2.4 from 3.9 on, installed is {installed or 'none'}",
)


def interpreted(*options: str, file: str = "triton_interpreted") -> None:
    command = [sys.executable, "-m", "pytest", f"tests/ops/{file}.py", "-q", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@needs_interpreter
@pytest.mark.parametrize("part", ["scan and not spans", "scan and spans", "conv and not scan", "not scan and not conv"])
def test_kernels_in_the_interpreter(part: str) -> None:
    """Parts of some minutes for two workers; together they are all, each once."""
    interpreted("-k", part)


@needs_interpreter
@pytest.mark.parametrize("part", ["product or tiles", "not product and not tiles"])
def test_kernels_of_int8_in_the_interpreter(part: str) -> None:
    interpreted("-k", part, file="int8_interpreted")


@needs_interpreter
@pytest.mark.parametrize("kernels", ["decoding", "vision"])
def test_kernels_of_one_file_in_the_interpreter(kernels: str) -> None:
    interpreted(file=f"{kernels}_interpreted")


@needs_interpreter
@pytest.mark.long
def test_kernels_in_the_interpreter_in_full_size() -> None:
    interpreted("-m", "long")


@needs_triton
@pytest.mark.skipif(sys.platform != "linux", reason="triton's compiler for NVIDIA GPUs is for Linux")
@pytest.mark.parametrize(
    ("arch", "call"), [(90, "nano"), *(pytest.param(arch, "", marks=pytest.mark.long) for arch in (80, 90))]
)
def test_every_kernel_compiles_for_gpus_that_are_not_here(arch: int, call: str, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    command = [sys.executable, "benchmarks/triton_report.py", "--arch", str(arch), "--call", call, "--output", str(out)]
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads(out.read_text("utf-8"))["rows"]
    assert {row["kernel"].partition("_")[0] for row in rows} >= {"forward", "backward", "join", "merge"}
    assert all(row["spilled_bytes"] == 0 for row in rows if not row["kernel"].startswith("backward"))
    products = [row for row in rows if row["kernel"] == "product"]
    assert (len(products) > 0) == (call == "") and all(row["tensor core"] > 0 for row in products)


@needs_triton
@pytest.mark.skipif(sys.platform != "linux", reason="triton's compiler for NVIDIA GPUs is for Linux")
@pytest.mark.parametrize(("arch", "kilobytes"), [(90, 227), pytest.param(80, 163, marks=pytest.mark.long)])
def test_wide_numbers_find_room_in_shared_memory(arch: int, kilobytes: int, tmp_path: Path) -> None:
    """More than a block may have is an error at the first launch. fp32 with 128 numbers a head asked for 320 KB."""
    out = tmp_path / "report.json"
    command = [sys.executable, "benchmarks/triton_report.py", "--arch", str(arch), "--call", "wide", "--output", out]
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    taken = [(row["shared_bytes"], row["kernel"]) for row in json.loads(out.read_text("utf-8"))["rows"]]
    assert {"forward", "product"} <= {kernel for _, kernel in taken} and max(taken)[0] <= kilobytes * 1024


def test_a_tensor_that_is_not_on_a_gpu_is_refused_by_name() -> None:
    args = Case("small", length=3).inputs()
    with pytest.raises(BackendError, match="triton: needs CUDA tensors, got u on cpu"):
        selective_scan(*args, backend="triton")
    with pytest.raises(BackendError, match="triton: needs CUDA tensors, got x on cpu"):
        causal_conv1d(args[0], torch.ones(40, 4), backend="triton")
    q = torch.ones(1, 2, 1, 8)
    with pytest.raises(BackendError, match="triton: needs CUDA tensors, got q on cpu"):
        attention(q, q, q, backend="triton")


def test_what_the_kernels_do_not_take_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the CPU would do
    monkeypatch.setattr(triton_support, "missing", lambda: None)
    u = torch.ones(1, 2, 4)
    wide = torch.ones(4, 257)
    assert triton_scan.why_not(u, u, wide, u, u) == "takes 1 to 256 states per channel, got 257"
    few = wide[:, :0], u[..., :0], u[..., :0]  # y is D u, then, which no kernel is needed for
    assert triton_scan.why_not(u, u, *few) == "takes 1 to 256 states per channel, got 0"
    assert triton_scan.why_not(u, u.double(), u[0], u, u) == "takes float32, bfloat16 or float16, got delta in float64"
    assert triton_conv.why_not(u, torch.ones(4, 9)) == "takes at most 8 taps, got 9"
    q = torch.ones(1, 2, 1, 8)
    assert triton_attention.why_not(q, q, q) is None
    for place in range(3):
        qkv = [q, q, q]
        qkv[place] = torch.ones_like(q).requires_grad_()
        assert triton_attention.why_not(*qkv) == "has no backward, and gradients are wanted"
    with torch.no_grad():
        assert triton_attention.why_not(*qkv) is None
    assert triton_scan.why_not(u, u, u[0], u, u) is None


def test_a_missing_triton_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    triton_support._missing.cache_clear()
    try:
        reason = triton_support.why_not(x=torch.ones(1))
    finally:
        triton_support._missing.cache_clear()
    assert reason == "triton is not installed; pip install 'longllava[cuda]'"


def test_an_old_triton_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.5.1+git")
    assert triton_support._missing.__wrapped__().startswith("needs triton 3.6 or newer, got 3.5.1+git; ")


@needs_triton
def test_a_triton_that_cannot_run_a_kernel_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine whose GPU is there and whose C compiler is not."""
    from longllava.ops import triton_trial

    def fail(device: torch.device) -> None:
        assert device.type == "cuda"
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(triton_trial, "run", fail)
    reason = str(triton_support._missing.__wrapped__())
    assert reason.startswith("triton is installed and fails: RuntimeError: Failed to find C compiler; ")


def test_compiled_code_asks_whether_triton_works_and_traces_on() -> None:
    @torch.compile(backend="eager", fullgraph=True)
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if triton_support.missing() is None else x + x

    torch.compiler.reset()
    assert torch.equal(double(torch.ones(2)), torch.full((2,), 2.0))


@pytest.mark.parametrize("kind", ["left", "middle", "right", "packed", "wild"])
@pytest.mark.parametrize("n_past", [0, 1, 3, 7])
def test_windows_are_the_references(kind: str, n_past: int) -> None:
    for length in (1, 2, 9, 40):
        seq_idx = sample_seq_idx(kind, 3, length, torch.Generator().manual_seed(length))
        sources, last = triton_conv.windows(seq_idx, n_past)
        expected, expected_last = reference.windows(seq_idx, n_past)
        assert torch.equal(sources.long(), expected) and torch.equal(last.long(), expected_last)
        users = triton_conv.users_of(sources)
        for row, place, tap in (users >= 0).nonzero().tolist():
            assert expected[row, users[row, place, tap], tap] == place
        assert int((users >= 0).sum()) == int((expected >= 0).sum())


@pytest.mark.parametrize(("batch", "channels", "length", "expected"), [
    (1, 8192, 36_000, 1), (8, 1536, 4096, 1), (64, 512, 600, 1),
    (1, 512, 2048, 8), (1, 512, 36_000, 16), (1, 512, 1, 1),
])  # fmt: skip
def test_time_is_cut_only_where_channels_do_not_fill_the_gpu(
    batch: int, channels: int, length: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_support, "n_processors", lambda device: 132)
    shape = triton_launch.geometry(channels, 16)
    n_spans, span = triton_launch.spans(batch, length, shape, torch.device("cpu"))
    assert n_spans == expected
    assert span % triton_launch.CHUNK == 0 and (n_spans - 1) * span < length <= n_spans * span
