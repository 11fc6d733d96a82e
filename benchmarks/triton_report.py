"""What ptxas makes of the Triton kernels, without a GPU: registers, spills, shared memory, instructions of the loop.

    python benchmarks/triton_report.py --arch 90
    python benchmarks/triton_report.py --arch 80 --call scan --kernel forward

Every backend is called as a model would call it, on tensors without memory; each launch is compiled instead of made.
One row a kernel: what its busiest loop (or, without one, all of it) issues a warp, and how much of that is
exponentials, products, loads. These are counts, not times: a scheduler issues one instruction a clock and begins one
exponential of 32 lanes every 8, so 8 slots an exponential is where both limits meet. Needs triton on Linux, whose
wheel brings ptxas and cuobjdump, and no GPU. Writes benchmarks/results/triton-sm<arch>.json.
"""

import _environment  # noqa: F401

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from _options import check_target

from longllava.cli import run
from longllava.errors import LongLLaVAError
from longllava.files import write_json
from longllava.ops import triton_support
from longllava.ops.attention import triton as attention
from longllava.ops.causal_conv1d import triton as conv
from longllava.ops.fused import triton as fused
from longllava.ops.int8_linear import triton as int8
from longllava.ops.selective_scan import triton as scan
from longllava.ops.selective_scan import triton_launch as launch
from longllava.ops.vision import triton as vision
from longllava.version import __version__

PROCESSORS = 132  # of an H100: decides how many spans a short width is cut into
FAMILIES = {
    "exponentials and other special": ("MUFU",),
    "tensor core": ("HMMA", "HGMMA", "WGMMA", "IMMA", "IGMMA"),
    "products and sums": ("FFMA", "FMUL", "FADD"),
    "shuffles": ("SHFL",),
    "global loads and stores": ("LDG", "STG"),
    "shared loads and stores": ("LDS", "STS", "LDSM", "STSM", "LDGSTS"),
    "barriers": ("BAR",),
}


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def scan_arguments(length: int, channels: int, packed: bool = False) -> tuple[Any, ...]:
    fp32 = torch.float32
    u, z = empty(1, length, 2 * channels).chunk(2, -1)
    seq_idx = empty(1, length, dtype=torch.int32) if packed else None
    return (
        u, empty(1, length, channels), empty(channels, 16, dtype=fp32), empty(1, length, 16), empty(1, length, 16),
        empty(channels, dtype=fp32), z, empty(channels, dtype=fp32), True, empty(1, channels, 16, dtype=fp32), seq_idx,
    )  # fmt: skip


