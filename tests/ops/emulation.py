"""Builds the CUDA kernels for a CPU (emulated/device.cuh in place of csrc/device.cuh), and lets the ops load that."""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from longllava.ops import native_cuda

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-std=c++17", "-O0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-x", "c++"]


@functools.lru_cache(maxsize=1)
def library() -> Path:
    """The emulation, built once a process. Needs g++ 12 or newer, for its _Float16 and its C++17."""
    folder = Path(tempfile.mkdtemp(prefix="longllava-emulated-"))
    sources = sorted((ROOT / "csrc").glob("*.cu"))

    def compile(source: Path) -> None:
        include = [f"-I{ROOT}/tests/ops/emulated", f"-I{ROOT}/csrc"]
        command = ["g++", *FLAGS, *include, "-c", str(source), "-o", str(folder / f"{source.stem}.o")]
        subprocess.run(command, check=True, capture_output=True, text=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile, sources))
    objects = [str(folder / f"{source.stem}.o") for source in sources]
    subprocess.run(["g++", "-shared", *objects, "-o", str(folder / "emulated.so")], check=True)
    return folder / "emulated.so"


@contextmanager
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CUDA backends run on CPU tensors inside."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    monkeypatch.setattr(native_cuda, "DEVICE", "cpu")
    monkeypatch.setattr(native_cuda, "PATH", library())
    forget()
    try:
        yield
    finally:
        forget()


def forget() -> None:
    native_cuda._loaded.cache_clear()
    native_cuda.function.cache_clear()
