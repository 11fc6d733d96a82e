"""Linear layers with int8 weights, plain and grouped by expert, and the quantisation of rows that they need.

One stored form serves both modes: weights (N, K) int8 with a scale for each output (`quantize_weight`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from longllava.errors import LongLLaVAError
from longllava.ops.int8_linear.call import (
    BACKENDS,
    QUANTIZE_BACKENDS,
    ROTATE_BACKENDS,
    multiply,
    quantized,
    rotated_rows,
)
from longllava.ops.quantized import MIXED, Quantized, quantize

__all__ = [
    "BACKENDS",
    "MAX_INPUTS",
    "MODES",
    "QUANTIZE_BACKENDS",
    "ROTATE_BACKENDS",
    "Quantized",
    "int8_grouped_linear",
    "int8_linear",
    "quantize_rows",
    "quantize_weight",
    "rotate_rows",
]

MAX_INPUTS = (2**31 - 1) // 128**2  # 131,071: a sum of so many int8 products cannot leave int32
MODES = ("dynamic", "weight_only")


def quantize_weight(weight_NK: Tensor, *, rotated: bool = False) -> tuple[Tensor, Tensor]:
    """int8 weights and their scale, fp32, one for each output: (N, K), (N); any axes may stand before N.

    The rule of `quantize_rows`. rotated: for inputs that are rotated too. Raises LongLLaVAError for weights that are
    not finite.
    """
    weight_NK = weight_NK.detach()
    values, scale = quantize(rotate_rows(weight_NK.float()) if rotated else weight_NK)
    if bool(scale.isnan().any()):
        raise LongLLaVAError("quantize_weight: the weights hold NaN or infinity; int8 has neither")
    return values, scale


def rotate_rows(x: Tensor, *, backend: str | None = None) -> Tensor:
    """x (..., K), K a multiple of 16, by an orthogonal matrix that is its own inverse (ops/quantized.py), in x's dtype.

    Large numbers that stand alone in a row are spread over sixteen: what int8 has to make room for is up to four times
    smaller. x: fp32, bf16 or fp16 (fp64 in plain torch). Sums are up to four times as large as the numbers: above a
    quarter of what x's dtype holds (16,376 in fp16) they may become infinite.
    """
    _check_rotated("rotate_rows", x)
    return rotated_rows(x.reshape(-1, x.shape[-1]), backend).view(x.shape)


def _check_rotated(op: str, x: Tensor) -> None:
    if not x.is_floating_point() or x.ndim < 1 or not x.shape[-1] or x.shape[-1] % MIXED:
        raise LongLLaVAError(
            f"{op}: rotated rows must be floats, a multiple of {MIXED} each, got {tuple(x.shape)} in {x.dtype}"
        )


def quantize_rows(
    x: Tensor, absmax: Tensor | None = None, *, rotated: bool = False, backend: str | None = None
) -> Quantized:
    """int8 values (..., K) and fp32 scales (...): absmax / 127 of each row, to the nearest, ties to even.

    x: fp32, bf16 or fp16 (fp64 in plain torch). absmax (...) fp32: each row's largest magnitude, where known.
    rotated: of the rows that `rotate_rows` makes of x, which are not rounded in between; not with absmax.
    A row of zeros (below 2^-100) has scale 1. A row that holds NaN or infinity has scale NaN: all that is made of it
    is NaN. Values lie within -127 .. 127. Without gradients.
    """
    if not x.is_floating_point() or x.ndim < 1:
        raise LongLLaVAError(f"quantize_rows: x must be rows of floats, got {tuple(x.shape)} in {x.dtype}")
    if absmax is not None and absmax.shape != x.shape[:-1]:
        raise LongLLaVAError(f"quantize_rows: absmax must be {tuple(x.shape[:-1])}, got {tuple(absmax.shape)}")
    if rotated:
        _check_rotated("quantize_rows", x)
        if absmax is not None:
            raise LongLLaVAError("quantize_rows: absmax is of rows that are not rotated; give one or the other")
    rows_TK = x.detach().reshape(-1, x.shape[-1]) if x.shape[-1] else x.detach().new_empty(x.shape[:-1].numel(), 0)
    absmax_T = None if absmax is None else absmax.detach().reshape(-1)
    values, scale = quantized(rows_TK, absmax_T, rotated, backend)
    return Quantized(values.view(x.shape), scale.view(x.shape[:-1]), x.dtype)


def int8_linear(
    x: Tensor | Quantized,
    weight_NK: Tensor,
    scale_N: Tensor,
    bias_N: Tensor | None = None,
    *,
    mode: str = "dynamic",
    backend: str | None = None,
) -> Tensor:
    """y = x (scale * weight)^T + bias.

    Shapes:  x (..., K); weight (N, K) int8; scale (N) fp32; bias (N) any float. K <= 131,071.
    dtypes:  x fp32, bf16 or fp16 (fp64 in plain torch), or rows that are quantised already.
    mode:    "dynamic": each row is quantised by `quantize_rows`, products are int8 and their sums exact in int32, so
             that a row's result is the same whatever stands beside it. "weight_only": weights are dequantised on the
             fly and multiply x as it is; sums in fp32 or wider. For few rows, where reading the weights takes all the
             time; not for rows that are quantised already.
    Returns: (..., N) in x's dtype (of quantised rows: the dtype they had). A row that holds NaN or infinity gives NaN
             in mode "dynamic", what a float product gives in the other. The same call gives the same bits.
    Gradients go to x alone, grad_y (scale * weight), the rounding of x passed through: the weights are frozen. Rows
    that are quantised already have none.
    Raises:  LongLLaVAError if shapes, dtypes or the mode disagree; BackendError if the backend asked for cannot run.
    """
    return _product("int8_linear", x, weight_NK, scale_N, bias_N, None, mode, backend)


def int8_grouped_linear(
    x: Tensor | Quantized,
    weight_XNK: Tensor,
    scale_XN: Tensor,
    offsets_X: Tensor,
    bias_XN: Tensor | None = None,
    *,
    mode: str = "dynamic",
    backend: str | None = None,
) -> Tensor:
    """`int8_linear` of rows sorted by expert: rows offsets[i] .. offsets[i+1] - 1 meet expert i's weights.

    Shapes:  x (T, K); weight (X, N, K) int8; scale (X, N) fp32; bias (X, N); offsets (X + 1) int32 on x's device,
             from 0 to T, never falling; an expert may have no rows. What stands in offsets is not checked, and not
             read on the host by the GPU kernels, but for more than 64 rows in mode "weight_only".
    """
    return _product("int8_grouped_linear", x, weight_XNK, scale_XN, bias_XN, offsets_X, mode, backend)


def _product(
    op: str,
    x: Tensor | Quantized,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    offsets: Tensor | None,
    mode: str,
    backend: str | None,
) -> Tensor:
    rows, x_scale, dtype = x if isinstance(x, Quantized) else (x, None, x.dtype)
    _check(op, rows, x_scale, weight, scale, bias, offsets, mode)
    rows_TK = rows.reshape(-1, weight.shape[-1]) if weight.shape[-1] else rows.new_empty(rows.shape[:-1].numel(), 0)
    x_scale_T = None if x_scale is None else x_scale.reshape(-1)
    y_TN = multiply(rows_TK, weight, scale, bias, x_scale_T, offsets, mode, dtype, backend)
    return y_TN.view(*rows.shape[:-1], weight.shape[-2])


def _check(
    op: str,
    rows: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    offsets: Tensor | None,
    mode: str,
) -> None:
    letters, n_axes = ("(N, K)", 2) if offsets is None else ("(X, N, K)", 3)
    if weight.ndim != n_axes or weight.dtype != torch.int8:
        raise LongLLaVAError(f"{op}: weight must be {letters} int8, got {tuple(weight.shape)} in {weight.dtype}")
    if weight.shape[-1] > MAX_INPUTS:
        raise LongLLaVAError(f"{op}: sums of {weight.shape[-1]} int8 products may leave int32; at most {MAX_INPUTS}")
    if mode not in MODES:
        raise LongLLaVAError(f"{op}: mode must be one of {', '.join(MODES)}, got {mode!r}")
    if rows.ndim < 1 or rows.shape[-1] != weight.shape[-1] or (offsets is not None and rows.ndim != 2):
        wanted = "(..., K)" if offsets is None else "(T, K)"
        raise LongLLaVAError(f"{op}: x must be {wanted}, K = {weight.shape[-1]}, got {tuple(rows.shape)}")
    if x_scale is None and not rows.is_floating_point():
        raise LongLLaVAError(f"{op}: x must be floats, or Quantized, got {rows.dtype}")
    if x_scale is not None and (rows.dtype != torch.int8 or x_scale.shape != rows.shape[:-1]):
        raise LongLLaVAError(
            f"{op}: quantised x must be int8 with a scale {tuple(rows.shape[:-1])}, "
            f"got {rows.dtype} and {tuple(x_scale.shape)}"
        )
    if x_scale is not None and mode != "dynamic":
        raise LongLLaVAError(f"{op}: rows that are quantised already need mode='dynamic', got {mode!r}")
    for name, tensor, shape in (("scale", scale, weight.shape[:-1]), ("bias", bias, weight.shape[:-1])):
        if tensor is not None and tensor.shape != shape:
            raise LongLLaVAError(f"{op}: {name} must be {tuple(shape)}, got {tuple(tensor.shape)}")
    if scale.dtype != torch.float32:
        raise LongLLaVAError(f"{op}: scale must be float32, got {scale.dtype}")
    if offsets is not None and (offsets.shape != (weight.shape[0] + 1,) or offsets.dtype != torch.int32):
        raise LongLLaVAError(
            f"{op}: offsets must be (X + 1,) = ({weight.shape[0] + 1},) int32, got {tuple(offsets.shape)} in "
            f"{offsets.dtype}"
        )
