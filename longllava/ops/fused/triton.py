"""Norm and SwiGLU on an NVIDIA GPU by Triton kernels. Each element is read once and written once."""

from __future__ import annotations

import torch
from torch import Tensor

from longllava.ops import triton_support
from longllava.ops.triton_support import OPTIONS, rowed

# Numbers of a row that a program holds in registers; 16,384 of fp32 are 32 a thread of 16 warps.
MAX_WIDTH = 32768
SPLIT = 2048  # of a row without int8 output, which several programs share
UNFUSED = {**OPTIONS, "enable_fp_fusion": False}


def why_not_rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, quantized: bool = False,
    dtype: torch.dtype | None = None,
) -> str | None:  # fmt: skip
    if dtype is not None and dtype not in triton_support.DTYPES:
        return f"gives float32, bfloat16 or float16, asked for {str(dtype).removeprefix('torch.')}"
    if x.shape[1] > MAX_WIDTH:
        return f"takes rows of at most {MAX_WIDTH}, got {x.shape[1]}"
    return triton_support.why_not(x=x, weight=weight, residual=residual)


def why_not_swiglu(
    gate: Tensor, up: Tensor, absmax: Tensor | None = None, quantized: bool = False, rotated: bool = False
) -> str | None:
    if quantized and gate.shape[1] > MAX_WIDTH:
        return f"takes rows of at most {MAX_WIDTH} with int8 output, got {gate.shape[1]}"
    return triton_support.why_not(gate=gate, up=up, absmax=absmax)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, quantized: bool, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    from longllava.ops.fused.triton_kernels import TYPES
    from longllava.ops.fused.triton_kernels import rms_norm as kernel

    dtype = dtype or torch.promote_types(x.dtype, weight.dtype)
    y, scale = _outputs(x, quantized, dtype)
    total = None if residual is None else x.new_empty(x.shape)
    if x.numel():
        x, residual = rowed(x), None if residual is None else rowed(residual)
        block, rows, warps = _shape(x.shape[1])
        with torch.cuda.device_of(x):
            kernel[(-(-x.shape[0] // rows),)](
                x, weight.contiguous(), residual, y, scale, total, x.shape[0], x.stride(0),
                0 if residual is None else residual.stride(0), float(eps), D=x.shape[1], ROWS=rows, BLOCK=block,
                ROUNDED=TYPES[dtype], num_warps=warps, **UNFUSED,
            )  # fmt: skip
    return y, scale, total


def why_not_rms_norm_parts(x: Tensor, weights: tuple[Tensor, ...], eps: float) -> str | None:
    if len(weights) != 3:
        return f"takes three parts, got {len(weights)}"
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights)):
        return "has no backward, and gradients are wanted"
    if torch.compiler.is_compiling():
        return "is not traced"
    return next(filter(None, (why_not_rms_norm(x, weight, eps, None) for weight in weights)), None)


def rms_norm_parts(x: Tensor, weights: tuple[Tensor, ...], eps: float) -> tuple[Tensor, ...]:
    from longllava.ops.fused.triton_kernels import rms_norm_parts as kernel

    x = rowed(x)
    sizes = [len(weight) for weight in weights]
    ys = tuple(x.new_empty((x.shape[0], size)) for size in sizes)
    blocks = [_shape(size)[0] for size in sizes]
    _, rows, warps = _shape(max(sizes))
    if x.numel():
        with torch.cuda.device_of(x):
            kernel[(-(-x.shape[0] // rows),)](
                x, *(weight.contiguous() for weight in weights), *ys, x.shape[0], x.stride(0), float(eps), *sizes,
                *blocks, ROWS=rows, num_warps=warps, **UNFUSED,
            )  # fmt: skip
    return ys


def swiglu(
    gate: Tensor, up: Tensor, absmax: Tensor | None, quantized: bool, rotated: bool = False
) -> tuple[Tensor, Tensor | None]:
    from longllava.ops.fused.triton_kernels import swiglu as kernel
    from longllava.ops.triton_rotate import rotate

    y, scale = _outputs(gate, quantized)
    if rotated:
        rotate(gate, up, y, scale)
        return y, scale
    if gate.numel():
        gate, up = rowed(gate), rowed(up)
        n_rows, width = gate.shape
        held = quantized or width <= SPLIT
        block, rows, warps = _shape(width if held else SPLIT)
        absmax = None if absmax is None else absmax.contiguous()
        with torch.cuda.device_of(gate):
            kernel[(-(-n_rows // rows), 1 if held else -(-width // block))](
                gate, up, absmax, y, scale, n_rows, gate.stride(0), up.stride(0), F=width, ROWS=rows, BLOCK=block,
                HELD=held, num_warps=warps, **UNFUSED,
            )  # fmt: skip
    return y, scale


def _outputs(x: Tensor, quantized: bool, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor | None]:
    if not quantized:
        return x.new_empty(x.shape, dtype=dtype), None
    scale = x.new_empty(x.shape[:1], dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.int8), scale if x.shape[1] else scale.fill_(1)


def _shape(width: int) -> tuple[int, int, int]:
    """(numbers, rows, warps) of a program: 1,024 numbers at least, 32 a thread at most for wide rows."""
    block = 1 << max(0, width - 1).bit_length()
    return block, max(1, 1024 // block), max(4, min(16, block // 1024))
