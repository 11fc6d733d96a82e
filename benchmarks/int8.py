"""Int8 linear layers, quantisation of their input included, beside fp32, bf16 and torch's own int8 and fp8 products.

    python benchmarks/int8.py --device cpu
    python benchmarks/int8.py --device cuda
    python benchmarks/int8.py --device cuda --tune --shape 9b

One row a shape: milliseconds of each way (median of interleaved rounds; on a GPU ten calls in a CUDA graph), after
its values were checked. "ours" takes rows of bf16, by the backend that the row names; those that come after it have
rows of their own for the product alone. "int_mm" is torch._int_mm between torch's own quantisation and scaling; "fp8"
is torch._scaled_mm with a scale a row. Few rows are the decoder's: weights alone are int8 there. --tune tries the
launches of longllava/ops/int8_linear/cuda.py and triton.py instead. Writes benchmarks/results/int8-<device>.json.
"""

import _environment  # noqa: F401

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from _options import check_target
from torch import Tensor

from longllava.cli import run
from longllava.errors import LongLLaVAError
from longllava.files import write_json
from longllava.ops import native
from longllava.ops.dispatch import choose
from longllava.ops.fused import rms_norm, swiglu
from longllava.ops.int8_linear import BACKENDS, Quantized, cuda, int8_linear, quantize_rows, reference, triton
from longllava.ops.int8_linear.cases import BENCHMARKS, Case
from longllava.ops.quantized import MIXED
from longllava.train.record import environment

ROUNDS = {"cpu": 7, "cuda": 5}
ROUND_SECONDS = {"cpu": 0.1, "cuda": 0.02}
CPU_ROWS = 512  # of a prompt, at a time, where 8,192 would take minutes
CALLS_IN_GRAPH = 10
LEAST_SQNR = 35.0  # dB, against the product of the unquantised numbers
Call = Callable[[], Any]


def by_hand(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows quantised by torch, an operation at a time."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-30) / 127
    return (x / scale).round().to(torch.int8), scale


def backends(rows: Tensor | Quantized, weight: Tensor, scale: Tensor, mode: str) -> list[str]:
    """Names of those that can, the chosen one first; the judge only if it is chosen."""
    x, x_scale, dtype = rows if isinstance(rows, Quantized) else (rows, None, rows.dtype)
    args = (x, weight, scale, None, x_scale, None, mode, dtype)
    chosen = choose("int8_linear", BACKENDS, *args).name
    others = [backend.name for backend in BACKENDS[:-1] if backend.why_not(*args) is None]
    return [chosen, *(name for name in others if name != chosen)]


def ways(inputs: tuple[Any, ...], device: str) -> dict[str, Call]:
    """The calls to time, by name; a way that torch does not have here is a reason instead, raised when called."""
    x, weight, scale, *_, mode, _ = inputs
    bf16 = (weight.float() * scale[:, None]).to(torch.bfloat16)
    found: dict[str, Call] = {
        "ours": lambda: int8_linear(x, weight, scale, mode=mode),
        "bf16": lambda: F.linear(x, bf16),
    }
    if mode == "weight_only":
        if device == "cpu":
            fp32, wide = bf16.float(), x.float()
            found["fp32"] = lambda: F.linear(wide, fp32)
        return found
    quantized = quantize_rows(x)
    fp32, wide = bf16.float(), x.float()
    found["ours, fp32 in and out"] = lambda: int8_linear(wide, weight, scale)
    found["ours, product alone"] = lambda: int8_linear(quantized, weight, scale)
    for name in backends(quantized, weight, scale, mode)[1:]:
        found[f"{name}, product alone"] = partial(int8_linear, quantized, weight, scale, backend=name)
    found["ours, quantisation alone"] = lambda: quantize_rows(x)
    if x.shape[1] % MIXED == 0:
        found["ours, rotation and quantisation"] = lambda: quantize_rows(x, rotated=True)
    found["fp32"] = lambda: F.linear(wide, fp32)

    def int_mm() -> Tensor:
        values, x_scale = by_hand(x)
        return (torch._int_mm(values, weight.T) * x_scale * scale).to(x.dtype)

    def fp8() -> Tensor:
        x_scale = x.abs().amax(-1, keepdim=True).float() / 448
        values = (x / x_scale).to(torch.float8_e4m3fn)
        return torch._scaled_mm(values, fp8_weight.T, x_scale, fp8_scale, out_dtype=x.dtype)

    values = quantized.values
    found["int_mm"] = int_mm
    found["int_mm, product alone"] = lambda: torch._int_mm(values, weight.T)
    if device == "cuda":
        fp8_scale = bf16.abs().amax(1).float()[None] / 448
        fp8_weight = (bf16 / fp8_scale.T).to(torch.float8_e4m3fn)
        fp8_x, ones = (x / 8).to(torch.float8_e4m3fn), torch.ones(x.shape[0], 1, device=x.device)
        found["fp8"] = fp8
        found["fp8, product alone"] = lambda: torch._scaled_mm(
            fp8_x, fp8_weight.T, ones, fp8_scale, out_dtype=x.dtype
        )  # fmt: skip
    return found


def check(name: str, inputs: tuple[Any, ...]) -> float:
    """SQNR in dB of ours against the product of unquantised numbers. Raises where ours is not what the reference gives,
    or below LEAST_SQNR."""
    x, weight, scale, bias, x_scale, offsets, mode, dtype = inputs
    x = x.abs() ** 0.5 * x.sign()  # no two cases alike: not the numbers that are timed
    got = int8_linear(x, weight, scale, mode=mode).float()
    expected = reference.run(x, weight, scale, bias, x_scale, offsets, mode, dtype).float()
    truth = x.float() @ (weight.float() * scale[:, None]).T
    off = float((got - expected).norm() / expected.norm())
    sqnr = float(10 * torch.log10(truth.square().sum() / (got - truth).square().sum()))
    if not off < 5e-3 or not sqnr > LEAST_SQNR:
        raise LongLLaVAError(f"{name}: off by {off:.1e} from the reference, SQNR {sqnr:.1f} dB: never timed")
    return sqnr


def in_graph(call: Call) -> Call:
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS_IN_GRAPH):
            call()
    return graph.replay


