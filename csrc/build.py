"""Builds the CPU kernels into one shared library, and the CUDA kernels into another where they can be used.

    python csrc/build.py [output_dir]          default: longllava/lib

The first needs a C++17 compiler (GCC >= 9, Clang >= 11). Every csrc/*_kernels.cpp is compiled once per form (portable;
on x86-64 also AVX2 and AVX-512), every other csrc/*.cpp once; see isa.h. Takes seconds. CXX names the compiler,
CXXFLAGS adds flags.

The second needs nvcc (CUDA 12 or newer) on PATH and is built where a GPU is seen, or LONGLLAVA_CUDA=1 asks for it;
LONGLLAVA_CUDA=0 forbids it. It takes minutes. LONGLLAVA_CUDA_ARCHS names the GPUs, "80 90" if it is not set; the last
is also put in as PTX, which the driver of a newer GPU compiles. csrc/*_sm90a.cu is for Hopper alone, whose matrix
instructions no other GPU has, and left out where 90 (or 90a, the same here) is not among them.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
NAME = "liblongllava_cpu.so"
# Fused multiply-add is wanted; the rest of fast-math is not: NaN and infinity keep their meaning.
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno"]
FLAGS += ["-fno-trapping-math", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-unknown-warning-option"]
FLAGS += ["-Wno-maybe-uninitialized"]  # GCC 12's own AVX-512 headers raise it
# GCC alone, Clang does not know it: arrays of vectors would be copied by memcpy, in 16-byte pieces.
GCC_FLAGS = ["-fno-tree-loop-distribute-patterns"]
AVX2 = ["-mavx2", "-mfma"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
X86_FORMS: dict[str, list[str]] = {"portable": [], "avx2": AVX2, "avx512": AVX2 + AVX512}


CUDA_NAME = "liblongllava_cuda.so"
CUDA_FLAGS = ["-std=c++17", "-O3", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
CUDA_ARCHS = "80 90"
HOPPER = "_sm90a"  # ends the names of the sources that only sm_90a can run


class NoCompiler(RuntimeError):
    """No usable C++ compiler, or no nvcc. The library works without the kernels, more slowly."""


def compiler() -> list[str]:
    """The command that compiles C++: CXX if set, else c++, g++ or clang++. Raises NoCompiler."""
    chosen = os.environ.get("CXX", "")
    if command := shlex.split(chosen):
        if shutil.which(command[0]) is None:
            raise NoCompiler(f"CXX={chosen}: no such command; set CXX to a C++17 compiler, or unset it")
        return command
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return [found]
    raise NoCompiler("no C++ compiler: tried c++, g++, clang++; install one (apt install g++) or set CXX")


def is_clang(command: list[str]) -> bool:
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, errors="replace")
    return "clang" in done.stdout


def build(output_dir: str | Path) -> Path:
    """Compile and link into `output_dir`; return the library's path. Raises NoCompiler or RuntimeError."""
    chosen = compiler()
    own = [] if is_clang(chosen) else GCC_FLAGS
    command = [*chosen, *FLAGS, *own, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    forms = X86_FORMS if platform.machine().lower() in ("x86_64", "amd64") else {"portable": []}
    with tempfile.TemporaryDirectory(prefix="longllava-build-") as scratch:
        jobs: list[list[str]] = []
        for source in sorted(SOURCES.glob("*.cpp")):
            is_kernel = source.stem.endswith("_kernels")
            for form, flags in forms.items() if is_kernel else [("", [])]:
                define = [f"-DLONGLLAVA_FORM={form}"] if form else []
                target = ["-o", f"{scratch}/{source.stem}-{form}.o"]
                jobs.append([*command, *flags, *define, "-c", str(source), *target])
        with ThreadPoolExecutor(_n_cores()) as pool:
            list(pool.map(_run, jobs))
        objects = [job[-1] for job in jobs]
        return _link([*command, "-shared", "-pthread", *objects], Path(output_dir), NAME)


def wants_cuda() -> bool:
    """Whether the CUDA kernels are to be built: as LONGLLAVA_CUDA says, else where there are nvcc and a GPU."""
    if chosen := os.environ.get("LONGLLAVA_CUDA"):
        return chosen != "0"
    return shutil.which("nvcc") is not None and (Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists())


def build_cuda(output_dir: str | Path) -> Path:
    """Compile and link the CUDA kernels into `output_dir`; return the library's path. Raises as `build` does."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise NoCompiler("nvcc is not on PATH; install the CUDA toolkit, or unset LONGLLAVA_CUDA")
    archs = cuda_archs()
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    command = [nvcc, *CUDA_FLAGS, f"-I{SOURCES}"]
    with tempfile.TemporaryDirectory(prefix="longllava-build-") as scratch:
        jobs = [
            [*command, *(hopper_codes(archs) if is_hoppers(x) else codes), "-c", str(x), "-o", f"{scratch}/{x.stem}.o"]
            for x in sorted(SOURCES.glob("*.cu"))
            if hopper_codes(archs) or not is_hoppers(x)
        ]
        with ThreadPoolExecutor(_n_cores()) as pool:
            list(pool.map(_run, jobs))
        return _link([*command, *codes, "-shared", *(job[-1] for job in jobs)], Path(output_dir), CUDA_NAME)


def cuda_archs() -> list[str]:
    """The GPUs that LONGLLAVA_CUDA_ARCHS names. 90a is taken for 90: what needs sm_90a is compiled for it anyway."""
    named = os.environ.get("LONGLLAVA_CUDA_ARCHS", CUDA_ARCHS).split()
    return list(dict.fromkeys("90" if arch == "90a" else arch for arch in named))


def is_hoppers(source: Path) -> bool:
    return source.stem.endswith(HOPPER)


def hopper_codes(archs: list[str]) -> list[str]:
    """What the sources for Hopper alone are compiled for: nothing where it is not asked for."""
    return ["-gencode=arch=compute_90a,code=sm_90a"] if "90" in archs else []


def _n_cores() -> int:
    """Those this process may use: a container on a large machine has not the memory for a compiler on each of it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _link(command: list[str], output_dir: Path, name: str) -> Path:
    """The finished file replaces the old one in one step, so a running process keeps the one it has loaded."""
    output_dir.mkdir(parents=True, exist_ok=True)
    finished, unfinished = output_dir / name, output_dir / f".{name}.{os.getpid()}"
    _run([*command, "-o", str(unfinished)])
    os.replace(unfinished, finished)
    return finished


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")  # it may speak another encoding
    if done.returncode:
        raise RuntimeError(f"the compiler failed:\n  {shlex.join(command)}\n{done.stderr.strip()}")
    if done.stderr.strip():
        sys.stderr.write(done.stderr)


if __name__ == "__main__":
    default = SOURCES.parent / "longllava" / "lib"
    target = sys.argv[1] if len(sys.argv) > 1 else default
    try:
        print(build(target))
        if wants_cuda():
            print(build_cuda(target))
    except (OSError, RuntimeError) as error:  # a folder that may not be written into, a full disk
        sys.exit(f"csrc/build.py: {error}")
