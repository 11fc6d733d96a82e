"""The int8 products' kernels in Triton. M rows, N outputs, K inputs of a block; X experts."""

import triton
import triton.language as tl

from longllava.ops.triton_int8 import magnitude_bits, scales, to_int8


@triton.jit
def quantize_rows(
    x, absmax, values, scale, n_rows, x_row,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """values (T, K) int8 and scale (T) of x (T, K), ROWS rows a program. Rows longer than BLOCK are read twice."""
    row_R = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside_R = row_R < n_rows
    k_K = tl.arange(0, BLOCK)
    spot_R1 = (row_R * x_row)[:, None]
    if absmax is not None:
        bits_R = magnitude_bits(tl.load(absmax + row_R, mask=inside_R, other=0))
    elif K <= BLOCK:
        x_RK = tl.load(x + spot_R1 + k_K[None], mask=inside_R[:, None] & (k_K < K)[None], other=0)
        bits_R = tl.max(magnitude_bits(x_RK), 1)
    else:
        bits_RK = tl.zeros([ROWS, BLOCK], tl.int32)
        for first in range(0, K, BLOCK):
            mask_RK = inside_R[:, None] & (first + k_K < K)[None]
            bits_RK = tl.maximum(
                bits_RK, magnitude_bits(tl.load(x + spot_R1 + first + k_K[None], mask=mask_RK, other=0))
            )
        bits_R = tl.max(bits_RK, 1)
    scale_R, factor_R, seen_R = scales(bits_R)
    tl.store(scale + row_R, scale_R, mask=inside_R)
    if absmax is None and K <= BLOCK:
        mask_RK = inside_R[:, None] & (k_K < K)[None]
        tl.store(values + (row_R * K)[:, None] + k_K[None], to_int8(x_RK, factor_R, seen_R), mask=mask_RK)
    else:
        for first in range(0, K, BLOCK):
            mask_RK = inside_R[:, None] & (first + k_K < K)[None]
            x_RK = tl.load(x + spot_R1 + first + k_K[None], mask=mask_RK, other=0)
            tl.store(values + (row_R * K)[:, None] + first + k_K[None], to_int8(x_RK, factor_R, seen_R), mask=mask_RK)


@triton.jit
def expert_tiles(offsets, EXPERTS: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr):
    """First row, last row + 1, and the tiles up to and with each expert's, for X experts padded to a power of two."""
    x_X = tl.arange(0, PADDED)
    first_X = tl.load(offsets + x_X, mask=x_X < EXPERTS, other=0)
    end_X = tl.load(offsets + x_X + 1, mask=x_X < EXPERTS, other=0)
    return first_X, end_X, tl.cumsum((end_X - first_X + BLOCK_M - 1) // BLOCK_M, 0)


@triton.jit
def product(
    x, weight, x_scale, scale, bias, offsets, y, n_rows, n_outputs, n_programs, y_row,
    K: tl.constexpr, EXPERTS: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    DESCRIBED: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """y (T, N) = x_scale x (scale weight)^T + bias; x (T, K) and weight (X, N, K) int8, or descriptors of both as
    (T, K) and (X N, K). Programs go through the tiles, n_programs apart; GROUP tiles of rows share what they read of
    the weights in the second-level cache."""
    n_across = tl.cdiv(n_outputs, BLOCK_N)
    if offsets is not None:
        first_X, end_X, tiles_X = expert_tiles(offsets, EXPERTS, PADDED, BLOCK_M)
        n_down = tl.max(tiles_X, 0)
    else:
        n_down = tl.cdiv(n_rows, BLOCK_M)
    n_tiles = n_across * n_down
    for tile in tl.range(tl.program_id(0), n_tiles, n_programs, flatten=FLATTEN):
        group = tile // (GROUP * n_across)
        height = tl.minimum(n_down - group * GROUP, GROUP)
        down = group * GROUP + (tile % (GROUP * n_across)) % height
        across = (tile % (GROUP * n_across)) // height
        if offsets is not None:
            x_X = tl.arange(0, PADDED)
            expert = tl.sum((tiles_X <= down).to(tl.int32), 0)
            here_X = x_X == expert
            before = tl.sum(tl.where(x_X == expert - 1, tiles_X, 0), 0)
            row = tl.sum(tl.where(here_X, first_X, 0), 0) + (down - before) * BLOCK_M
            row_end = tl.sum(tl.where(here_X, end_X, 0), 0)
        else:
            expert = 0
            row = down * BLOCK_M
            row_end = n_rows
        column = across * BLOCK_N
        m_M = row + tl.arange(0, BLOCK_M)
        n_N = column + tl.arange(0, BLOCK_N)
        sum_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
        if DESCRIBED:
            for k in range(0, K, BLOCK_K):
                x_MK = x.load([row, k])
                weight_NK = weight.load([expert * n_outputs + column, k])
                sum_MN = tl.dot(x_MK, weight_NK.T, sum_MN, out_dtype=tl.int32)
        else:
            k_K = tl.arange(0, BLOCK_K)
            x_M1 = tl.minimum(m_M, n_rows - 1).to(tl.int64)[:, None] * K
            weight_N1 = (tl.minimum(n_N, n_outputs - 1) + expert * n_outputs).to(tl.int64)[:, None] * K
            for k in range(0, K, BLOCK_K):
                if K % BLOCK_K == 0:
                    x_MK = tl.load(x + x_M1 + k + k_K[None])
                    weight_NK = tl.load(weight + weight_N1 + k + k_K[None])
                else:
                    x_MK = tl.load(x + x_M1 + k + k_K[None], mask=(k + k_K < K)[None], other=0)
                    weight_NK = tl.load(weight + weight_N1 + k + k_K[None], mask=(k + k_K < K)[None], other=0)
                sum_MN = tl.dot(x_MK, weight_NK.T, sum_MN, out_dtype=tl.int32)
        x_scale_M = tl.load(x_scale + m_M, mask=m_M < row_end, other=0)
        scale_N = tl.load(scale + expert * n_outputs + n_N, mask=n_N < n_outputs, other=0)
        y_MN = sum_MN.to(tl.float32) * scale_N[None] * x_scale_M[:, None]
        if bias is not None:
            y_MN += tl.load(bias + expert * n_outputs + n_N, mask=n_N < n_outputs, other=0).to(tl.float32)[None]
        spot_MN = y + m_M.to(tl.int64)[:, None] * y_row + n_N[None]
        mask_MN = (m_M < row_end)[:, None] & (n_N < n_outputs)[None]
        tl.store(spot_MN, y_MN.to(y.dtype.element_ty), mask=mask_MN)


@triton.jit
def few_rows(
    x, weight, scale, bias, offsets, y, n_rows, n_outputs, n_splits, span, x_row,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Outputs of up to BLOCK_M rows from int8 weights, read once. Program (block of outputs, span of inputs, expert).
    WHOLE: y (T, N) is finished here; else y (n_splits, T, N) fp32 are sums over spans, which `finish` adds."""
    expert = tl.program_id(2).to(tl.int64)
    split = tl.program_id(1)
    row = 0
    row_end = n_rows
    if offsets is not None:
        row = tl.load(offsets + expert)
        row_end = tl.load(offsets + expert + 1)
    if row < row_end:
        m_M = row + tl.arange(0, BLOCK_M)
        n_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        k_K = tl.arange(0, BLOCK_K)
        x_M1 = tl.minimum(m_M, row_end - 1).to(tl.int64)[:, None] * x_row
        weight_N1 = (expert * n_outputs + tl.minimum(n_N, n_outputs - 1))[:, None] * K
        begin = split * span
        end = tl.minimum(begin + span, K)
        sum_NM = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for k in range(begin, end, BLOCK_K):
            if K % BLOCK_K == 0:
                weight_NK = tl.load(weight + weight_N1 + k + k_K[None])
                x_MK = tl.load(x + x_M1 + k + k_K[None])
            else:
                weight_NK = tl.load(weight + weight_N1 + k + k_K[None], mask=(k + k_K < K)[None], other=0)
                x_MK = tl.load(x + x_M1 + k + k_K[None], mask=(k + k_K < K)[None], other=0)
            # int8 is exact in bf16
            sum_NM = tl.dot(weight_NK.to(x_MK.dtype), x_MK.T, sum_NM, input_precision="ieee")
        mask_NM = (n_N < n_outputs)[:, None] & (m_M < row_end)[None]
        spot_NM = y + m_M.to(tl.int64)[None] * n_outputs + n_N[:, None]
        if WHOLE:
            sum_NM *= tl.load(scale + expert * n_outputs + n_N, mask=n_N < n_outputs, other=0)[:, None]
            if bias is not None:
                bias_N = tl.load(bias + expert * n_outputs + n_N, mask=n_N < n_outputs, other=0)
                sum_NM += bias_N.to(tl.float32)[:, None]
            tl.store(spot_NM, sum_NM.to(y.dtype.element_ty), mask=mask_NM)
        else:
            tl.store(spot_NM + split.to(tl.int64) * n_rows * n_outputs, sum_NM, mask=mask_NM)


@triton.jit
def finish(
    parts, scale, bias, offsets, y, n_rows, n_outputs,
    SPLITS: tl.constexpr, EXPERTS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y (T, N) = scale * (the sum of parts (SPLITS, T, N), in their order) + bias; one row, BLOCK outputs a program."""
    row = tl.program_id(1).to(tl.int64)
    n_N = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask_N = n_N < n_outputs
    expert = 0
    if offsets is not None:
        x_X = tl.arange(0, PADDED)
        end_X = tl.load(offsets + x_X + 1, mask=x_X < EXPERTS, other=2147483647)
        expert = tl.sum((end_X <= row).to(tl.int32), 0)
    sum_N = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        sum_N += tl.load(parts + (split * n_rows + row) * n_outputs + n_N, mask=mask_N, other=0)
    sum_N *= tl.load(scale + expert * n_outputs + n_N, mask=mask_N, other=0)
    if bias is not None:
        sum_N += tl.load(bias + expert * n_outputs + n_N, mask=mask_N, other=0).to(tl.float32)
    tl.store(y + row * n_outputs + n_N, sum_N.to(y.dtype.element_ty), mask=mask_N)
