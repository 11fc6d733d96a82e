"""The compiled library: one that cannot be used is said so, and how it is built. Its forms: test_forms.py."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from longllava.errors import BackendError
from longllava.ops import native
from longllava.ops.attention import attention
from longllava.ops.attention.cases import Case as AttentionCase
from longllava.ops.causal_conv1d import causal_conv1d
from longllava.ops.conv3x3 import cpu as conv3x3_cpu
from longllava.ops.conv3x3.cases import Case as ConvolutionCase
from longllava.ops.dispatch import Backend, choose, report
from longllava.ops.fused import rms_norm
from longllava.ops.int8_linear import int8_linear, quantize_weight
from longllava.ops.selective_scan import selective_scan
from longllava.ops.selective_scan.cases import Case as ScanCase

ROOT = Path(__file__).resolve().parents[2]

def needs_library() -> None:
    if reason := native.why_not():
        pytest.skip(reason)


@pytest.fixture
def fresh(monkeypatch):
    """native as a process sees it before it has looked for the library."""
    monkeypatch.setattr(native, "_loaded", None)
    monkeypatch.setattr(native, "_said", False)
    return monkeypatch


def test_a_missing_library_is_a_reason_and_is_said_once(fresh, tmp_path, caplog) -> None:
    from longllava.ops.selective_scan import BACKENDS, selective_scan
    from longllava.ops.selective_scan.cases import Case

    fresh.setattr(native, "PATH", tmp_path / "nowhere.so")
    args = Case("small", length=3).inputs()
    cpu = next(backend for backend in BACKENDS if backend.name == "cpu")
    assert str(cpu.why_not(*args)).startswith("the compiled kernels are missing (")
    with pytest.raises(BackendError, match="cpu: the compiled kernels are missing"):
        selective_scan(*args, backend="cpu")
    selective_scan(*args)
    selective_scan(*args)
    assert [record.message[:40] for record in caplog.records] == ["longllava runs its slower plain-torch co"]


def test_a_broken_library_is_a_reason(fresh, tmp_path) -> None:
    (tmp_path / "broken.so").write_bytes(b"not a library")
    fresh.setattr(native, "PATH", tmp_path / "broken.so")
    assert str(native.why_not()).startswith("the compiled kernels cannot be loaded (")
    with pytest.raises(BackendError, match="cannot be loaded"):
        native.library()


def test_a_library_of_another_interface_is_a_reason(fresh) -> None:
    needs_library()
    fresh.setattr(native, "_loaded", None)
    known = native.ABI
    fresh.setattr(native, "ABI", 99)
    assert f"speak interface {known}, this longllava needs 99" in str(native.why_not())


def test_the_library_may_be_loaded_first_under_torch_compile(fresh) -> None:
    torch.compiler.reset()
    x, weight = torch.randn(3, 8), torch.ones(8)
    compiled = torch.compile(lambda x: rms_norm(x, weight, 1e-5)[0], backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), rms_norm(x, weight, 1e-5)[0])


def test_a_struct_of_another_size_is_refused() -> None:
    needs_library()
    library = native.library()
    assert library.longllava_scan_forward(bytes(536)) == 2
    with pytest.raises(BackendError, match="of another version"):
        native.succeed(2, "op")
    with pytest.raises(MemoryError, match="op: out of memory"):
        native.succeed(1, "op")


def build_module():
    spec = importlib.util.spec_from_file_location("csrc_build", ROOT / "csrc/build.py")
    assert spec is not None and spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    return build


# Takes no option of GCC's alone, writes what -o names, and says whose it is.
COMPILER = """#!/bin/sh
case "$*" in --version) echo "{name} 14.0"; exit;; esac
case "{name} $*" in *clang*-fno-tree-loop*) echo "unknown argument" >&2; exit 1;; esac
echo "$*" >> {log}
while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done
"""


@pytest.mark.parametrize("name", ["Debian clang version", "g++ (Debian)"])
def test_each_compiler_gets_the_options_it_knows(name, tmp_path, monkeypatch) -> None:
    (compiler := tmp_path / "compiler").write_text(COMPILER.format(name=name, log=tmp_path / "log"))
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert build_module().build(tmp_path / "lib").is_file()
    assert ("-fno-tree-loop" in (tmp_path / "log").read_text()) == name.startswith("g++")


def test_a_compiler_may_speak_another_encoding(tmp_path, monkeypatch) -> None:
    (compiler := tmp_path / "compiler").write_bytes(b"#!/bin/sh\necho 'non termin\xe9' | tee /dev/stderr\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(RuntimeError, match="the compiler failed:"):
        build_module().build(tmp_path / "lib")


def test_a_folder_that_cannot_be_built_into_is_one_sentence(tmp_path) -> None:
    (compiler := tmp_path / "compiler").write_text(COMPILER.format(name="g++", log=tmp_path / "log"))
    compiler.chmod(0o755)
    line = [sys.executable, str(ROOT / "csrc/build.py"), str(tmp_path / "log/lib")]
    done = subprocess.run(line, env={**os.environ, "CXX": str(compiler)}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"csrc/build.py: [Errno 20] Not a directory: '{tmp_path / 'log/lib'}'\n"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux keeps a process to some cores")
def test_as_many_compilers_run_at_once_as_the_process_has_cores(tmp_path, monkeypatch) -> None:
    (compiler := tmp_path / "compiler").write_text(COMPILER.format(name="g++", log=tmp_path / "log"))
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    module, cores = build_module(), os.sched_getaffinity(0)
    pools, pool = [], module.ThreadPoolExecutor
    monkeypatch.setattr(module, "ThreadPoolExecutor", lambda n: pools.append(n) or pool(n))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)  # as on a large machine
    os.sched_setaffinity(0, {min(cores)})
    try:
        module.build(tmp_path / "lib")
    finally:
        os.sched_setaffinity(0, cores)
    assert pools == [1]


def test_a_blank_name_of_a_compiler_names_none(monkeypatch) -> None:
    monkeypatch.setenv("CXX", " ")
    blank = build_module().compiler()
    monkeypatch.delenv("CXX")
    assert blank == build_module().compiler()


@pytest.mark.parametrize(
    ("named", "archs", "hoppers"),
    [("90a", ["90"], True), ("80 90a", ["80", "90"], True), ("90 90a", ["90"], True), ("80", ["80"], False)],
)
def test_90a_is_taken_for_90(named, archs, hoppers, monkeypatch) -> None:
    build = build_module()
    monkeypatch.setenv("LONGLLAVA_CUDA_ARCHS", named)
    assert build.cuda_archs() == archs
    assert build.hopper_codes(build.cuda_archs()) == ["-gencode=arch=compute_90a,code=sm_90a"] * hoppers
    monkeypatch.delenv("LONGLLAVA_CUDA_ARCHS")
    assert build.cuda_archs() == ["80", "90"]


def test_choose_takes_the_first_that_does_not_object() -> None:
    def why_not(x: int) -> str | None:
        return "wants an even number" if x % 2 else None

    backends = (Backend("even", lambda x: x, why_not), Backend("any", lambda x: -x, lambda x: None))
    assert choose("op", backends, 2).name == "even"
    assert choose("op", backends, 3).name == "any"
    assert report(backends, 3) == {"even": "wants an even number", "any": None}
    with pytest.raises(BackendError, match="op: no backend can run this call:\n  even: wants an even number"):
        choose("op", backends, 3, forced="even")


def test_choose_takes_what_is_first_for_a_call_before_the_list(monkeypatch) -> None:
    def why_not(x: int) -> str | None:
        return "takes 5 at most" if x > 5 else None

    small = Backend("small", abs, why_not, first_for=lambda x: x < 3 or x == 7)
    backends = (Backend("usual", abs, lambda x: None), small, Backend("last", abs, lambda x: None))
    assert [choose("op", backends, x).name for x in (1, 3, 7)] == ["small", "usual", "usual"]
    assert [choose("op", backends, x, forced="small").name for x in (1, 3)] == ["small", "small"]
    assert choose("op", backends, 1, forced="usual").name == "usual"
    monkeypatch.setenv("LONGLLAVA_OP", "last")
    assert choose("op", backends, 1).name == "last"


def test_copies_are_made_only_where_the_kernels_need_them() -> None:
    x = torch.randn(2, 3, 8)
    for same in (x, x[:, :, :4], x[:, 1:], x[:, ::2], x.bfloat16()):
        assert native.readable(same) is same
    for copied in (x.transpose(1, 2), x[..., ::2], x.half(), x.double()):
        made = native.readable(copied)
        assert made is not copied and made.stride(2) == 1 and torch.equal(made, copied.to(made.dtype))


def test_the_callers_default_dtype_and_device_change_nothing() -> None:
    """Kernels write what they were told the room for: in a default dtype of half the size, beyond it."""
    needs_library()
    case = AttentionCase(name="defaults", n_queries=5, n_keys=5, n_heads=4, n_groups=2, head_dim=8)
    attention_inputs = [x.requires_grad_() for x in case.inputs()]
    stem = ConvolutionCase(height=5, width=5).inputs()

    def made() -> list[torch.Tensor]:
        y, lse = attention(*attention_inputs, return_lse=True, backend="cpu")
        grads = torch.autograd.grad((y, lse), attention_inputs, (y.detach(), lse.detach()))
        return [y.detach(), lse.detach(), *grads, conv3x3_cpu.run(*stem)]

    expected = made()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        found = made()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert all(x.dtype == torch.float32 and torch.equal(x, wanted) for x, wanted in zip(found, expected, strict=True))


def test_a_tensor_on_another_device_is_an_error() -> None:
    """Its address means nothing to the kernels: a call with one ended the process, or saw no state."""
    needs_library()
    u, delta, A, B, C, *_ = ScanCase("elsewhere", length=3).inputs()
    state = torch.zeros(len(u), *A.shape, device="meta")
    values, scale = quantize_weight(torch.ones(8, u.shape[2]))
    x = u.flatten(0, 1)
    calls: list[Callable[[], object]] = [
        lambda: selective_scan(u, delta, A, B, C, None, state=state, backend="cpu"),
        lambda: causal_conv1d(u, torch.ones(u.shape[2], 4, device="meta"), backend="cpu"),
        lambda: attention(u[..., None], u[..., None], u[..., None].to("meta"), backend="cpu"),
        lambda: rms_norm(x, x[0].to("meta"), 1e-6, backend="cpu"),
        lambda: int8_linear(x, values, scale.to("meta"), backend="cpu"),
    ]
    for call in calls:
        with pytest.raises(BackendError, match="need CPU tensors, got one on meta beside others"):
            call()


def test_a_seq_idx_beyond_32_bits_is_an_error() -> None:
    """2^32 had become 0, another sample's number, and 2^31 padding."""
    needs_library()
    u, delta, A, B, C, *_ = ScanCase("wide", length=3).inputs()
    for beyond in (2**32, 2**31, -(2**31) - 1):
        seq_idx = torch.tensor([0, 1, beyond]).expand(len(u), 3)
        for call in (
            lambda seq_idx: selective_scan(u, delta, A, B, C, None, seq_idx=seq_idx, backend="cpu"),
            lambda seq_idx: causal_conv1d(u, torch.ones(u.shape[2], 4), seq_idx=seq_idx, backend="cpu"),
            lambda seq_idx: attention(u[..., None], u[..., None], u[..., None], seq_idx_q=seq_idx, backend="cpu"),
        ):
            call(seq_idx.clamp(-1, 2))
            with pytest.raises(BackendError, match=f"32 bits, got .*{beyond}"):
                call(seq_idx)
