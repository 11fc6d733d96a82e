"""Whether the kernels are right on this GPU, at lengths that tests on a CPU cannot reach.

    python benchmarks/kernel_checks.py
    python benchmarks/kernel_checks.py --quick      # small shapes only, for compute-sanitizer

Every backend of the scan and the convolution that runs here, at 8,192 channels as LongLLaVA-9B has them (the rows of x
lie 16,384 elements apart: at 270,000 tokens offsets pass 2^32):

- outputs and state at lengths from 1 to 270,000, bf16 and fp32, packed rows too, against fp64: no more than twice as
  wrong as the reference in the same dtype, with a slack of 1e-6 in fp32 (beyond 4,096 tokens for 64 of the channels,
  which do not know each other)
- gradients of all inputs at lengths to 2,049: no more than three times as wrong
- pieces of 2,048 tokens with the state carried: the same as the whole
- 20 runs of forward and backward: the same bits
- int8 rows of the scan, quantised by the kernel itself too, 20 times: the bits of the quantisation of its y
- int8 products of many rows, 20 times: the bits that exact sums give

Writes benchmarks/results/kernel-checks-<device>.json. Exit code 1 when a line fails.
"""

import _environment  # noqa: F401

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from _kernel_timing import grad_of, judge_of_some_channels, prepare, wanting_gradients, worst_error
from _options import check_target

from longllava.cli import run
from longllava.errors import LongLLaVAError
from longllava.files import write_json
from longllava.ops import causal_conv1d, int8_linear, selective_scan
from longllava.ops.causal_conv1d import cases as conv_cases
from longllava.ops.dispatch import Backend
from longllava.ops.int8_linear import quantize_rows
from longllava.ops.selective_scan import cases as scan_cases
from longllava.ops.selective_scan import cuda_launch
from longllava.train.record import environment

LENGTHS = (1, 63, 2047, 2049, 36_000, 147_000, 270_000)
WHOLE = 4096  # tokens up to which all channels are judged, by the reference
SLACK = {torch.float32: 1e-6, torch.bfloat16: 1e-5, torch.float16: 1e-5}
RUNS = 20
Row = dict[str, Any]


def doubled(args: Sequence[Any]) -> list[Any]:
    return [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]


def forward_rows(name: str, op: Any, case: Any, backends: Sequence[Backend]) -> Iterator[Row]:
    """Outputs against fp64, and against what the dtype alone costs."""
    args = case.inputs(device="cuda")
    judge = op.reference.run
    cut: Callable[[Any], Any] = lambda x: x  # noqa: E731
    with torch.no_grad():
        if case.length <= WHOLE:
            truth, floor = judge(*doubled(args)), judge(*args)
        else:
            judge = op.blocked.run if hasattr(op, "blocked") else judge
            truth, cut = judge_of_some_channels(judge, args, "forward")
            floor = [x.to(case.dtype) if i == 0 else x.float() for i, x in enumerate(truth)]
        bounds = [2 * worst_error([f], [t]) + SLACK[case.dtype] for f, t in zip(floor, truth, strict=True)]
        for backend in backends:
            row = {"op": name, "what": f"forward, {case.name}", "backend": backend.name}
            if (reason := backend.why_not(*args)) is not None:
                yield row | {"skipped": reason}
                continue
            got = [cut(x) for x in backend.run(*args)]
            errors = [worst_error([g], [t]) for g, t in zip(got, truth, strict=True)]
            yield row | {"error": errors, "allowed": bounds, "right": all(e <= b for e, b in zip(errors, bounds))}


def gradient_rows(name: str, op: Any, case: Any, backends: Sequence[Backend]) -> Iterator[Row]:
    args = case.inputs(device="cuda")
    grad_y = grad_of(args[0])

    def gradients(run: Callable[..., Any], given: Sequence[Any]) -> list[torch.Tensor]:
        given = wanting_gradients(given)
        y, state = run(*given)
        leaves = [x for x in given if isinstance(x, torch.Tensor) and x.requires_grad]
        wanted = [grad_y.to(y.dtype), torch.ones_like(state)]
        return list(torch.autograd.grad([y, state], leaves, wanted))

    truth, floor = gradients(op.reference.run, doubled(args)), gradients(op.reference.run, args)
    # sums over 8,192 channels or many tokens of bf16 numbers cost the reference less than their rounding may cost
    bounds = [3 * worst_error([f], [t]) + 5 * SLACK[case.dtype] for f, t in zip(floor, truth, strict=True)]
    for backend in backends:
        row = {"op": name, "what": f"gradients, {case.name}", "backend": backend.name}
        if (reason := backend.why_not(*wanting_gradients(args))) is not None or backend.name == "upstream":
            yield row | {"skipped": reason or "has no gradient of the state"}
            continue
        errors = [worst_error([g], [t]) for g, t in zip(gradients(backend.run, args), truth, strict=True)]
        yield row | {"error": errors, "allowed": bounds, "right": all(e <= b for e, b in zip(errors, bounds))}