def seconds(call: Call, device: str) -> float:
    start, n = time.perf_counter(), 0
    while True:
        call()
        n += 1
        if device == "cuda":
            torch.cuda.synchronize()
        if (now := time.perf_counter() - start) > ROUND_SECONDS[device]:
            return now / n / (CALLS_IN_GRAPH if device == "cuda" else 1)


@torch.inference_mode()
def interleaved(found: dict[str, Call], device: str) -> dict[str, Any]:
    """Median seconds of each way, or the sentence that says why it has none."""
    calls, out = {}, {}
    for name, call in found.items():
        try:
            call()
            calls[name] = in_graph(call) if device == "cuda" else call
        except (RuntimeError, AttributeError, ValueError) as error:
            out[name] = f"skipped: {str(error).splitlines()[0]}"
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS[device]):
        for name, call in calls.items():
            times[name].append(seconds(call, device))
    return out | {name: statistics.median(measured) for name, measured in times.items()}


def row_of(case: Case, device: str) -> dict[str, Any]:
    row: dict[str, Any] = {"shape": case.name, "rows": case.rows, "inputs": case.inputs, "outputs": case.outputs}
    inputs = case.inputs_of(device)
    row |= {"mode": case.mode, "backend": backends(*inputs[:3], case.mode)[0], "source": case.source}
    row["sqnr_db"] = round(check(case.name, inputs), 1)
    times = interleaved(ways(inputs, device), device)
    row["ms"] = {name: t * 1e3 if isinstance(t, float) else t for name, t in times.items()}
    operations = 2 * case.rows * case.inputs * case.outputs
    row["TOP/s"] = operations / times["ours"] / 1e12
    row["weights_GB/s"] = case.inputs * case.outputs / times["ours"] / 1e9
    for name in ("fp32", "bf16", "int_mm", "fp8"):
        if isinstance(times.get(name), float):
            row[f"times_{name}"] = times[name] / times["ours"]
    return row


def line(row: dict[str, Any]) -> str:
    shown = ", ".join(f"{name} {t:.3f}" if isinstance(t, float) else f"{name} {t}" for name, t in row["ms"].items())
    ratios = ", ".join(f"{row[key]:.2f} x {key[6:]}" for key in row if key.startswith("times_"))
    head = f"{row['shape']} ({row['rows']}, {row['inputs']}) -> {row['outputs']}, {row['mode']}, {row['backend']}"
    return f"{head}: {row['TOP/s']:.2f} TOP/s, {row['weights_GB/s']:.1f} GB/s; {ratios}\n    ms: {shown}"


