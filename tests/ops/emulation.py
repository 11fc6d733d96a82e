"""Builds the CUDA kernels for a CPU (emulated/device.cuh in place of csrc/device.cuh), and lets the ops load that."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
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
    """The emulation, built once for all workers, and again when a source changes. Needs g++ 12 or newer (_Float16)."""
    sources = sorted((ROOT / "csrc").glob("*.cu"))
    headers = [path for folder in ("csrc", "tests/ops/emulated") for path in sorted((ROOT / folder).glob("*.cuh"))]
    texts = [*sources, *headers, Path(__file__)]
    key = hashlib.sha256(b"".join(path.read_bytes() for path in texts)).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"longllava-emulated-{os.getuid()}-{key}"
    folder.mkdir(mode=0o700, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "emulated.so").exists():
            _build(sources, folder)
    return folder / "emulated.so"


def _build(sources: list[Path], folder: Path) -> None:

    def compile(source: Path) -> None:
        include = [f"-I{ROOT}/tests/ops/emulated", f"-I{ROOT}/csrc"]
        command = ["g++", *FLAGS, *include, "-c", str(source), "-o", str(folder / f"{source.stem}.o")]
        subprocess.run(command, check=True, capture_output=True, text=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile, sources))
    objects = [str(folder / f"{source.stem}.o") for source in sources]
    subprocess.run(["g++", "-shared", *objects, "-o", str(folder / "unfinished.so")], check=True)
    os.replace(folder / "unfinished.so", folder / "emulated.so")


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