def pieces_rows(name: str, case: Any, backends: Sequence[Backend], names: Sequence[str]) -> Iterator[Row]:
    """The state carried over pieces of 2,048 tokens."""
    args = replace(case, state=True).inputs(device="cuda")
    along_time = ("u", "delta", "B", "C", "z", "x")
    for backend in backends:
        row = {"op": name, "what": f"pieces of 2,048, {case.name}", "backend": backend.name}
        if (reason := backend.why_not(*args)) is not None:
            yield row | {"skipped": reason}
            continue
        with torch.no_grad():
            whole, end = backend.run(*args)
            parts, state = [], args[names.index("state")]
            for start in range(0, case.length, 2048):
                cut = [state if n == "state" else x[:, start : start + 2048] if n in along_time else x
                       for n, x in zip(names, args, strict=True)]  # fmt: skip
                part, state = backend.run(*cut)
                parts.append(part)
            error = worst_error([torch.cat(parts, 1), state], [whole, end])
        yield row | {"error": error, "allowed": 1e-4, "right": error <= 1e-4}


def repeat_rows(name: str, case: Any, backends: Sequence[Backend], direction: str) -> Iterator[Row]:
    args = case.inputs(device="cuda")
    asked = wanting_gradients(args) if direction == "backward" else args
    for backend in backends:
        row = {"op": name, "what": f"{RUNS} runs {direction}, {case.name}", "backend": backend.name}
        if (reason := backend.why_not(*asked)) is not None:
            yield row | {"skipped": reason}
            continue
        call, first = prepare(backend, args, direction)
        same = True
        for _ in range(RUNS - 1):
            same &= all(a is b or torch.equal(a, b) for a, b in zip(call(), first, strict=True))
        yield row | {"right": same}


def int8_rows(case: Any, device: str = "cuda") -> Iterator[Row]:
    """The kernel whose blocks wait for each other must give what a pass over its y gives, in every run."""
    args = case.inputs(device=device)
    backend = next(b for b in selective_scan.BACKENDS if b.name == "cuda")
    u, delta, _, B, C, _, z, *_ = args
    for way in ("maxima", "int8"):
        row = {"op": "selective_scan", "what": f"int8 rows by {way}, {case.name}", "backend": backend.name}
        if (reason := backend.why_not(*args)) is not None:
            yield row | {"skipped": reason}
            continue
        if way == "int8" and not cuda_launch.writes_int8(u, delta, B, C, z, args[-1]):
            yield row | {"skipped": "its blocks do not fit on the device together"}
            continue
        with torch.no_grad(), patch.object(cuda_launch, "EPILOGUE", way):
            y, end = backend.run(*args)
            truth = quantize_rows(y)
            same = True
            for _ in range(RUNS):
                rows, state = backend.run_quantized(*args)  # type: ignore[misc]
                same &= torch.equal(rows.values, truth.values) and torch.equal(rows.scale, truth.scale)
                same &= torch.equal(state, end)
        yield row | {"right": same}


def product_rows(n_rows: int, n_outputs: int, n_inputs: int, bias: bool, device: str = "cuda") -> Iterator[Row]:
    """Sums in fp64 are exact; scaled in fp32, then times the row's scale, plus bias, in one rounding."""
    name = f"int8 {n_rows:,} x {n_outputs:,} x {n_inputs:,}{', bias' if bias else ''}"
    generator = torch.Generator(device).manual_seed(0)
    x, weight = (torch.randint(-127, 128, (n, n_inputs), generator=generator, device=device).to(torch.int8)
                 for n in (n_rows, n_outputs))  # fmt: skip
    x_scale, scale, bias_N = (torch.rand(n, generator=generator, device=device) / 100 + 1e-3
                              for n in (n_rows, n_outputs, n_outputs))  # fmt: skip
    args = (x, weight, scale, bias_N if bias else None, x_scale, None, "dynamic", torch.bfloat16)
    y = ((x.double() @ weight.double().T).float() * scale).double() * x_scale.double()[:, None]
    truth = (y + bias_N.double() if bias else y).float().bfloat16()
    for backend in ours(int8_linear.BACKENDS):
        row = {"op": "int8_linear", "what": f"{RUNS} runs, {name}", "backend": backend.name}
        if (reason := backend.why_not(*args)) is not None:
            yield row | {"skipped": reason}
            continue
        yield row | {"right": all(torch.equal(backend.run(*args), truth) for _ in range(RUNS))}


def ours(backends: Sequence[Backend]) -> list[Backend]:
    return [backend for backend in backends if backend.name in ("cuda", "triton")]


