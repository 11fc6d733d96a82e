"""Norm and SwiGLU on the CPU by the compiled kernels (csrc/fused*). Each element is read once and written once."""

from __future__ import annotations

import functools
import struct
from typing import Any

import torch
from torch import Tensor

from longllava.ops import native
from longllava.ops.native import DTYPES, address

FIELDS = struct.Struct("@10qd6q")  # csrc/fused.h, FusedArguments
MAX_WIDTH = 32768


def why_not_rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, *rest: Any) -> str | None:
    return _why_not(x, weight)


def why_not_swiglu(gate: Tensor, *rest: Any) -> str | None:
    return _why_not(gate)


def _why_not(x: Tensor, weight: Tensor | None = None) -> str | None:
    if x.device.type != "cpu":
        return f"needs CPU tensors, got {x.device.type}"
    if x.dtype not in DTYPES or (weight is not None and weight.dtype != x.dtype):
        names = [str(y.dtype).removeprefix("torch.") for y in (x, weight) if y is not None]
        return f"takes float32 or bfloat16, input and weight alike, got {' and '.join(names)}"
    if x.shape[1] > MAX_WIDTH:
        return f"takes rows of at most {MAX_WIDTH}, got {x.shape[1]}"
    return native.why_not()


@functools.lru_cache(maxsize=1)
def _kernels() -> tuple[Any, Any]:
    functions = native.library().longllava_rms_norm, native.library().longllava_swiglu
    for function in functions:
        function.argtypes = [native.ctypes.c_char_p]
    return functions


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, quantized: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    total = None if residual is None else x.new_empty(x.shape)
    y, scale = _run(0, x, residual, weight.contiguous(), eps, None, total, quantized)
    return y, scale, total


def swiglu(
    gate: Tensor, up: Tensor, absmax: Tensor | None, quantized: bool, rotated: bool = False
) -> tuple[Tensor, Tensor | None]:
    return _run(1, gate, up, None, 0.0, absmax, None, quantized, rotated)


def _run(
    kernel: int,
    x: Tensor,
    other: Tensor | None,
    weight: Tensor | None,
    eps: float,
    absmax: Tensor | None,
    total: Tensor | None,
    quantized: bool,
    rotated: bool = False,
) -> tuple[Tensor, Tensor | None]:
    rows, width = x.shape
    y = x.new_empty(x.shape, dtype=torch.int8 if quantized else x.dtype)
    scale = x.new_empty(rows, dtype=torch.float32) if quantized else None
    x, other = _rowed(x), None if other is None else _rowed(other)
    absmax = None if absmax is None else native.plain(absmax)
    status = _kernels()[kernel](
        FIELDS.pack(
            FIELDS.size, rows, width, torch.get_num_threads(), DTYPES[x.dtype], x.data_ptr(), address(other),
            x.stride(0), 0 if other is None else other.stride(0), address(weight), eps, address(absmax),
            0 if quantized else y.data_ptr(), address(total), y.data_ptr() if quantized else 0, address(scale),
            rotated,
        )
    )  # fmt: skip
    native.succeed(status, "fused")
    return y, scale


def _rowed(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()
