"""Elementwise work between linear layers in one pass over memory: norm and residual, SwiGLU, each with int8 output."""

from __future__ import annotations

import torch
from torch import Tensor

from longllava.errors import LongLLaVAError
from longllava.ops.dispatch import choose
from longllava.ops.fused.call import (
    RMS_NORM_BACKENDS,
    RMS_NORM_PARTS_BACKENDS,
    SWIGLU_BACKENDS,
    normed,
    swish_gated,
)
from longllava.ops.quantized import MIXED, Quantized

__all__ = [
    "RMS_NORM_BACKENDS",
    "RMS_NORM_PARTS_BACKENDS",
    "SWIGLU_BACKENDS",
    "Quantized",
    "rms_norm",
    "rms_norm_parts",
    "swiglu",
]


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    *,
    quantized: bool = False,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor | Quantized, Tensor]:
    """weight * total / sqrt(mean(total^2) + eps), where total = residual + x, or x without a residual.

    Shapes:  x, residual (..., D), of one dtype; weight (D).
    dtypes:  fp32, bf16 or fp16 (fp64 in plain torch). The sum is rounded to x's dtype, then normalised in fp32,
             rounded, and scaled, as Jamba does. y is in `dtype`: by default what x and weight promote to.
    Returns: (y, total). With `quantized` y is what `quantize_rows(y)` gives, and y itself is never written. total is x
             itself without a residual.
    Gradients go to x, weight and residual; with `quantized` there are none.
    Source:  Zhang & Sennrich 2019, arXiv:1910.07467.
    """
    if x.ndim < 1 or weight.shape != x.shape[-1:]:
        raise LongLLaVAError(f"rms_norm: weight must be ({x.shape[-1] if x.ndim else 'D'},), got {tuple(weight.shape)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise LongLLaVAError(
            f"rms_norm: residual must be {tuple(x.shape)} in {x.dtype}, got {tuple(residual.shape)} in {residual.dtype}"
        )
    dtype = dtype or torch.promote_types(x.dtype, weight.dtype)
    args = (_rows(x), weight, eps, None if residual is None else _rows(residual), quantized, dtype)
    y, scale, total = normed(*args, backend)
    return _wrapped(y, scale, x.shape, dtype), x if total is None else total.view(x.shape)


def rms_norm_parts(
    x: Tensor, weights: tuple[Tensor, ...], eps: float, *, backend: str | None = None
) -> tuple[Tensor, ...]:
    """`rms_norm` of parts that lie side by side in x's last axis, each with its own weight: one launch for all.

    Shapes:  x (..., D), where D is the sum of the weights' lengths. A view is read in place if its last stride is 1.
    Returns: for each weight (..., its length), in x's dtype.
    Gradients: none by the kernel, which is not for calls that want them.
    """
    if x.ndim < 1 or any(w.ndim != 1 for w in weights) or x.shape[-1] != sum(len(w) for w in weights):
        got = ", ".join(str(tuple(weight.shape)) for weight in weights)
        raise LongLLaVAError(
            f"rms_norm_parts: weights must be as long together as x's rows of {tuple(x.shape[-1:])}, got {got}"
        )
    args = (_rows(x), weights, eps)
    found = choose("rms_norm_parts", RMS_NORM_PARTS_BACKENDS, *args, forced=backend).run(*args)
    return tuple(y.view(*x.shape[:-1], y.shape[1]) for y in found)


def swiglu(
    gate: Tensor,
    up: Tensor | None = None,
    absmax: Tensor | None = None,
    *,
    quantized: bool = False,
    rotated: bool = False,
    backend: str | None = None,
) -> Tensor | Quantized:
    """silu(gate) * up, in fp32, rounded once. Also the gate of a scan: swiglu(z, y).

    Shapes:  gate, up (..., F); without `up`, gate is (..., 2 F) and holds both, gate first. absmax (...) fp32: the
             largest magnitude of each row of the result, where known; with `quantized` only.
    dtypes:  fp32, bf16 or fp16 (fp64 in plain torch). Views are read in place as long as their last stride is 1.
    Returns: (..., F); with `quantized` what `quantize_rows` of it gives, and the floats are never written. rotated:
             what `quantize_rows` gives with rotated=True, F a multiple of 16, without absmax.
    Gradients go to gate and up; with `quantized` there are none.
    Source:  Shazeer 2020, arXiv:2002.05202.
    """
    if up is None:
        if gate.ndim < 1 or gate.shape[-1] % 2:
            raise LongLLaVAError(f"swiglu: gate and up in one must be (..., 2 F), got {tuple(gate.shape)}")
        gate, up = gate.chunk(2, -1)
    if up.shape != gate.shape or up.dtype != gate.dtype:
        raise LongLLaVAError(
            f"swiglu: up must be {tuple(gate.shape)} in {gate.dtype}, got {tuple(up.shape)} in {up.dtype}"
        )
    if absmax is not None and (not quantized or absmax.shape != gate.shape[:-1]):
        raise LongLLaVAError(
            f"swiglu: absmax is for quantized=True and must be {tuple(gate.shape[:-1])}, got {tuple(absmax.shape)}"
        )
    if rotated and (not quantized or absmax is not None or not gate.shape[-1] or gate.shape[-1] % MIXED):
        raise LongLLaVAError(
            f"swiglu: rotated is for quantized=True without absmax and rows of a multiple of {MIXED}, got "
            f"{tuple(gate.shape)}"
        )
    args = (_rows(gate), _rows(up), None if absmax is None else absmax.reshape(-1), quantized, rotated)
    y, scale = swish_gated(*args, backend)
    return _wrapped(y, scale, gate.shape, gate.dtype)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.reshape(x.shape[:-1].numel(), 0)


def _wrapped(y: Tensor, scale: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> Tensor | Quantized:
    y = y.view(shape)
    return y if scale is None else Quantized(y, scale.view(shape[:-1]), dtype)
