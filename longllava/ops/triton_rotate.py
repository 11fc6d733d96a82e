"""Rows of an int8 layer as quantized.py's `rotate` makes them, on an NVIDIA GPU, in one pass over memory.

The sixteen pieces of a row that are mixed lie side by side in registers, so that nothing goes through shared memory but
the search for the largest number. R rows of a program, J numbers of a piece.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longllava.ops.triton_int8 import magnitude_bits, scales, to_int8
from longllava.ops.triton_support import OPTIONS, rowed

MIXED = tl.constexpr(16)


@triton.jit
def four(a, b, c, d):
    sum_ab, difference_ab, sum_cd, difference_cd = a + b, a - b, c + d, c - d
    return sum_ab + sum_cd, difference_ab + difference_cd, sum_ab - sum_cd, difference_ab - difference_cd


@triton.jit
def rotated(x):
    near = ()
    for i in tl.static_range(0, MIXED, 4):
        near = near + four(x[i], x[i + 1], x[i + 2], x[i + 3])
    far = ()
    for i in tl.static_range(4):
        far = far + four(near[i], near[i + 4], near[i + 8], near[i + 12])
    y = ()
    for i in tl.static_range(MIXED):
        y = y + (far[i % 4 * 4 + i // 4],)
    return y


@triton.jit
def rotate_rows(
    x, up, y, scale, n_rows, x_row, up_row,
    PIECE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y (T, 16 PIECE) of x, or of silu(x) up in x's dtype; int8 with scale (T) where scale is given."""
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside_R = row_R < n_rows
    j_J = tl.arange(0, BLOCK)
    mask_RJ = inside_R[:, None] & (j_J < PIECE)[None]
    parts = ()
    for i in tl.static_range(MIXED):
        part_RJ = tl.load(x + (row_R * x_row)[:, None] + (i * PIECE + j_J)[None], mask=mask_RJ, other=0).to(tl.float32)
        if up is not None:
            up_RJ = tl.load(up + (row_R * up_row)[:, None] + (i * PIECE + j_J)[None], mask=mask_RJ, other=0)
            part_RJ = part_RJ * tl.sigmoid(part_RJ) * up_RJ.to(tl.float32)
            part_RJ = part_RJ.to(x.dtype.element_ty).to(tl.float32)
        parts = parts + (part_RJ * 0.25,)  # type: ignore[assignment]
    parts = rotated(parts)
    spot_RJ = (row_R * (MIXED * PIECE))[:, None] + j_J[None]
    if scale is None:
        for i in tl.static_range(MIXED):
            tl.store(y + spot_RJ + i * PIECE, parts[i].to(y.dtype.element_ty), mask=mask_RJ)
    else:
        bits_RJ = magnitude_bits(parts[0])
        for i in tl.static_range(1, MIXED):
            bits_RJ = tl.maximum(bits_RJ, magnitude_bits(parts[i]))
        scale_R, factor_R, seen_R = scales(tl.max(bits_RJ, 1))
        tl.store(scale + row_R, scale_R, mask=inside_R)
        for i in tl.static_range(MIXED):
            tl.store(y + spot_RJ + i * PIECE, to_int8(parts[i], factor_R, seen_R), mask=mask_RJ)


def rotate(x: Tensor, up: Tensor | None, y: Tensor, scale: Tensor | None) -> None:
    """Into y (T, K), and where y is int8 into scale (T). K a multiple of 16."""
    if y.numel() == 0:
        return
    x, up = rowed(x), None if up is None else rowed(up)
    n_rows, piece = x.shape[0], x.shape[1] // MIXED.value
    block = triton.next_power_of_2(piece)
    rows = max(1, 64 // block)  # 1,024 numbers at least
    with torch.cuda.device_of(x):
        rotate_rows[(-(-n_rows // rows),)](
            x, up, y, scale, n_rows, x.stride(0), 0 if up is None else up.stride(0), PIECE=piece, ROWS=rows,
            BLOCK=block, num_warps=max(4, min(16, block // 64)), **{**OPTIONS, "enable_fp_fusion": False},
        )  # fmt: skip
