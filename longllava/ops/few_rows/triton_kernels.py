"""Products of a handful of rows in Triton, without tensor cores: memory is what there is least of."""

import triton
import triton.language as tl


@triton.jit
def widened(weight):
    """As fp32, exactly. int8 by way of 2^23 + 128 + weight, whose last byte that is: a GPU converts from integers at an
    eighth of the rate at which it adds floats, too slow for memory's."""
    if weight.dtype == tl.int8:
        bits = weight.to(tl.uint8, bitcast=True).to(tl.int32) ^ 0x4B000080
        return bits.to(tl.float32, bitcast=True) - 8388736.0
    else:
        return weight.to(tl.float32)


@triton.jit
def multiply(
    x, weight, scale, bias, y, n_outputs, weight_row, K: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y (ROWS, N) = scale x (ROWS, K) weight (N, K)^T + bias; a program makes BLOCK_N outputs of all rows."""
    n_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k_K = tl.arange(0, BLOCK_K)
    weight_N1 = tl.minimum(n_N, n_outputs - 1).to(tl.int64)[:, None] * weight_row
    sums = ()  # type: ignore[var-annotated]
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.zeros([BLOCK_N, BLOCK_K], tl.float32),)  # type: ignore[assignment]
    for k in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            weight_NK = tl.load(weight + weight_N1 + k + k_K[None], eviction_policy="evict_first")
        else:
            inside_1K = (k + k_K < K)[None]
            weight_NK = tl.load(weight + weight_N1 + k + k_K[None], mask=inside_1K, other=0)
        wide_NK = widened(weight_NK)
        added = ()  # type: ignore[var-annotated]
        for m in tl.static_range(ROWS):
            if K % BLOCK_K == 0:
                x_K = tl.load(x + m * K + k + k_K).to(tl.float32)
            else:
                x_K = tl.load(x + m * K + k + k_K, mask=k + k_K < K, other=0).to(tl.float32)
            added = added + (sums[m] + wide_NK * x_K[None],)  # type: ignore[assignment]
        sums = added
    for m in tl.static_range(ROWS):
        y_N = tl.sum(sums[m], 1)
        if scale is not None:
            y_N *= tl.load(scale + n_N, mask=n_N < n_outputs, other=0)
        if bias is not None:
            y_N += tl.load(bias + n_N, mask=n_N < n_outputs, other=0).to(tl.float32)
        tl.store(y + m * n_outputs + n_N, y_N.to(y.dtype.element_ty), mask=n_N < n_outputs)
