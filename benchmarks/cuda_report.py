"""What nvcc makes of the CUDA kernels, without a GPU: registers, spills, shared memory, instructions of the loops.

    python benchmarks/cuda_report.py --arch 90
    python benchmarks/cuda_report.py --arch 80 --kernel scan_backward

One row a kernel, one entry a loop: what it issues a warp, and how much of that is exponentials, products, loads, as in
triton_report.py. A loop's count holds what it issues seldom or for other calls, too, such as what is done once a chunk
or before the first tile. A scheduler issues one instruction a clock and begins one exponential of 32 lanes every 8.
Needs nvcc and cuobjdump (CUDA's toolkit, or triton's wheel), and no GPU. Writes benchmarks/results/cuda-sm<arch>.json.
"""

import _environment  # noqa: F401

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from _options import check_target
from triton_report import FAMILIES, instructions

from longllava.cli import run
from longllava.errors import LongLLaVAError
from longllava.files import write_json
from longllava.version import __version__

SOURCES = Path(__file__).resolve().parents[1] / "csrc"


def tool(name: str, *options: str) -> str:
    if shutil.which(name) is None:
        raise LongLLaVAError(f"{name} is not on PATH; install CUDA's toolkit, or add triton's backends/nvidia/bin")
    done = subprocess.run([name, *options], capture_output=True, text=True)
    if done.returncode:
        raise LongLLaVAError(f"{name}: {(done.stderr.strip() or f'exit code {done.returncode}').splitlines()[0]}")
    return done.stdout


def loops(sass: str) -> list[tuple[int, int, Counter[str]]]:
    """(first, last address, instructions by name) of every loop: between the target of a branch back and the branch."""
    code = instructions(sass)
    found = []
    for place, name, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest) if name == "BRA" else None
        if target and int(target[1], 16) < place:
            low = int(target[1], 16)
            found.append((low, place, Counter(name for at, name, _ in code if low <= at <= place)))
    return sorted(found, key=lambda loop: loop[0])


def counts(seen: Counter[str]) -> dict[str, int]:
    out = {"instructions": seen.total()}
    out |= {family: sum(seen[name] for name in names) for family, names in FAMILIES.items()}
    out["others"] = out["instructions"] - sum(out[family] for family in FAMILIES)
    return out


def rows_of(source: Path, arch: int, wanted: str) -> list[dict[str, Any]]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        name = f"{arch}a" if source.stem.endswith("_sm90a") else arch
        target = f"-gencode=arch=compute_{name},code=sm_{name}"
        tool("nvcc", "-std=c++17", "-O3", f"-I{SOURCES}", target, "-cubin", str(source), "-o", file.name)
        usage = tool("cuobjdump", "-res-usage", file.name)
        sass = tool("cuobjdump", "-sass", file.name)
    used = dict(re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", usage))
    rows = []
    for part in re.split(r"\n\s*Function : ", sass)[1:]:
        mangled = part.split("\n", 1)[0].strip()
        kernel = tool("c++filt", mangled).strip().replace("longllava::", "").partition("(")[0].removeprefix("void ")
        if wanted not in kernel:
            continue
        facts = {name: int(re.search(rf"{name}:(\d+)", used[mangled])[1]) for name in ("REG", "STACK", "LOCAL")}
        out: dict[str, Any] = {"kernel": kernel, "source": source.name, "registers": facts["REG"]}
        out |= {"spilled_bytes": facts["STACK"] + facts["LOCAL"], "instructions": len(instructions(part))}
        out["loops"] = [counts(seen) for _, _, seen in loops(part)]
        rows.append(out)
        print(kernel, *(f"{key} {value}" for key, value in out.items() if key not in ("kernel", "loops")), flush=True)
    return rows


def report(
    arch: Annotated[int, typer.Option(help="Compute capability without its point: 80, 90.")] = 90,
    kernel: Annotated[str, typer.Option(help="Only kernels whose name contains this.")] = "",
    source: Annotated[str, typer.Option(help="Only files whose name contains this.")] = "",
    output: Annotated[
        Path | None,
        typer.Option(help="JSON file; default benchmarks/results/cuda-sm<arch>.json, none with --kernel or --source."),
    ] = None,
) -> None:
    """Compile the CUDA kernels and count what they take."""
    check_target(output)
    rows = []
    for file in sorted(SOURCES.glob("*.cu")):
        if source in file.name and (arch == 90 or not file.stem.endswith("_sm90a")):
            rows += rows_of(file, arch, kernel)
    if not rows:
        raise LongLLaVAError(f"--kernel {kernel!r} --source {source!r}: no such kernel")
    if output is None and (kernel or source):
        return
    if output is None:
        output = Path(__file__).resolve().parent / "results" / f"cuda-sm{arch}.json"
    release = re.search(r"V([\d.]+)", tool("nvcc", "--version"))
    found = {"nvcc": release[1] if release else "", "longllava": __version__, "arch": arch, "rows": rows}
    print(write_json(output, found))


if __name__ == "__main__":
    run(lambda: typer.run(report), "cuda_report")
