"""Int8 linear layers on the CPU by the compiled kernels (csrc/int8_*).

Mode "dynamic": rows are quantised on the way into the product, weights packed on the way too, so that nothing is kept
between calls. Mode "weight_only", up to FEW_ROWS rows: each weight is read once and widened, to bf16 for tiles of bf16
rows where the processor has some.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from longllava.ops import native
from longllava.ops.int8_linear import reference
from longllava.ops.native import DTYPES, address, plain

FIELDS = struct.Struct("@21q")  # csrc/int8_linear.h, Int8Arguments
FEW_ROWS = 64
MAX_ROTATED = 32768  # numbers of a row
INT8 = 2


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
    if mode == "weight_only" and x.shape[0] > FEW_ROWS:
        return f"takes at most {FEW_ROWS} rows in mode weight_only, got {x.shape[0]}"
    if dtype not in (*DTYPES, torch.float16):
        return f"gives float32, bfloat16 or float16, got {str(dtype).removeprefix('torch.')}"
    return _elsewhere(x, "x") or _elsewhere(weight, "weight") or native.why_not()


def why_not_quantize(x: Tensor, absmax: Tensor | None = None, rotated: bool = False) -> str | None:
    if rotated and x.shape[1] > MAX_ROTATED:
        return f"rotates rows of at most {MAX_ROTATED}, got {x.shape[1]}"
    if x.dtype not in (*DTYPES, torch.float16):
        return f"takes float32, bfloat16 or float16, got {str(x.dtype).removeprefix('torch.')}"
    return _elsewhere(x, "x") or native.why_not()


def why_not_rotate(x: Tensor) -> str | None:
    return why_not_quantize(x, None, True)


def _elsewhere(x: Tensor, name: str) -> str | None:
    return None if x.device.type == "cpu" else f"needs CPU tensors, got {name} on {x.device.type}"


def run(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    x_scale: Tensor | None,
    offsets: Tensor | None,
    mode: str,
    dtype: torch.dtype,
    depth: int = 0,
) -> Tensor:
    """depth: inputs multiplied in one step, 2 or 4; 0 is what is fastest here."""
    y = x.new_empty((x.shape[0], weight.shape[-2]), dtype=torch.float32 if dtype == torch.float16 else dtype)
    if y.numel() == 0:
        return y.to(dtype)
    if x.shape[1] == 0:
        return reference.run(x, weight, scale, bias, x_scale, offsets, mode, dtype)
    kernel = native.function("longllava_int8_few_rows" if mode == "weight_only" else "longllava_int8_linear")
    x = _rowed(x)
    weight, scale = weight.contiguous(), plain(scale)
    bias = None if bias is None else plain(bias)
    x_scale = None if x_scale is None else plain(x_scale)
    offsets = None if offsets is None else offsets.contiguous()
    status = kernel(
        FIELDS.pack(
            FIELDS.size, x.shape[0], weight.shape[-1], y.shape[1], 1 if offsets is None else weight.shape[0],
            torch.get_num_threads(), depth, x.data_ptr(), DTYPES.get(x.dtype, INT8), x.stride(0), address(x_scale), 0,
            address(weight), address(scale), address(bias), address(offsets), y.data_ptr(), DTYPES[y.dtype],
            0, 0, 0,
        )
    )  # fmt: skip
    native.succeed(status, "int8_linear")
    return y.to(dtype)


def quantize_rows(x: Tensor, absmax: Tensor | None = None, rotated: bool = False) -> tuple[Tensor, Tensor]:
    values = x.new_empty(x.shape, dtype=torch.int8)
    scale = x.new_empty((x.shape[0],), dtype=torch.float32)
    _rows(_rowed(x), None if absmax is None else plain(absmax), None, values, scale, rotated)
    return values, scale


def rotate_rows(x: Tensor) -> Tensor:
    rows = _rowed(x)
    y = rows.new_empty(rows.shape)
    _rows(rows, None, y, None, None, True)
    return y.to(x.dtype)


def _rows(
    x: Tensor, absmax: Tensor | None, y: Tensor | None, values: Tensor | None, scale: Tensor | None, rotated: bool
) -> None:
    status = native.function("longllava_quantize_rows")(
        FIELDS.pack(
            FIELDS.size, x.shape[0], x.shape[1], 0, 1, torch.get_num_threads(), 0,
            x.data_ptr(), DTYPES[x.dtype], x.stride(0), 0, address(absmax), 0, 0, 0, 0, address(y), 0,
            address(values), address(scale), rotated,
        )
    )  # fmt: skip
    native.succeed(status, "quantize_rows")


def _rowed(x: Tensor) -> Tensor:
    """`x` as the kernels read it: fp32, bf16 or int8, rows without gaps inside; a copy only where needed."""
    if x.dtype == torch.float16:
        x = x.float()
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()
