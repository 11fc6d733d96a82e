"""How fast each op's backends are, beside the kernels of others and the least time possible. Wrong is never timed.

    python benchmarks/kernels.py --device cpu
    python benchmarks/kernels.py --device cuda
    python benchmarks/kernels.py --device cpu --op selective_scan --case prefill --threads 1

One row per op, case, direction and backend: milliseconds (median of interleaved rounds), or skipped and why, or
wrong and by how much. On a CPU each row is compared with the pure torch loop; on a GPU with the kernel that the op's
authors published (mamba-ssm, causal-conv1d, in their own layout, or torch's), in the same rounds, and with the limit:
bytes at the speed of a copy, products at that of a large matrix product, exponentials at 16 a clock. On a GPU a long
call is judged in fp64 on some of its channels. Writes benchmarks/results/kernels-<device>.json with hardware, versions
and commit, anew after every direction of a case, and from a GPU a chart.
"""

import _environment  # noqa: F401

import json
import os
import statistics
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from _kernel_ops import BACKWARD, OPS, STEP, Op
from _kernel_timing import (
    LAYERS,
    ceilings,
    interleaved,
    judge_of_some_channels,
    prepare,
    wanting_gradients,
    worst_error,
)
from _options import check_target

from longllava.cli import run
from longllava.errors import LongLLaVAError
from longllava.files import write_atomic, write_json
from longllava.ops import native
from longllava.train.record import environment

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of the output's norm; bf16 rounds to 4e-3


def rows_of(op: Op, case: Any, direction: str, device: str, limits: dict[str, float]) -> list[dict[str, Any]]:
    """One row for each backend, in the op's order, then one for each peer."""
    args = op.arguments(case, device)
    head = {"op": op.name, "case": case.name, "direction": direction, "dtype": str(case.dtype).removeprefix("torch.")}
    rows: dict[str, dict[str, Any]] = {backend.name: {**head, "backend": backend.name} for backend in op.backends}
    calls: dict[str, Any] = {}
    truth, cut = None, lambda x: x
    if device != "cpu" and op.judge is not None:
        truth, cut = judge_of_some_channels(op.judge, args, direction)
    asked = wanting_gradients(args) if direction == BACKWARD else args
    for backend in reversed(op.backends):  # the judge first
        row, reason = rows[backend.name], backend.why_not(*asked)
        if reason is None and truth is not None and device != "cpu" and backend.name in ("blocked", "reference"):
            reason = "judges in fp64, on some channels"
        if reason is not None:
            row["skipped"] = reason
            continue
        call, shown = prepare(backend, args, direction)
        shown = [x if x is None else cut(x) for x in shown]
        truth = truth or shown
        if (error := worst_error(shown, truth)) > TOLERANCE[case.dtype]:
            row["wrong"] = error
            continue
        row["error"] = error
        calls[backend.name] = call
        del shown
    against = op.backends[-1].name
    for name, made in op.peers(case, direction, args).items():
        rows[name] = {**head, "backend": name}
        try:
            call = made()
            call()
        except RuntimeError as error:  # a kernel of torch's that does not take this call
            rows[name]["skipped"] = str(error).splitlines()[0]
        else:
            calls[name] = call
            against = name if against == op.backends[-1].name and "," not in name else against  # the first
    times = interleaved(calls, device)
    for name, measured in times.items():
        calls_of_one = LAYERS if direction == STEP else 1  # a graph holds one token's calls of every layer
        median = statistics.median(measured) / calls_of_one
        rows[name] |= {"ms": median * 1e3, "best_ms": min(measured) / calls_of_one * 1e3,
                       "rate": op.amount(case, direction) / median, "unit": op.unit}  # fmt: skip
        if against in times:
            ratios = (peer / own for peer, own in zip(times[against], measured, strict=True))
            rows[name] |= {"faster": statistics.median(ratios), "than": against}
        if limits and (limit := op.limit(case, direction, limits)) is not None:
            rows[name] |= {"limit_ms": limit[0], "limited_by": limit[1], "of_limit": limit[0] / (median * 1e3)}
    return list(rows.values())