def elementwise(device: str) -> list[dict[str, Any]]:
    """Norm with a residual, and SwiGLU, of 8,192 tokens of the 9B, with and without int8 output, beside plain torch."""
    rows = 8192 if device == "cuda" else CPU_ROWS
    x, residual = (torch.randn(rows, 4096, device=device).bfloat16() for _ in range(2))
    both, norm = torch.randn(rows, 28672, device=device).bfloat16(), torch.ones(4096, device=device).bfloat16()
    out = []
    for quantized in (False, True):
        written = 1 if quantized else 2
        calls: dict[str, tuple[int, Callable[[str | None], Any]]] = {
            "rms_norm": (
                (6 + written) * x.numel(),
                lambda backend, q=quantized: rms_norm(x, norm, 1e-6, residual, quantized=q, backend=backend),
            ),
            "swiglu": (
                (4 + written) * both.numel() // 2,
                lambda backend, q=quantized: swiglu(both, quantized=q, backend=backend),
            ),
        }
        for name, (n_bytes, call) in calls.items():
            found = {"ours": partial(call, None), "plain torch": partial(call, "reference")}
            times = interleaved(found, device)
            row = {"op": name, "rows": rows, "int8_output": quantized}
            row |= {"ms": {way: t * 1e3 if isinstance(t, float) else t for way, t in times.items()}}
            row["GB/s"] = n_bytes / times["ours"] / 1e9
            out.append(row)
            print(row, flush=True)
    return out


def tune(case: Case) -> list[dict[str, Any]]:
    """Milliseconds and TOP/s of each launch in CANDIDATES of cuda and triton, values of each checked."""
    x, weight, scale, *_ = case.inputs_of("cuda")
    values, x_scale, dtype = quantize_rows(x)
    expected = int8_linear(x, weight, scale, backend="triton")
    args = (values, weight, scale, None, x_scale, None, "dynamic", dtype)
    modules = (triton,) if cuda.why_not(*args) else (cuda, triton)
    calls: dict[str, Call] = {}
    for module, launch in [(backend, launch) for backend in modules for launch in backend.CANDIDATES]:
        call = partial(module.run, *args, launch)
        try:
            same = torch.equal(call(), expected)
        except Exception as error:  # too much shared memory, a compiler that gives up: the next one may do
            print(f"{case.name} {launch}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
            continue
        if not same:
            print(f"{case.name} {launch}: wrong", flush=True)
            continue
        calls[str(launch)] = call
    times = interleaved(calls, "cuda")
    operations = 2 * case.rows * case.inputs * case.outputs
    rows = []
    for name, t in sorted(times.items(), key=lambda item: item[1] if isinstance(item[1], float) else 1e9):
        rows.append({"shape": case.name, "launch": name, "ms": t * 1e3, "TOP/s": operations / t / 1e12})
        print(f"{case.name} {rows[-1]['TOP/s']:8.1f} TOP/s {t * 1e3:8.3f} ms {name}", flush=True)
    return rows


def instruction_set() -> str:
    return native.why_not() or native.isa()


def decode_cases(device: str) -> list[Case]:
    wide = [case for case in BENCHMARKS if case.name in ("9b-gate-up", "9b-down")]
    return [replace(case, name=f"{case.name}-{n}", rows=n, mode="weight_only") for case in wide for n in (1, 8, 64)
            if device == "cuda" or n < 64]  # fmt: skip


def int8(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    shape: Annotated[str, typer.Option(help="Only shapes whose name contains this.")] = "",
    tuning: Annotated[bool, typer.Option("--tune", help="Try launches of the GPU kernel; writes no results.")] = False,
    threads: Annotated[int, typer.Option(min=0, help="Threads on the CPU; 0 takes torch's number.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option(help="JSON file; default benchmarks/results/int8-<device>.json, none with --shape."),
    ] = None,
) -> None:
    """Time int8 linear layers beside fp32, bf16 and torch's own int8 and fp8 products."""
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise LongLLaVAError(f"--device {device}: expected cpu, or cuda where torch sees a GPU")
    if tuning and device == "cpu":
        raise LongLLaVAError("--tune: it tries launches of the GPU kernel; give --device cuda")
    check_target(output)
    if threads:
        torch.set_num_threads(threads)
    cases = [case for case in BENCHMARKS if shape in case.name]
    if device == "cpu":
        cases = [case if case.name.startswith("nano") else replace(case, rows=CPU_ROWS) for case in cases]
    if tuning:
        for case in cases:
            tune(case)
        return
    report = {**environment(device), "instruction_set": instruction_set(), "rows": [], "elementwise": []}
    print(json.dumps({name: value for name, value in report.items() if name not in ("rows", "elementwise")}, indent=2))
    for case in cases + [case for case in decode_cases(device) if shape in case.name]:
        report["rows"].append(row_of(case, device))
        print(line(report["rows"][-1]), flush=True)
    if not report["rows"]:
        raise LongLLaVAError(f"--shape {shape!r}: no such shape")
    report["elementwise"] = elementwise(device) if not shape else []
    if output is None and not shape:
        output = Path(__file__).resolve().parent / "results" / f"int8-{device}.json"
    if output is not None:
        print(write_json(output, report))


if __name__ == "__main__":
    run(lambda: typer.run(int8), "int8")
