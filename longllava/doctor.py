"""What this machine has, what each op uses here and why nothing faster, and which optional packages work.

Every backend that says it can run is run once on an example call and compared with the reference. Examples are small,
but on a GPU those of ops that choose by size are a prompt's: few tokens would name what a prompt does not use.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from longllava.errors import BackendError
from longllava.inputs.media import n_cores
from longllava.probes import Verdict, try_all
from longllava.version import __version__

if TYPE_CHECKING:
    import torch

    from longllava.ops.dispatch import Backend

Make = Callable[..., "torch.Tensor"]


def scan_call(make: Make) -> tuple:
    """Two rows of 33 tokens, 64 channels, 16 states; the arguments as selective_scan's backends take them."""
    u, delta, z = make(2, 33, 64), make(2, 33, 64), make(2, 33, 64)
    B, C = make(2, 33, 16), make(2, 33, 16)
    return u, delta, -make(64, 16).exp(), B, C, make(64), z, make(64), True, make(2, 64, 16), None


def conv_call(make: Make, tokens: int = 33) -> tuple:
    return make(2, tokens, 64), make(64, 4), make(64), make(2, 3, 64), None, "silu"


def attention_call(make: Make, queries: int = 33, heads: int = 8, shared: int = 2) -> tuple:
    """Queries after 7 older keys, heads that share keys and values."""
    k, v = (make(1, queries + 7, shared, 64) for _ in range(2))
    return make(1, queries, heads, 64), k, v, 0.125, True, None, None, False


def int8_call(make: Make, rows: int = 33, inputs: int = 64, outputs: int = 40) -> tuple:
    """Rows that are quantised on the way."""
    x, bias, scale = make(rows, inputs), make(outputs), make(outputs).abs().float()
    return x, make(outputs, inputs).mul(30).clamp(-127, 127).char(), scale, bias, None, None, "dynamic", x.dtype


def activated_call(make: Make, rows: int = 33, inputs: int = 64, outputs: int = 40) -> tuple:
    return make(rows, inputs), make(outputs, inputs), make(outputs), "quick_gelu"


def pixel_call(make: Make) -> tuple:
    pixels, std = make(2, 3, 24, 24).mul(50).byte(), make(3).abs() + 1
    return pixels, make(3), std, make(32, 3, 8, 8), make(32), 4, 2, True


CALLS: dict[str, Callable[[Make], tuple]] = {
    "selective_scan": scan_call,
    "causal_conv1d": conv_call,
    "attention": attention_call,
    "int8_linear": int8_call,
    "quantize_rows": lambda make: (make(33, 64), None, False),
    "rotate_rows": lambda make: (make(33, 64),),
    "rms_norm": lambda make: (make(33, 64), make(64), 1e-6, make(33, 64), False, make(1).dtype),
    "rms_norm_parts": lambda make: (make(33, 64), (make(32), make(16), make(16)), 1e-6),
    "swiglu": lambda make: (make(33, 64), make(33, 64), None, False, False),
    "few_rows_linear": lambda make: (make(3, 64), make(40, 64), make(40)),
    "add_layer_norm": lambda make: (make(33, 64), make(33, 64), make(64), make(64), 1e-5, False),
    "activation": lambda make: (make(33, 64), "quick_gelu"),
    "linear_activated": activated_call,
    "conv3x3": lambda make: (make(2, 32, 8, 8), make(32, 32, 3, 3), make(32), make(2, 32, 8, 8), True),
    "pixel_conv": pixel_call,
}
# A prompt's, in bf16, as narrow as the kernels take it: the reference runs it too.
PROMPT_CALLS: dict[str, Callable[[Make], tuple]] = {
    "causal_conv1d": lambda make: conv_call(make, 4096),
    "attention": lambda make: attention_call(make, 4096, 1, 1),
    "int8_linear": lambda make: int8_call(make, 4096, 128, 1024),
    "linear_activated": lambda make: activated_call(make, 4096, 64, 4096),
}
# Where an op's backends are, if not in the folder of its name as BACKENDS.
PLACES = {
    "quantize_rows": ("int8_linear", "QUANTIZE_BACKENDS"),
    "rotate_rows": ("int8_linear", "ROTATE_BACKENDS"),
    "rms_norm": ("fused", "RMS_NORM_BACKENDS"),
    "rms_norm_parts": ("fused", "RMS_NORM_PARTS_BACKENDS"),
    "swiglu": ("fused", "SWIGLU_BACKENDS"),
    "few_rows_linear": ("few_rows", "BACKENDS"),
    "add_layer_norm": ("vision", "LAYER_NORM_BACKENDS"),
    "activation": ("vision", "ACTIVATION_BACKENDS"),
    "linear_activated": ("vision", "LINEAR_ACTIVATED_BACKENDS"),
}