def scan_backward(u: torch.Tensor, *rest: Any) -> None:
    *tensors, _, seq_idx = rest
    saved = empty(1, -(-u.shape[1] // launch.CHUNK), u.shape[2], 16, dtype=torch.float32)
    launch.gradients(torch.empty_like(u), None, u, *tensors, seq_idx, saved)


def conv_arguments(length: int, channels: int, packed: bool = False) -> tuple[Any, ...]:
    seq_idx = empty(1, length, dtype=torch.int32) if packed else None
    x = empty(1, length, 2 * channels)[..., :channels]
    return x, empty(channels, 4, dtype=torch.float32), empty(channels), empty(1, 3, channels), seq_idx, True


def conv_forward(x: torch.Tensor, *rest: Any) -> None:
    conv.compute(x, *rest, empty(1, 3, x.shape[2]))


def conv_backward(x: torch.Tensor, *rest: Any) -> None:
    conv.gradients(torch.empty_like(x), None, x, *rest)


def attend(n_queries: int, n_keys: int, n_heads: int, n_groups: int, head_dim: int, packed: bool = False,
           dtype: torch.dtype = torch.bfloat16) -> None:  # fmt: skip
    k, v = (empty(1, n_keys, n_groups, head_dim, dtype=dtype) for _ in "kv")
    seq = (empty(1, n, dtype=torch.int32) if packed else None for n in (n_queries, n_keys))
    attention._forward(empty(1, n_queries, n_heads, head_dim, dtype=dtype), k, v, head_dim**-0.5, True, *seq)


def int8_product(rows: int, n_inputs: int, n_outputs: int, mode: str = "dynamic", experts: int = 0,
                 dtype: torch.dtype = torch.bfloat16) -> None:  # fmt: skip
    """Rows as a layer gets them: quantised first in mode "dynamic". The tiles are those of an H100."""
    several = (experts,) if experts else ()
    weight = empty(*several, n_outputs, n_inputs, dtype=torch.int8)
    scale = empty(*several, n_outputs, dtype=torch.float32)
    offsets = empty(experts + 1, dtype=torch.int32) if experts else None
    int8.run(empty(rows, n_inputs, dtype=dtype), weight, scale, None, None, offsets, mode, dtype)


def norm_and_swiglu(quantized: bool) -> None:
    x, gate = empty(8192, 4096), empty(8192, 14336)
    fused.rms_norm(x, empty(4096), 1e-6, x, quantized)
    fused.swiglu(gate, gate, None, quantized)


def rotations() -> None:
    """What out_proj and down_proj read: quantised, and for one token as floats."""
    gate = empty(8192, 14336)
    int8.quantize_rows(empty(8192, 8192), None, True)
    fused.swiglu(gate, gate, None, True, True)
    int8.rotate_rows(empty(1, 8192))


def encoder_passes(quantized: bool) -> None:
    """CLIP-L's, 64 pictures at a time."""
    x, hidden, up = empty(64, 577, 1024), empty(64, 577, 4096), empty(4096, 1024)
    vision.add_layer_norm(x, x, empty(1024), empty(1024), 1e-5, quantized)
    for activation in ("quick_gelu", "gelu_tanh", "gelu"):
        (vision.activated_rows if quantized else vision.activate_)(hidden, activation)
        if not quantized:
            vision.linear_activated(x, up, up[:, 0], activation)


CALLS: dict[str, Callable[[], Any]] = {
    "scan 9B, 36,000 tokens": lambda: scan.run(*scan_arguments(36_000, 8192)),
    "scan 9B, packed": lambda: scan.run(*scan_arguments(4096, 8192, packed=True)),
    "scan 9B, one token": lambda: scan.run(*scan_arguments(1, 8192)),
    "scan nano, 2,048 tokens": lambda: scan.run(*scan_arguments(2048, 512)),
    "scan 9B, backward": lambda: scan_backward(*scan_arguments(4096, 8192)),
    "scan nano, packed, backward": lambda: scan_backward(*scan_arguments(4096, 512, packed=True)),
    "conv 9B": lambda: conv_forward(*conv_arguments(36_000, 8192)),
    "conv 9B, packed": lambda: conv_forward(*conv_arguments(4096, 8192, packed=True)),
    "conv 9B, one token": lambda: conv_forward(*conv_arguments(1, 8192)),
    "conv nano, packed": lambda: conv_forward(*conv_arguments(2048, 512, packed=True)),
    "conv nano, backward": lambda: conv_backward(*conv_arguments(2048, 512)),
    "conv 9B, backward": lambda: conv_backward(*conv_arguments(4096, 8192)),
    "conv 9B, packed, backward": lambda: conv_backward(*conv_arguments(4096, 8192, packed=True)),
    "attention 9B, 8,192 of 36,000 tokens": lambda: attend(8192, 36_000, 32, 8, 128),
    "attention 9B, packed": lambda: attend(4096, 4096, 32, 8, 128, packed=True),
    "attention 9B, one token": lambda: attend(1, 36_000, 32, 8, 128),
    "attention nano, 2,048 tokens": lambda: attend(2048, 36_000, 4, 2, 64),
    "int8 9B, gate and up": lambda: int8_product(8192, 4096, 28672),
    "int8 9B, down": lambda: int8_product(8192, 14336, 4096),
    "int8 53B, experts' gate and up": lambda: int8_product(16384, 4096, 28672, experts=16),
    "int8 9B, weights alone, one token": lambda: int8_product(1, 4096, 28672, "weight_only"),
    "int8 9B, weights alone, 64 tokens": lambda: int8_product(64, 4096, 28672, "weight_only"),
    "norm and SwiGLU 9B": lambda: norm_and_swiglu(False),
    "norm and SwiGLU 9B, int8 output": lambda: norm_and_swiglu(True),
    "rotated rows 9B": rotations,
    "encoder CLIP-L": lambda: encoder_passes(False),
    "encoder CLIP-L, int8 output": lambda: encoder_passes(True),
    "attention nano, one token": lambda: attend(1, 36_000, 4, 2, 64),
    "attention 9B in wide numbers": lambda: attend(2048, 36_000, 32, 8, 128, dtype=torch.float32),
    "int8 of 128 inputs in wide numbers": lambda: int8_product(8192, 128, 4096, dtype=torch.float32),
    "int8 9B, gate and up in wide numbers": lambda: int8_product(8192, 4096, 28672, dtype=torch.float32),
}


@contextmanager
def recorded(seen: list[tuple[Any, dict[str, Any]]]) -> Iterator[None]:
    """Launches inside are noted as (kernel, arguments), not made."""
    from triton.runtime.jit import JITFunction

    honest = JITFunction.run, triton_support.n_processors

    def note(kernel: Any, *positional: Any, grid: Any, warmup: bool, **named: Any) -> None:
        names = [parameter.name for parameter in kernel.params]
        seen.append((kernel, dict(zip(names, positional)) | named))

    JITFunction.run, triton_support.n_processors = note, lambda device: PROCESSORS
    try:
        yield
    finally:
        JITFunction.run, triton_support.n_processors = honest


def compiled(kernel: Any, arguments: dict[str, Any], arch: int) -> Any:
    """The kernel as a launch with these arguments would compile it: integers of 1 are constants, and pointers and
    integers that 16 divides are known to be so."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    short = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int8": "i8", "int32": "i32"}
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = arguments.pop(parameter.name)
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + short[str(value.dtype).removeprefix("torch.")]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif hasattr(value, "block_shape"):  # a TensorDescriptor
            element = short[str(value.base.dtype).removeprefix("torch.")]
            signature[parameter.name] = f"tensordesc<{element}{list(value.block_shape)}>"
        else:
            signature[parameter.name] = "fp32" if type(value) is float else "i64" if abs(value) >= 2**31 else "i32"
            if type(value) is int and value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=arguments)


def cuobjdump(*options: str) -> str:
    import triton

    bundled = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    tool = shutil.which("cuobjdump") or (str(bundled) if bundled.is_file() else None)
    if tool is None:
        raise LongLLaVAError("cuobjdump is neither on PATH nor in triton's wheel; pip install nvidia-cuda-cuobjdump")
    return subprocess.run([tool, *options], capture_output=True, text=True, check=True).stdout


def instructions(sass: str) -> list[tuple[int, str, str]]:
    """(address, name, operands) of each instruction; a branch to itself is padding after the end."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)([^;]*);", sass)
    return [(int(place, 16), name, rest) for place, name, rest in found if name != "NOP"]


def loops(sass: str) -> list[Counter[str]]:
    """Instructions by name of each innermost loop: between the target of a branch back and the branch."""
    code = instructions(sass)
    ranges = []
    for place, name, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest) if name == "BRA" else None
        if target and int(target[1], 16) < place:
            ranges.append((int(target[1], 16), place))
    inner = [a for a in ranges if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in ranges)]
    return [Counter(name for place, name, _ in code if low <= place <= high) for low, high in inner if low < high]


