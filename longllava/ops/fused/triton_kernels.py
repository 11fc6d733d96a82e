"""Norm and SwiGLU as Triton kernels, R rows a program, each in one pass over memory. D (F) numbers of a block."""

import torch
import triton
import triton.language as tl

from longllava.ops.triton_int8 import magnitude_bits, scales, to_int8

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def write(y_RD, absmax, y, scale, row_R, inside_R, mask_RD, spot_RD):
    """y_RD, in the dtype it is handed on in, to y; or its int8 values to y and their scales to scale."""
    if scale is None:
        tl.store(y + spot_RD, y_RD, mask=mask_RD)
    else:
        if absmax is None:
            bits_R = tl.max(magnitude_bits(tl.where(mask_RD, y_RD.to(tl.float32), 0.0)), 1)
        else:
            bits_R = magnitude_bits(tl.load(absmax + row_R, mask=inside_R, other=0))
        scale_R, factor_R, seen_R = scales(bits_R)
        tl.store(scale + row_R, scale_R, mask=inside_R)
        tl.store(y + spot_RD, to_int8(y_RD, factor_R, seen_R), mask=mask_RD)


@triton.jit
def normed(x_RD, weight, d_D, eps, D: tl.constexpr):
    wide_RD = x_RD.to(tl.float32)
    mean_R = tl.sum(wide_RD * wide_RD, 1) / D
    normed_RD = (wide_RD * tl.rsqrt(mean_R + eps)[:, None]).to(x_RD.dtype)
    weight_D = tl.load(weight + d_D, mask=d_D < D, other=0)
    return normed_RD.to(tl.float32) * weight_D.to(tl.float32)[None]


@triton.jit
def rms_norm(
    x, weight, residual, y, scale, total, n_rows, x_row, residual_row, eps,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ROUNDED: tl.constexpr,
):  # fmt: skip
    """y (T, D), and with a residual total = residual + x; int8 with scale (T) where scale is given, of what y would be,
    a number of the dtype ROUNDED."""
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside_R = row_R < n_rows
    d_D = tl.arange(0, BLOCK)
    mask_RD = inside_R[:, None] & (d_D < D)[None]
    spot_RD = (row_R * D)[:, None] + d_D[None]
    x_RD = tl.load(x + (row_R * x_row)[:, None] + d_D[None], mask=mask_RD, other=0)
    if residual is not None:
        old_RD = tl.load(residual + (row_R * residual_row)[:, None] + d_D[None], mask=mask_RD, other=0)
        x_RD = (x_RD.to(tl.float32) + old_RD.to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + spot_RD, x_RD, mask=mask_RD)
    y_RD = normed(x_RD, weight, d_D, eps, D).to(ROUNDED)
    write(y_RD, None, y, scale, row_R, inside_R, mask_RD, spot_RD)


@triton.jit
def norm_part(x, weight, y, row_R, n_rows, x_row, eps, D: tl.constexpr, BLOCK: tl.constexpr):
    d_D = tl.arange(0, BLOCK)
    mask_RD = (row_R < n_rows)[:, None] & (d_D < D)[None]
    x_RD = tl.load(x + (row_R * x_row)[:, None] + d_D[None], mask=mask_RD, other=0)
    y_RD = normed(x_RD, weight, d_D, eps, D).to(y.dtype.element_ty)
    tl.store(y + (row_R * D)[:, None] + d_D[None], y_RD, mask=mask_RD)


@triton.jit
def rms_norm_parts(
    x, weight_0, weight_1, weight_2, y_0, y_1, y_2, n_rows, x_row, eps,
    D_0: tl.constexpr, D_1: tl.constexpr, D_2: tl.constexpr,
    BLOCK_0: tl.constexpr, BLOCK_1: tl.constexpr, BLOCK_2: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Three parts that lie side by side in each row of x, each by its own norm: y_j (T, D_j)."""
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    norm_part(x, weight_0, y_0, row_R, n_rows, x_row, eps, D_0, BLOCK_0)
    norm_part(x + D_0, weight_1, y_1, row_R, n_rows, x_row, eps, D_1, BLOCK_1)
    norm_part(x + D_0 + D_1, weight_2, y_2, row_R, n_rows, x_row, eps, D_2, BLOCK_2)


@triton.jit
def swiglu(
    gate, up, absmax, y, scale, n_rows, gate_row, up_row,
    F: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """y (T, F) = silu(gate) up; int8 with scale (T) where scale is given. HELD: BLOCK numbers of a row are kept, where
    several programs share a row that needs no largest magnitude (program_id(1))."""
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside_R = row_R < n_rows
    f_F = tl.arange(0, BLOCK)
    if not HELD:
        f_F += tl.program_id(1) * BLOCK
    mask_RF = inside_R[:, None] & (f_F < F)[None]
    gate_RF = tl.load(gate + (row_R * gate_row)[:, None] + f_F[None], mask=mask_RF, other=0)
    up_RF = tl.load(up + (row_R * up_row)[:, None] + f_F[None], mask=mask_RF, other=0)
    wide_RF = gate_RF.to(tl.float32)
    y_RF = wide_RF * tl.sigmoid(wide_RF) * up_RF.to(tl.float32)
    write(y_RF.to(gate_RF.dtype), absmax, y, scale, row_R, inside_R, mask_RF, (row_R * F)[:, None] + f_F[None])
