"""How fast each op's backends are, against the pure torch loop in the same run. A wrong result is never timed.

    python benchmarks/kernels.py --device cpu
    python benchmarks/kernels.py --device cpu --op selective_scan --case prefill --threads 1

One row per op, case, direction and backend: milliseconds (median of interleaved rounds), or skipped and why, or
wrong and by how much. Writes benchmarks/results/kernels-<device>.json with hardware, versions and commit.
"""

import _environment  # noqa: F401

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from longllava.cli import run
from longllava.errors import LongLLaVAError
from longllava.files import write_json
from longllava.ops import attention, causal_conv1d, native, selective_scan
from longllava.ops.attention import cases as attention_cases
from longllava.ops.causal_conv1d import cases as conv_cases
from longllava.ops.dispatch import Backend
from longllava.ops.selective_scan import cases as scan_cases
from longllava.version import __version__

ROUNDS = 7  # interleaved: a slow moment of the machine hits every backend
ROUND_SECONDS = 0.05  # short calls are repeated within a round
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of the output's norm; bf16 rounds to 4e-3


@dataclass(frozen=True)
class Op:
    """What the table needs to know of an op. The last backend is the judge, and what the others are compared to.

    amount(case, backward) is the work of one call in `unit`, in units of 1e9.
    """

    name: str
    backends: Sequence[Backend]
    cases: Sequence[Any]
    arguments: Callable[[Any], tuple[Any, ...]]
    amount: Callable[[Any, bool], float]
    unit: str
    directions: Callable[[Any], Sequence[bool]] = lambda case: (False, True)  # forward, backward


def state_elements(case: scan_cases.Case, backward: bool) -> float:
    return case.batch * case.length * case.channels * case.n_states / 1e9


def conv_bytes(case: conv_cases.Case, backward: bool) -> float:
    """Forward reads x and writes y; backward reads x and grad_y and writes grad_x."""
    n_tensors = 3 if backward else 2
    return n_tensors * case.batch * case.length * case.channels * case.dtype.itemsize / 1e9


def attention_arguments(case: attention_cases.Case) -> tuple[Any, ...]:
    return (*case.inputs(), case.head_dim**-0.5, case.causal, *case.seq_idx(), False)


def attention_operations(case: attention_cases.Case, backward: bool) -> float:
    """Additions and multiplications for visible pairs; backward computes the scores again."""
    return 2 * case.multiplications() * (2.5 if backward else 1) / 1e9


OPS = (
    Op(
        "selective_scan",
        selective_scan.BACKENDS,
        scan_cases.BENCHMARKS,
        lambda case: case.inputs(),
        state_elements,
        "G state-elements/s",
    ),
    Op(
        "causal_conv1d",
        causal_conv1d.BACKENDS,
        conv_cases.BENCHMARKS,
        lambda case: case.inputs(),
        conv_bytes,
        "GB/s",
    ),
    Op(
        "attention",
        attention.BACKENDS[:-1],  # the reference's score matrix would take 1.2 GB; torch's own kernel judges
        attention_cases.BENCHMARKS,
        attention_arguments,
        attention_operations,
        "GFLOP/s",
        lambda case: case.directions,
    ),
)


def prepare(backend: Backend, args: Sequence[Any], backward: bool) -> tuple[Callable[[], Any], list[torch.Tensor]]:
    """A call to time, and the tensors that show whether it is right (outputs, or gradients)."""
    if not backward:

        def forward() -> Any:
            with torch.no_grad():
                return backend.run(*args)

        return forward, [x for x in forward() if x is not None]
    args = [x.detach().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]
    leaves = [x for x in args if isinstance(x, torch.Tensor) and x.requires_grad]
    y = backend.run(*args)[0]
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)

    def differentiate() -> Any:
        return torch.autograd.grad(y, leaves, grad_y, retain_graph=True, allow_unused=True)

    return differentiate, [x for x in differentiate() if x is not None]


def worst_error(got: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> float:
    errors = [float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)) for a, b in zip(got, truth)]
    return max(error if error == error else float("inf") for error in errors)


def seconds(call: Callable[[], Any]) -> float:
    """Of one call, short ones repeated for ROUND_SECONDS."""
    start = time.perf_counter()
    n = 0
    while True:
        call()
        n += 1
        if (now := time.perf_counter() - start) > ROUND_SECONDS:
            return now / n


