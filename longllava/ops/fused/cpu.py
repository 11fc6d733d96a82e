"""Norm and SwiGLU on the CPU by the compiled kernels (csrc/fused*), and their gradients.

Each element is read from memory once and written once.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor

from longllava.ops import native
from longllava.ops.native import DTYPES, address

FIELDS = struct.Struct("@12qd6q")  # csrc/fused.h, FusedArguments
GRADIENTS = struct.Struct("@14qd3q")  # FusedGradients
MAX_WIDTH = 32768


def why_not_rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, quantized: bool, dtype: torch.dtype
) -> str | None:
    return _why_not(x, x.dtype, weight.dtype, dtype)


def why_not_swiglu(gate: Tensor, *rest: Any) -> str | None:
    return _why_not(gate, gate.dtype)


def _why_not(x: Tensor, *dtypes: torch.dtype) -> str | None:
    if x.device.type != "cpu":
        return f"needs CPU tensors, got {x.device.type}"
    if other := [dtype for dtype in dtypes if dtype not in DTYPES]:
        return f"takes and gives float32 and bfloat16, got {str(other[0]).removeprefix('torch.')}"
    if x.shape[1] > MAX_WIDTH:
        return f"takes rows of at most {MAX_WIDTH}, got {x.shape[1]}"
    return native.why_not()


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, quantized: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    total = None if residual is None else x.new_empty(x.shape)
    y, scale = _run("longllava_rms_norm", x, residual, weight.contiguous(), eps, None, total, quantized, dtype)
    return y, scale, total


def swiglu(
    gate: Tensor, up: Tensor, absmax: Tensor | None, quantized: bool, rotated: bool = False
) -> tuple[Tensor, Tensor | None]:
    return _run("longllava_swiglu", gate, up, None, 0.0, absmax, None, quantized, gate.dtype, rotated)


def _run(
    kernel: str,
    x: Tensor,
    other: Tensor | None,
    weight: Tensor | None,
    eps: float,
    absmax: Tensor | None,
    total: Tensor | None,
    quantized: bool,
    dtype: torch.dtype,
    rotated: bool = False,
) -> tuple[Tensor, Tensor | None]:
    rows, width = x.shape
    y = x.new_empty(x.shape, dtype=torch.int8 if quantized else dtype)
    scale = x.new_empty(rows, dtype=torch.float32) if quantized else None
    x, other = _rowed(x), None if other is None else _rowed(other)
    absmax = None if absmax is None else native.plain(absmax)
    status = native.function(kernel)(
        FIELDS.pack(
            FIELDS.size, rows, width, torch.get_num_threads(), *_dtypes(x, weight, dtype),
            x.data_ptr(), address(other), x.stride(0), 0 if other is None else other.stride(0), address(weight), eps,
            address(absmax), 0 if quantized else y.data_ptr(), address(total), y.data_ptr() if quantized else 0,
            address(scale), rotated,
        )
    )  # fmt: skip
    native.succeed(status, "fused")
    return y, scale


def rms_norm_gradients(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Of x and weight, for inputs that `rms_norm` takes, without a residual; grad: of y, in its dtype."""
    grad_x, grad_weight = x.new_empty(x.shape), weight.new_empty(weight.shape, dtype=torch.float32)
    _run_back("longllava_rms_norm_backward", grad, x, None, weight.contiguous(), eps, grad_x, None, grad_weight)
    return grad_x, grad_weight.to(weight.dtype)


def swiglu_gradients(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Of gate and up, for inputs that `swiglu` takes; grad: of y, in their dtype."""
    grad_gate, grad_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    _run_back("longllava_swiglu_backward", grad, gate, up, None, 0.0, grad_gate, grad_up, None)
    return grad_gate, grad_up


def _run_back(
    kernel: str,
    grad: Tensor,
    x: Tensor,
    other: Tensor | None,
    weight: Tensor | None,
    eps: float,
    grad_x: Tensor,
    grad_other: Tensor | None,
    grad_weight: Tensor | None,
) -> None:
    rows, width = x.shape
    grad, x, other = _rowed(grad), _rowed(x), None if other is None else _rowed(other)
    status = native.function(kernel)(
        GRADIENTS.pack(
            GRADIENTS.size, rows, width, torch.get_num_threads(), *_dtypes(x, weight, grad.dtype),
            x.data_ptr(), address(other), grad.data_ptr(), x.stride(0), 0 if other is None else other.stride(0),
            grad.stride(0), address(weight), eps, grad_x.data_ptr(), address(grad_other), address(grad_weight),
        )
    )  # fmt: skip
    native.succeed(status, "fused backward")


def _dtypes(x: Tensor, weight: Tensor | None, dtype: torch.dtype) -> tuple[int, int, int]:
    return DTYPES[x.dtype], DTYPES[dtype if weight is None else weight.dtype], DTYPES[dtype]


def _rowed(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()
