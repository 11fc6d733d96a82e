"""The encoder's passes in Triton. R rows a program, each element read once, written once; C or F numbers a row.
M rows, N outputs (H of a half), K inputs of a product.
"""

import triton
import triton.language as tl

from longllava.ops.triton_int8 import magnitude_bits, scales, to_int8


@triton.jit
def activation_of(x, ACTIVATION: tl.constexpr):
    """fp32 to fp32. quick_gelu and gelu_tanh are x sigmoid(...), here x / (1 + 2^...)."""
    if ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(0.7071067811865476 * x))
    else:
        if ACTIVATION == "gelu_tanh":  # 2 sqrt(2 / pi) / log(2)
            exponent = -2.302208198 * (x + 0.044715 * (x * x * x))
        else:  # 1.702 / log(2)
            exponent = -2.4554669595930156 * x
        # a square of 1 / sqrt is 3 instructions, a division 8, and a fused pass is short of them
        root = tl.rsqrt(1.0 + tl.exp2(exponent))
        y = x * (root * root)
    return y


@triton.jit
def write_int8(y_RC, values, scale, row_R, inside_R, mask_RC, at_RC):
    """y_RC, in the dtype it would be handed on in and 0 beside a row, as int8 values and the scales of its rows."""
    scale_R, factor_R, seen_R = scales(tl.max(magnitude_bits(y_RC), 1))
    tl.store(scale + row_R, scale_R, mask=inside_R)
    tl.store(values + at_RC, to_int8(y_RC, factor_R, seen_R, CLAMPED=False), mask=mask_RC)


@triton.jit
def add_layer_norm(
    x, delta, weight, bias, y, scale, total, n_rows, eps,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """total = x + delta (T, C) and its layer norm y; int8 with scale (T) where scale is given."""
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside_R = row_R < n_rows
    c_C = tl.arange(0, BLOCK)
    inside_C = c_C < WIDTH
    mask_RC = inside_R[:, None] & inside_C[None]
    at_RC = (row_R * WIDTH)[:, None] + c_C[None]
    sum_RC = tl.load(x + at_RC, mask=mask_RC, other=0).to(tl.float32)
    sum_RC += tl.load(delta + at_RC, mask=mask_RC, other=0).to(tl.float32)
    rounded_RC = sum_RC.to(total.dtype.element_ty)
    tl.store(total + at_RC, rounded_RC, mask=mask_RC)
    sum_RC = rounded_RC.to(tl.float32)
    centred_RC = tl.where(mask_RC, sum_RC - (tl.sum(sum_RC, 1) / WIDTH)[:, None], 0.0)
    factor_R = tl.rsqrt(tl.sum(centred_RC * centred_RC, 1) / WIDTH + eps)
    weight_C = tl.load(weight + c_C, mask=inside_C, other=0).to(tl.float32)
    bias_C = tl.load(bias + c_C, mask=inside_C, other=0).to(tl.float32)
    y_RC = (centred_RC * factor_R[:, None] * weight_C[None] + bias_C[None]).to(total.dtype.element_ty)
    if scale is None:
        tl.store(y + at_RC, y_RC, mask=mask_RC)
    else:
        write_int8(y_RC, y, scale, row_R, inside_R, mask_RC, at_RC)


@triton.jit
def activate(x, n, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """In place."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    value = activation_of(tl.load(x + at, mask=inside, other=0).to(tl.float32), ACTIVATION)
    tl.store(x + at, value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def linear_activated(
    x, weight, bias, y, n_rows, n_outputs, n_programs,
    K: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """y (M, N) = activation(x (M, K) weight (N, K)^T + bias (N)), by descriptors, which read 0 and write nothing beyond
    the end. Programs go through the tiles, n_programs apart; GROUP tiles of rows share what they read of the weights in
    the second-level cache. WHOLE: tiles end where the outputs do."""
    n_across = tl.cdiv(n_outputs, BLOCK_N)
    n_down = tl.cdiv(n_rows, BLOCK_M)
    # flatten: the next tile's first loads are under way while a tile ends
    for tile in tl.range(tl.program_id(0), n_across * n_down, n_programs, flatten=True):
        group = tile // (GROUP * n_across)
        height = tl.minimum(n_down - group * GROUP, GROUP)
        row = (group * GROUP + (tile % (GROUP * n_across)) % height) * BLOCK_M
        column = ((tile % (GROUP * n_across)) // height) * BLOCK_N
        sum_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, K, BLOCK_K):
            sum_MN = tl.dot(x.load([row, k]), weight.load([column, k]).T, sum_MN)
        # by halves: what a store holds in shared memory is half as much
        left_MH, right_MH = tl.split(tl.permute(tl.reshape(sum_MN, [BLOCK_M, 2, BLOCK_N // 2]), (0, 2, 1)))
        write_activated(left_MH, bias, y, row, column, n_outputs, ACTIVATION, WHOLE)
        write_activated(right_MH, bias, y, row, column + BLOCK_N // 2, n_outputs, ACTIVATION, WHOLE)


@triton.jit
def write_activated(sum_MH, bias, y, row, column, n_outputs, ACTIVATION: tl.constexpr, WHOLE: tl.constexpr):
    if bias is not None:
        n_H = column + tl.arange(0, sum_MH.shape[1])
        if WHOLE:
            bias_H = tl.load(bias + n_H)
        else:
            bias_H = tl.load(bias + n_H, mask=n_H < n_outputs, other=0)
        sum_MH += bias_H.to(tl.float32)[None]
    y.store([row, column], activation_of(sum_MH, ACTIVATION).to(y.dtype))


@triton.jit
def activated_rows(
    x, values, scale, n_rows, x_row,
    ACTIVATION: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """values (T, F) int8 and scale (T) of the activation of x (T, F), once rounded to x's dtype."""
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside_R = row_R < n_rows
    f_F = tl.arange(0, BLOCK)
    mask_RF = inside_R[:, None] & (f_F < WIDTH)[None]
    x_RF = tl.load(x + (row_R * x_row)[:, None] + f_F[None], mask=mask_RF, other=0)
    y_RF = activation_of(x_RF.to(tl.float32), ACTIVATION).to(x_RF.dtype)
    write_int8(y_RF, values, scale, row_R, inside_R, mask_RF, (row_R * WIDTH)[:, None] + f_F[None])