def rows_of(op: Op, case: Any, backward: bool) -> list[dict[str, Any]]:
    """One row for each backend, in the op's order."""
    args = op.arguments(case)
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], Any]] = {}
    truth: list[torch.Tensor] = []
    for backend in reversed(op.backends):  # the judge first
        row = {"op": op.name, "case": case.name, "direction": "backward" if backward else "forward"}
        row |= {"backend": backend.name, "dtype": str(case.dtype).removeprefix("torch.")}
        rows[backend.name] = row
        reason = backend.why_not(*args)
        if reason is not None:
            row["skipped"] = reason
            continue
        call, shown = prepare(backend, args, backward)
        truth = truth or shown
        if (error := worst_error(shown, truth)) > TOLERANCE[case.dtype]:
            row["wrong"] = error
            continue
        row["error"] = error
        calls[backend.name] = call
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name].append(seconds(call))
    judge = op.backends[-1].name
    for name, measured in times.items():
        median = statistics.median(measured)
        rows[name] |= {
            "ms": median * 1e3,
            "best_ms": min(measured) * 1e3,
            "rate": op.amount(case, backward) / median,
            "unit": op.unit,
            "times_the_loop": statistics.median(a / b for a, b in zip(times[judge], measured)),
        }
    return [rows[backend.name] for backend in op.backends]


def line(row: dict[str, Any]) -> str:
    head = f"{row['op']:15} {row['case']:14} {row['direction']:9} {row['backend']:10}"
    if "skipped" in row:
        return f"{head} skipped: {row['skipped']}"
    if "wrong" in row:
        return f"{head} wrong: {row['wrong']:.1e}"
    return f"{head} {row['ms']:10.3f} ms {row['rate']:9.3f} {row['unit']:19} {row['times_the_loop']:7.1f} x loop"


def machine() -> dict[str, Any]:
    """What a number needs beside it to mean something."""
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        names = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "instruction_set": native.isa() if native.why_not() is None else native.why_not(),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "longllava": __version__,
        "commit": commit(),
    }


def commit() -> str:
    """The commit measured, with "+" where files differed from it; "unknown" outside a clone."""
    folder = Path(__file__).resolve().parent
    asked = [
        subprocess.run(["git", *what], cwd=folder, capture_output=True, text=True, check=False)
        for what in (
            ("rev-parse", "--short=12", "HEAD"),
            ("status", "--porcelain", "--", "../csrc", "../longllava/ops"),
        )
    ]
    if any(answer.returncode for answer in asked):
        return "unknown"
    return asked[0].stdout.strip() + ("+" if asked[1].stdout.strip() else "")


def kernels(
    device: Annotated[str, typer.Option(help="Where to measure; only cpu has kernels of ours so far.")] = "cpu",
    op: Annotated[str, typer.Option(help="Only ops whose name contains this.")] = "",
    case: Annotated[str, typer.Option(help="Only cases whose name contains this.")] = "",
    threads: Annotated[int, typer.Option(help="Threads; 0 takes torch's number.")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="JSON file; default benchmarks/results/kernels-<device>.json.")
    ] = None,
) -> None:
    """Time every backend of every op on the shapes that matter, against the pure torch loop."""
    if device != "cpu":
        raise LongLLaVAError(f"--device {device}: only cpu can be measured so far")
    if threads:
        torch.set_num_threads(threads)
    report = {**machine(), "threads": torch.get_num_threads(), "rows": []}
    print(json.dumps({name: value for name, value in report.items() if name != "rows"}, indent=2))
    for entry in OPS:
        for call in entry.cases:
            if op in entry.name and case in call.name:
                for backward in entry.directions(call):
                    for row in rows_of(entry, call, backward):
                        print(line(row), flush=True)
                        report["rows"].append(row)
    if not report["rows"]:
        raise LongLLaVAError(f"--op {op!r} --case {case!r}: no such case")
    if output is None:
        output = Path(__file__).resolve().parent / "results" / f"kernels-{device}.json"
    print(write_json(output, report))


if __name__ == "__main__":
    run(lambda: typer.run(kernels), "kernels")