def all_rows(quick: bool, wanted: str) -> Iterator[Row]:
    scans = [b for b in selective_scan.BACKENDS if b.name not in ("cpu", "blocked", "reference")]
    convolutions = [b for b in causal_conv1d.BACKENDS if b.name not in ("cpu", "reference")]
    scan_case, conv_case = scan_cases.GPU_BENCHMARKS[0], conv_cases.GPU_BENCHMARKS[0]
    if quick:
        if wanted in "selective_scan":
            for case in scan_cases.CASES:
                yield from forward_rows("selective_scan", selective_scan, case, ours(scans))
            small = replace(scan_case, name="65 x 150", length=65, channels=150, batch=2, packing="wild")
            yield from gradient_rows("selective_scan", selective_scan, small, ours(scans))
            yield from int8_rows(replace(scan_case, name="200 x 256", length=200, channels=256))
        if wanted in "causal_conv1d":
            for case in conv_cases.CASES:
                yield from forward_rows("causal_conv1d", causal_conv1d, case, ours(convolutions))
        if wanted in "int8_linear":
            yield from product_rows(1500, 3000, 144, bias=True)
        return
    if wanted in "int8_linear":
        yield from product_rows(8191, 3072, 1024, bias=True)
        yield from product_rows(1001, 4104, 14336, bias=False)
    for length in (2, 2049, 36_000, 147_000) if wanted in "selective_scan" else ():
        yield from int8_rows(replace(scan_case, name=f"{length:,}", length=length, state=True))
    for name, op, plain, backends, names in (
        ("selective_scan", selective_scan, scan_case, scans, scan_cases.NAMES),
        ("causal_conv1d", causal_conv1d, conv_case, convolutions, conv_cases.NAMES),
    ):
        if wanted not in name:
            continue
        for length in LENGTHS:
            case = replace(plain, name=f"{length:,}", length=length)
            yield from forward_rows(name, op, case, backends)
            if length <= WHOLE:
                exact = replace(case, name=f"{length:,} fp32, state", dtype=torch.float32, state=True)
                yield from forward_rows(name, op, exact, backends)
        packed = replace(plain, name="2,049 wild, 2 rows", length=2049, batch=2, packing="wild", state=True)
        yield from forward_rows(name, op, packed, backends)
        for length in (1, 193, 2049):
            for dtype in (torch.float32, torch.bfloat16):
                case = replace(plain, name=f"{length:,} {dtype}".replace("torch.", ""), length=length, dtype=dtype)
                yield from gradient_rows(name, op, replace(case, state=True), backends)
        narrow = replace(packed, name="2,049 x 512, wild", channels=512)
        yield from gradient_rows(name, op, narrow, backends)
        yield from pieces_rows(name, replace(plain, name="36,864", length=36_864), backends, names)
        yield from repeat_rows(name, replace(plain, name="36,000", length=36_000), backends, "forward")
        yield from repeat_rows(name, replace(plain, name="4,096", length=4096), backends, "backward")


def line(row: Row) -> str:
    verdict = f"skipped: {row['skipped']}" if "skipped" in row else "right" if row["right"] else "WRONG"
    errors = row.get("error", [])
    shown = ", ".join(f"{e:.1e}" for e in (errors if isinstance(errors, list) else [errors]))
    return f"{row['op']:15} {row['what']:40} {row['backend']:9} {verdict} {shown}"


def checks(
    quick: Annotated[bool, typer.Option(help="Only small shapes, of every kind.")] = False,
    op: Annotated[str, typer.Option(help="Only ops whose name contains this.")] = "",
    output: Annotated[
        Path | None,
        typer.Option(help="JSON file; default kernel-checks[-OP]-cuda.json of benchmarks/results, none with --quick."),
    ] = None,
) -> None:
    """Compare every kernel with fp64 on this GPU."""
    if not torch.cuda.is_available():
        raise LongLLaVAError("torch sees no GPU here; tests/ops checks the kernels without one")
    check_target(output)
    if output is None and not quick:
        name = f"kernel-checks-{op}-cuda.json" if op else "kernel-checks-cuda.json"
        output = Path(__file__).resolve().parent / "results" / name
    rows: list[Row] = []
    report = {**environment(), "finished": False, "rows": rows}
    for row in all_rows(quick, op):
        rows.append(row)
        print(line(row), flush=True)
        if output is not None:
            write_json(output, report)  # a run that is cut off keeps what it has
    if not rows:
        raise LongLLaVAError(f"--op {op!r}: no such op; there are selective_scan, causal_conv1d and int8_linear")
    wrong = sum(not row.get("right", True) for row in rows)
    print(f"{len(rows)} lines, {wrong} wrong, {sum('skipped' in row for row in rows)} skipped")
    if output is not None:
        print(write_json(output, report | {"finished": True}))
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    run(lambda: typer.run(checks), "kernel_checks")
