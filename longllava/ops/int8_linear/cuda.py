"""Int8 linear layers on a Hopper GPU by a kernel of its tensor cores' own instructions (csrc/int8_linear_sm90a*).

Mode "dynamic" without experts, many rows. Rows are quantised by Triton's kernel, where they are not yet. Scales and
bias meet a sum in the order of Triton's kernel, so that both give the same bits.
"""

from __future__ import annotations

import functools
import struct

import torch
from torch import Tensor

from longllava.ops import native_cuda
from longllava.ops.int8_linear import triton
from longllava.ops.native_cuda import DTYPES, REBUILD, address

ENTRY = "longllava_cuda_int8_product"
FIELDS = struct.Struct("@15q")  # Int8ProductArguments in csrc/int8_linear_sm90a.cuh
CAPABILITY = (9, 0)
MORE_ROWS_THAN = 64  # up to these Triton's narrow tiles waste less
STEP, LEAST_INPUTS = 16, 128  # rows lie 16 bytes apart for the tensor memory accelerator, which fetches 128
GROUP = 8  # tiles of rows that share what they read of the weights in the second-level cache


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
    if n_rows <= MORE_ROWS_THAN:
        return f"takes more than {MORE_ROWS_THAN} rows, got {n_rows}"
    if n_inputs % STEP or n_inputs < LEAST_INPUTS:
        return f"takes inputs in multiples of {STEP}, at least {LEAST_INPUTS}, got {n_inputs}"
    if dtype not in DTYPES:
        return f"gives float32, bfloat16 or float16, got {str(dtype).removeprefix('torch.')}"
    for name, tensor in (("x", x), ("weight", weight)):
        if tensor.device.type != native_cuda.DEVICE:
            return f"needs CUDA tensors, got {name} on {tensor.device.type}"
    if x_scale is None and (reason := triton.why_not_quantize(x)) is not None:
        return f"has rows quantised by Triton, which says: {reason}"
    return native_cuda.missing() or _cannot_run_on(x.device)


@functools.lru_cache
def _cannot_run_on(device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else CAPABILITY
    if capability != CAPABILITY:
        return f"needs a GPU of compute capability 9.0 (H100, H200), got {capability[0]}.{capability[1]}"
    if not native_cuda.has(ENTRY):
        return f"the CUDA kernels are built without those for sm_90a; name 90 in LONGLLAVA_CUDA_ARCHS, {REBUILD}"
    return None


def run(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    x_scale: Tensor | None,
    offsets: Tensor | None,
    mode: str,
    dtype: torch.dtype,
) -> Tensor:
    y = x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype)
    if y.numel() == 0:
        return y
    if x_scale is None:
        x, x_scale = triton.quantize_rows(x)
    x, weight, x_scale, scale = _aligned(x), _aligned(weight), x_scale.contiguous(), scale.contiguous()
    if bias is not None:
        bias = (bias if bias.dtype in DTYPES else bias.float()).contiguous()
    with torch.cuda.device_of(x):
        native_cuda.succeed(native_cuda.function(ENTRY)(arguments(x, weight, x_scale, scale, bias, y)), "int8_linear")
    return y


def arguments(x: Tensor, weight: Tensor, x_scale: Tensor, scale: Tensor, bias: Tensor | None, y: Tensor) -> bytes:
    return FIELDS.pack(
        FIELDS.size, DTYPES[y.dtype], 0 if bias is None else DTYPES[bias.dtype], *y.shape, x.shape[1], GROUP,
        native_cuda.n_processors(x.device), native_cuda.stream(x),
        *map(address, (x, weight, x_scale, scale, bias, y)),
    )  # fmt: skip


def _aligned(x: Tensor) -> Tensor:
    """`x` itself if it is contiguous and begins where the accelerator can read, else a copy that does."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()