def row(call: str, kernel: Any, arguments: dict[str, Any], arch: int) -> dict[str, Any]:
    binary = compiled(kernel, dict(arguments), arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = cuobjdump("-res-usage", file.name)
        sass = cuobjdump("-sass", file.name)
    facts = {name: int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")}
    out = {"call": call, "kernel": kernel.__name__, "warps": binary.metadata.num_warps, "registers": facts["REG"]}
    out |= {"spilled_bytes": facts["STACK"] + facts["LOCAL"], "shared_bytes": binary.metadata.shared}
    # the loop that most is done in; of a loop and its copy for a remainder, the shorter
    inner = loops(sass) or [Counter(name for _, name, _ in instructions(sass))]
    busiest = max(inner, key=lambda n: (sum(n[name] for name in FAMILIES["tensor core"]), n["MUFU"], -n.total()))
    total, special = busiest.total(), busiest["MUFU"]
    counts = {family: sum(busiest[name] for name in names) for family, names in FAMILIES.items()}
    out |= {"code": "loop" if loops(sass) else "whole", "instructions": total, **counts}
    out["others"] = total - sum(counts.values())
    if special and "scan" in call and kernel.__name__ != "join":
        elements = arguments["BLOCK"] * arguments["K"] * arguments["N"] // (32 * out["warps"])  # a tile, each lane
        elements *= special // elements  # tiles in a loop that was unrolled
        out["slots_per_state_element"] = round(total / elements, 2) if elements else None
        out["slots_per_exponential"] = round(total / special, 2)
    return out


def report(
    arch: Annotated[int, typer.Option(help="Compute capability without its point: 80, 90.")] = 90,
    call: Annotated[str, typer.Option(help="Only calls whose name contains this.")] = "",
    kernel: Annotated[str, typer.Option(help="Only kernels whose name contains this.")] = "",
    output: Annotated[
        Path | None,
        typer.Option(help="JSON file; default benchmarks/results/triton-sm<arch>.json, none with --call or --kernel."),
    ] = None,
) -> None:
    """Compile the Triton kernels ahead of time and count what they take."""
    if triton_support.missing() is not None:
        raise LongLLaVAError(str(triton_support.missing()))
    import triton

    check_target(output)
    rows = []
    for name, make in CALLS.items():
        launches: list[tuple[Any, dict[str, Any]]] = []
        if call in name:
            with recorded(launches):
                make()
        for launched, arguments in launches:
            if kernel in launched.__name__:
                rows.append(row(name, launched, arguments, arch))
                print(", ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    if not rows:
        raise LongLLaVAError(f"--call {call!r} --kernel {kernel!r}: no such kernel")
    if output is None and (call or kernel):
        return
    if output is None:
        output = Path(__file__).resolve().parent / "results" / f"triton-sm{arch}.json"
    print(write_json(output, {"triton": triton.__version__, "longllava": __version__, "arch": arch, "rows": rows}))


if __name__ == "__main__":
    run(lambda: typer.run(report), "triton_report")
