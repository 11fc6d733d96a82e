"""Int8 linear layers on a Hopper GPU by a kernel of its tensor cores' own instructions (csrc/int8_linear_sm90a*).

Mode "dynamic" without experts, many rows. Rows are quantised by Triton's kernel, where they are not yet. Scales and
bias meet a sum in the order of Triton's kernel, so that both give the same bits.
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from longllava.ops import native_cuda
from longllava.ops.int8_linear import triton
from longllava.ops.native_cuda import REBUILD, address

ENTRY = "longllava_cuda_int8_product"
FIELDS = struct.Struct("@16q")  # Int8ProductArguments in csrc/int8_linear_cuda.cuh
CAPABILITY = (9, 0)
TILE = (128, 256)  # rows and outputs of a block; the two blocks of a cluster lie one above the other
STEP, LEAST_INPUTS = 16, 128  # rows lie 16 bytes apart for the tensor memory accelerator, which fetches 128
# It writes rows that begin at multiples of 16 bytes. By plain stores a product of 36,928 x 3,072 x 1,024 reached
# 598 TOP/s on an H100, by Triton 789 (benchmarks/results/int8-h100.json).
OUTPUT_STEP = 8


@dataclass(frozen=True)
class Launch:
    """group: tiles of rows that share what they read of the weights in the second-level cache. staggered: a block's
    second warpgroup begins a stage after the first, so that one multiplies while the other writes."""

    group: int = 8
    staggered: bool = False


# What `benchmarks/int8.py --tune` tries.
CANDIDATES = (Launch(), Launch(16), Launch(8, True), Launch(16, True))


def why_not(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    x_scale: Tensor | None,
    offsets: Tensor | None,
    mode: str,
    dtype: torch.dtype,
) -> str | None:
    n_rows, n_inputs = x.shape
    if mode != "dynamic":
        return f"takes mode dynamic, got {mode}"
    if offsets is not None:
        return "takes one layer's weights, got those of experts"
    if n_rows <= TILE[0]:  # a cluster's second block would have nothing to do
        return f"takes more than {TILE[0]} rows, got {n_rows}"
    if n_inputs % STEP or n_inputs < LEAST_INPUTS:
        return f"takes inputs in multiples of {STEP}, at least {LEAST_INPUTS}, got {n_inputs}"
    if weight.shape[0] % OUTPUT_STEP:
        return f"takes outputs in multiples of {OUTPUT_STEP}, got {weight.shape[0]}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"gives bfloat16 or float16, got {str(dtype).removeprefix('torch.')}"
    for name, tensor in (("x", x), ("weight", weight)):
        if tensor.device.type != native_cuda.DEVICE:
            return f"needs CUDA tensors, got {name} on {tensor.device.type}"
        if tensor.dtype == torch.int8 and tensor.data_ptr() % 16:
            return f"takes tensors that begin at multiples of 16 bytes, got {name} {tensor.data_ptr() % 16} after one"
    if reason := native_cuda.elsewhere(x=x, weight=weight, scale=scale, bias=bias, x_scale=x_scale):
        return reason
    if x_scale is None and (reason := triton.why_not_quantize(x)) is not None:
        return f"has rows quantised by Triton, which says: {reason}"
    return native_cuda.missing() or _cannot_run_on(x.device) or _too_few_tiles(n_rows, weight.shape[0], x.device)


@functools.lru_cache
def _cannot_run_on(device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else CAPABILITY
    if capability != CAPABILITY:
        return f"needs a GPU of compute capability 9.0 (H100, H200), got {capability[0]}.{capability[1]}"
    if not native_cuda.has(ENTRY):
        return f"the CUDA kernels are built without those for sm_90a; name 90 in LONGLLAVA_CUDA_ARCHS, {REBUILD}"
    return None


def _too_few_tiles(n_rows: int, n_outputs: int, device: torch.device) -> str | None:
    """Where half of the processors or more would idle, Triton's narrow tiles are spread further: `choose_tiles`."""
    n_tiles = -(-n_rows // TILE[0]) * -(-n_outputs // TILE[1])
    n_processors = native_cuda.n_processors(device)
    if n_tiles * 2 > n_processors:
        return None
    return f"takes more tiles of {TILE[0]} x {TILE[1]} than half of the {n_processors} processors, got {n_tiles}"


def run(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    x_scale: Tensor | None,
    offsets: Tensor | None,
    mode: str,
    dtype: torch.dtype,
    launch: Launch | None = None,
) -> Tensor:
    y = x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype)
    if x_scale is None:
        x, x_scale = triton.quantize_rows(x)
    x, weight, x_scale, scale = x.contiguous(), weight.contiguous(), x_scale.float().contiguous(), scale.contiguous()
    if bias is not None:
        bias = (bias if bias.dtype in native_cuda.DTYPES else bias.float()).contiguous()
    packed = arguments(x, weight, x_scale, scale, bias, y, launch or choose_launch(weight.shape[0], weight.shape[1]))
    with torch.cuda.device_of(x):
        native_cuda.succeed(native_cuda.function(ENTRY)(packed), "int8_linear")
    return y


def choose_launch(n_outputs: int, n_inputs: int) -> Launch:
    """As the 9B's shapes and its encoder's were fastest on an H100. The slowest of CANDIDATES took 4 to 15 % longer,
    and 31 % for 4,096 inputs and 1,024 outputs (benchmarks/results/int8-h100.json).
    """
    tall = n_outputs <= 8192 and (n_inputs >= 8192 or max(n_outputs, n_inputs) < 4096)
    return Launch(16 if tall else 8, staggered=max(n_outputs, n_inputs) <= 4096)


def arguments(
    x: Tensor, weight: Tensor, x_scale: Tensor, scale: Tensor, bias: Tensor | None, y: Tensor, launch: Launch
) -> bytes:
    dtypes = native_cuda.DTYPES
    return FIELDS.pack(
        FIELDS.size, dtypes[y.dtype], 0 if bias is None else dtypes[bias.dtype], *y.shape, x.shape[1],
        launch.group, launch.staggered, native_cuda.n_processors(x.device), native_cuda.stream(x),
        *map(address, (x, weight, x_scale, scale, bias, y)),
    )  # fmt: skip