def examine() -> dict[str, Any]:
    """Everything `show` prints, as values that JSON can hold."""
    report: dict[str, Any] = {"longllava": __version__, "machine": machine(), "ops": {}}
    try:
        report["machine"] |= torch_facts()
        report["ops"] = {op: examine_op(op) for op in CALLS}
    except (ImportError, OSError) as error:  # a torch that is missing, or lacks a library of the system
        report["machine"]["torch"] = f"cannot be imported: {error}; pip install --force-reinstall torch"
    return {**report, "packages": packages(try_all())}


def machine() -> dict[str, Any]:
    return {
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": platform.platform(),
        "cores": n_cores(),
    }


def torch_facts() -> dict[str, Any]:
    import torch

    from longllava.ops import native

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "gpu": ", ".join(gpus) or "none",
        "compiled kernels": native.why_not() or compiled_form(),
    }


def compiled_form() -> str:
    from longllava.ops import native

    return f"work, in their {native.isa()} form, int8 and bf16 products {'by' if native.uses_amx() else 'without'} AMX"


def examine_op(op: str) -> dict[str, Any]:
    """uses: the backend chosen for the example call, or why there is none; forced: what LONGLLAVA_<OP> says;
    backends: each one's answer: that it runs, with its difference from the reference, or why not."""
    import torch

    from longllava.ops.dispatch import choose

    call = example(op, "cuda" if torch.cuda.is_available() else "cpu")
    folder, name = PLACES.get(op, (op, "BACKENDS"))
    backends = getattr(importlib.import_module(f"longllava.ops.{folder}"), name)
    truth = backends[-1].run(*copied(call))
    try:
        uses = choose(op, backends, *call).name
    except BackendError as error:
        uses = str(error)
    answers = {backend.name: examine_backend(backend, call, truth) for backend in backends}
    return {"uses": uses, "forced": os.environ.get(f"LONGLLAVA_{op.upper()}"), "backends": answers}


def example(op: str, device: str) -> tuple:
    """The arguments of an example call; on a GPU those of PROMPT_CALLS where there are any."""
    import torch

    generator = torch.Generator().manual_seed(0)
    prompt = op in PROMPT_CALLS and device != "cpu"
    dtype = torch.bfloat16 if prompt else torch.float32
    calls = PROMPT_CALLS if prompt else CALLS
    return calls[op](lambda *shape: torch.randn(*shape, generator=generator).to(device, dtype))


def copied(call: tuple) -> tuple:
    """An op may write its result over its first argument."""
    return call[0].clone(), *call[1:]


def examine_backend(backend: Backend, call: tuple, truth: Any) -> str:
    if (reason := backend.why_not(*call)) is not None:
        return reason
    try:
        got = backend.run(*copied(call))
    except Exception as error:  # whatever it is, the doctor's work is to say it
        return f"says it can run, and fails: {type(error).__name__}: {error}"
    return f"runs, differs from the reference by {difference(got, truth):.0e}"


def difference(got: Any, truth: Any) -> float:
    """Largest absolute difference over the outputs, relative to the truth's largest entry. An output that
    was not asked for is None or empty."""
    pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (got, truth)))
    given = [(a.double(), b.double()) for a, b in pairs if a is not None and b is not None and a.numel()]  # int8 wraps
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in given)


def packages(verdicts: list[Verdict]) -> list[dict[str, str]]:
    return [
        {
            "package": v.probe.package,
            "serves": v.probe.serves,
            "state": v.state,
            "why": v.why,
            "mend": v.probe.mend,
        }
        for v in verdicts
    ]


def show(report: dict[str, Any], *, as_json: bool = False) -> None:
    """Print `examine()`'s report as three tables, or as one JSON object."""
    if as_json:
        print(json.dumps(report, indent=2))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    about = Table(title=f"longllava {report['longllava']}", title_justify="left", show_header=False)
    for name, value in report["machine"].items():
        about.add_row(name, escape(str(value)))
    console.print(about)

    table = Table("op", "uses", "backend", "its answer", title="ops", title_justify="left")
    for op, found in report["ops"].items():
        uses = found["uses"] + (f" (LONGLLAVA_{op.upper()})" if found["forced"] else "")
        for i, (backend, answer) in enumerate(found["backends"].items()):
            table.add_row(*((op, escape(uses)) if i == 0 else ("", "")), backend, escape(answer))
        table.add_section()
    console.print(table)

    table = Table("package", "serves", "state", "to mend", title="optional packages", title_justify="left")
    for row in report["packages"]:
        state = row["state"] + (f": {row['why']}" if row["why"] else "")
        mend = "" if row["state"] == "works" else row["mend"]
        table.add_row(row["package"], row["serves"], escape(state), escape(mend))
    console.print(table)