def line(row: dict[str, Any]) -> str:
    head = f"{row['op']:15} {row['case']:22} {row['direction']:9} {row['backend']:22}"
    if "skipped" in row:
        return f"{head} skipped: {row['skipped']}"
    if "wrong" in row:
        return f"{head} wrong: {row['wrong']:.1e}"
    shown = f"{head} {row['ms']:10.4f} ms {row['rate']:10.3f} {row['unit']:19}"
    if "faster" in row:
        shown += f" {row['faster']:7.2f} x {row['than']}"
    if "of_limit" in row:
        shown += f", {row['of_limit']:.0%} of the limit ({row['limited_by']})"
    return shown


def chart(rows: list[dict[str, Any]], title: str, file: Any) -> None:
    """Time over the limit of every row that has one: 1 is as fast as this GPU can be."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [row for row in rows if "of_limit" in row]
    figure = Figure(figsize=(9, 1 + 0.24 * len(shown)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = [f"{row['op']} {row['case']} {row['direction']}: {row['backend']}" for row in shown][::-1]
    ours = {backend.name for op in OPS for backend in op.backends if backend.name != "upstream"}
    colours = ["tab:blue" if row["backend"].partition(",")[0] in ours else "tab:gray" for row in shown][::-1]
    bars = axes.barh(range(len(shown)), [1 / row["of_limit"] for row in shown][::-1], color=colours)
    axes.bar_label(bars, [f"{row['ms']:.3g} ms" for row in shown][::-1], padding=3, fontsize=7)
    axes.set_yticks(range(len(shown)), names, fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("time over the least possible (grey: others' kernels)")
    axes.margins(y=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=9)
    figure.savefig(file, format="png")


def kernels(
    device: Annotated[str, typer.Option(help="Where to measure: cpu or cuda.")] = "cpu",
    op: Annotated[str, typer.Option(help="Only ops whose name contains this.")] = "",
    case: Annotated[str, typer.Option(help="Only cases whose name contains this.")] = "",
    threads: Annotated[int, typer.Option(min=0, help="Threads; 0 takes torch's number.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option(help="JSON file; default kernels-<device>.json of benchmarks/results, none with --op or --case."),
    ] = None,
) -> None:
    """Time every backend of every op on the shapes that matter."""
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise LongLLaVAError(f"--device {device}: expected cpu, or cuda where torch sees a GPU")
    check_target(output)
    if threads:
        torch.set_num_threads(threads)
    report: dict[str, Any] = {
        **environment(device), "threads": torch.get_num_threads(), "load_before": os.getloadavg()[0],
        "instruction_set": native.isa() if native.why_not() is None else native.why_not(),
    }  # fmt: skip
    report["ceilings"] = limits = ceilings() if device == "cuda" else {}
    print(json.dumps(report, indent=2))
    report |= {"finished": False, "rows": (rows := [])}
    if output is None and not (op or case):
        output = Path(__file__).resolve().parent / "results" / f"kernels-{device}.json"
    for entry in OPS:
        for call in entry.cpu_cases if device == "cpu" else entry.gpu_cases:
            if op in entry.name and case in call.name:
                for direction in entry.directions(call):
                    for row in rows_of(entry, call, direction, device, limits):
                        print(line(row), flush=True)
                        rows.append(row)
                    if output is not None:
                        write_json(output, report)  # a run that is cut off keeps what it has
    if not rows:
        raise LongLLaVAError(f"--op {op!r} --case {case!r}: no such case")
    if output is None:
        return
    print(write_json(output, report | {"finished": True}))
    if device == "cuda":
        title = f"{report['device']}, torch {report['torch']}"
        print(write_atomic(output.with_suffix(".png"), lambda file: chart(rows, title, file)))


if __name__ == "__main__":
    run(lambda: typer.run(kernels), "kernels")
