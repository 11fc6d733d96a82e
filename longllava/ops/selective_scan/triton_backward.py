"""The scan's backward kernels in Triton. Letters as in triton_parts.

States are computed again: from the one saved before a chunk of tokens to the one before each of its tiles (kept in a
scratch that stays in the L2 cache), then within a tile, in registers. What is summed over channels (the gradients of
B and C) is summed within a block and left as one partial sum a block, so that the order of addition is fixed.
"""

import triton
import triton.language as tl

from longllava.ops.selective_scan.triton_parts import (
    LOG2E,
    is_reset,
    masked_rows,
    masked_tile,
    over_states,
    per_channel,
    places,
    put,
    real_tokens,
    sigmoid,
    state_places,
    step_sizes,
    token,
    within,
)


@triton.jit
def gated(grad_EK, z_EK):
    """The gradient of y before the gate."""
    if z_EK is None:
        return grad_EK
    else:
        return grad_EK * z_EK * sigmoid(z_EK)


@triton.jit
def write(x, x_EK, at, e_EK, mask_EK, STEP: tl.constexpr, K: tl.constexpr):
    spot_EK = x + at * STEP + tl.arange(0, K).to(tl.int64)[None] * STEP + e_EK
    tl.store(spot_EK, x_EK.to(x.dtype.element_ty), mask=mask_EK)


@triton.jit
def backward_states(
    delta, A, C, z, bias, flags, grad_y, pieces, sums,
    delta_batch, C_batch, z_batch, grad_y_batch,
    length, span, n_splits,
    DELTA_STEP: tl.constexpr, C_STEP: tl.constexpr, Z_STEP: tl.constexpr, GRAD_Y_STEP: tl.constexpr,
    SOFTPLUS: tl.constexpr, CHANNELS: tl.constexpr, N: tl.constexpr,
    BLOCK: tl.constexpr, K: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """What each span adds to the gradient of the state before it (pieces), and its sum of steps: for `join`."""
    b, split, _, e_E, begin, end = places(tl.program_id(0), span, length, n_splits, CHANNELS, BLOCK)
    spot_EKS, exists_EKS, n_KS = state_places(e_E, CHANNELS, N, K, S)
    e_EK = within(e_E, CHANNELS, BLOCK)
    delta += b * delta_batch
    C += b * C_batch
    if z is not None:
        z += b * z_batch
    grad_y += b * grad_y_batch
    if flags is not None:
        flags += b * length
    a_EKS = tl.load(A + spot_EKS, mask=exists_EKS, other=0) * LOG2E
    bias_E1 = per_channel(bias, e_E, CHANNELS) if bias is not None else None
    g_EKS = tl.zeros([BLOCK, K, S], tl.float32)
    sum_EK = tl.zeros([BLOCK, K], tl.float32)
    n_tiles = tl.cdiv(end - begin, K)
    for i in range(n_tiles):
        at = (begin + (n_tiles - 1 - i) * K).to(tl.int64)
        real_1K = real_tokens(at, end, flags, K)
        step_EK = step_sizes(masked_tile(delta, e_EK, at, real_1K, DELTA_STEP, K), bias_E1, SOFTPLUS)
        step_EK = tl.where(real_1K, step_EK, 0.0)
        sum_EK += step_EK
        z_EK = masked_tile(z, e_EK, at, real_1K, Z_STEP, K) if z is not None else None
        grad_EK = gated(masked_tile(grad_y, e_EK, at, real_1K, GRAD_Y_STEP, K), z_EK)
        C_rows = masked_rows(C, n_KS, at, end, flags, C_STEP, N, K)
        for k in tl.static_range(K - 1, -1, -1):
            g_EKS = tl.exp2(token(step_EK, k) * a_EKS) * (g_EKS + C_rows[k][None] * token(grad_EK, k))
            if flags is not None:
                reset = is_reset(at + k, end, flags)
                g_EKS = tl.where(reset, 0.0, g_EKS)
                sum_EK = tl.where(reset, float("nan"), sum_EK)
    tl.store(pieces + (b * n_splits + split) * CHANNELS * N + spot_EKS, g_EKS, mask=exists_EKS)
    tl.store(sums + (b * n_splits + split) * CHANNELS + e_E, tl.sum(sum_EK, 1), mask=e_E < CHANNELS)


@triton.jit
def backward(
    u, delta, A, B, C, D, z, bias, flags, grad_y, grad_state, saved, scratch,
    grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias, grad_start,
    u_batch, delta_batch, B_batch, C_batch, z_batch, grad_y_batch,
    batch, length, span, n_splits,
    U_STEP: tl.constexpr, DELTA_STEP: tl.constexpr, B_STEP: tl.constexpr, C_STEP: tl.constexpr, Z_STEP: tl.constexpr,
    GRAD_Y_STEP: tl.constexpr, GRAD_STEP: tl.constexpr, SOFTPLUS: tl.constexpr, CHANNELS: tl.constexpr, N: tl.constexpr,
    BLOCK: tl.constexpr, K: tl.constexpr, S: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """grad_state, grad_start (B, n_splits, E, N): of the state after and before each span. grad_u, grad_delta, grad_z
    (B, L, E); grad_A (B, n_splits, E, N), grad_D, grad_bias (B, n_splits, E), grad_B, grad_C (blocks, B, L, N):
    partial sums, to be added over their first axes.
    """
    b, split, block, e_E, begin, end = places(tl.program_id(0), span, length, n_splits, CHANNELS, BLOCK)
    spot_EKS, exists_EKS, n_KS = state_places(e_E, CHANNELS, N, K, S)
    mask_E1 = (e_E < CHANNELS)[:, None]
    e_EK = within(e_E, CHANNELS, BLOCK)
    u += b * u_batch
    delta += b * delta_batch
    B += b * B_batch
    C += b * C_batch
    if z is not None:
        z += b * z_batch
        grad_z += b * length * GRAD_STEP
    grad_y += b * grad_y_batch
    grad_u += b * length * GRAD_STEP
    grad_delta += b * length * GRAD_STEP
    if flags is not None:
        flags += b * length
    one_state = CHANNELS * N
    here = (b * n_splits + split) * one_state + spot_EKS
    saved += b * tl.cdiv(length, CHUNK) * one_state
    own_EKS = (tl.arange(0, BLOCK)[:, None, None] * K + tl.arange(0, K)[None, :, None]) * S
    own_EKS = scratch + tl.program_id(0).to(tl.int64) * (CHUNK * BLOCK * S) + own_EKS + tl.arange(0, S)[None, None]
    a_EKS = tl.load(A + spot_EKS, mask=exists_EKS, other=0) * LOG2E
    bias_E1 = per_channel(bias, e_E, CHANNELS) if bias is not None else None
    D_E1 = per_channel(D, e_E, CHANNELS) if D is not None else None
    if grad_state is not None:
        g_EKS = tl.load(grad_state + here, mask=exists_EKS, other=0)
    else:
        g_EKS = tl.zeros([BLOCK, K, S], tl.float32)
    sum_A_EKS = tl.zeros([BLOCK, K, S], tl.float32)
    sum_D_EK = tl.zeros([BLOCK, K], tl.float32)
    sum_bias_EK = tl.zeros([BLOCK, K], tl.float32)

    n_chunks = tl.cdiv(end - begin, CHUNK)
    for i in range(n_chunks):
        start = (begin + (n_chunks - 1 - i) * CHUNK).to(tl.int64)
        n_tiles = tl.cdiv(tl.minimum(start + CHUNK, end) - start, K)
        h_EKS = tl.load(saved + start // CHUNK * one_state + spot_EKS, mask=exists_EKS, other=0)
        for j in range(n_tiles):
            tl.store(own_EKS + j * (BLOCK * K * S), h_EKS)
            at = start + j * K
            real_EK = real_tokens(at, end, flags, K) & mask_E1
            step_EK = step_sizes(masked_tile(delta, e_EK, at, real_EK, DELTA_STEP, K), bias_E1, SOFTPLUS)
            step_EK = tl.where(real_EK, step_EK, 0.0)
            x_EK = step_EK * masked_tile(u, e_EK, at, real_EK, U_STEP, K)
            B_rows = masked_rows(B, n_KS, at, end, flags, B_STEP, N, K)
            for k in tl.static_range(K):
                if flags is not None:
                    h_EKS = tl.where(is_reset(at + k, end, flags), 0.0, h_EKS)
                h_EKS = tl.exp2(token(step_EK, k) * a_EKS) * h_EKS + token(x_EK, k) * B_rows[k][None]
        tl.debug_barrier()  # what this block wrote to the scratch may be read by another of its threads
        for j in range(n_tiles):
            at = start + (n_tiles - 1 - j) * K
            h_EKS = tl.load(own_EKS + (n_tiles - 1 - j) * (BLOCK * K * S))
            real_EK = real_tokens(at, end, flags, K) & mask_E1
            u_EK = masked_tile(u, e_EK, at, real_EK, U_STEP, K)
            raw_EK = masked_tile(delta, e_EK, at, real_EK, DELTA_STEP, K)
            grad_EK = masked_tile(grad_y, e_EK, at, real_EK, GRAD_Y_STEP, K)
            z_EK = masked_tile(z, e_EK, at, real_EK, Z_STEP, K) if z is not None else None
            B_rows = masked_rows(B, n_KS, at, end, flags, B_STEP, N, K)
            C_rows = masked_rows(C, n_KS, at, end, flags, C_STEP, N, K)
            step_EK = tl.where(real_EK, step_sizes(raw_EK, bias_E1, SOFTPLUS), 0.0)
            x_EK = step_EK * u_EK
            inner_EK = gated(grad_EK, z_EK)
            row = (block * batch + b) * length + at
            y_EK = tl.zeros_like(x_EK)
            before = ()
            for k in tl.static_range(K):
                if flags is not None:
                    h_EKS = tl.where(is_reset(at + k, end, flags), 0.0, h_EKS)
                before = before + (h_EKS,)  # type: ignore[assignment]
                h_EKS = tl.exp2(token(step_EK, k) * a_EKS) * h_EKS + token(x_EK, k) * B_rows[k][None]
                y_EK = put(y_EK, k, over_states(h_EKS * C_rows[k][None]))
                stored_KS = n_KS < tl.where(at + k < end, N, 0)
                tl.store(grad_C + (row + k) * N + n_KS, tl.sum(h_EKS * token(inner_EK, k), 0), mask=stored_KS)
            grad_x_EK = tl.zeros_like(x_EK)
            grad_step_EK = tl.zeros_like(x_EK)
            for k in tl.static_range(K - 1, -1, -1):
                g_EKS += C_rows[k][None] * token(inner_EK, k)
                stored_KS = n_KS < tl.where(at + k < end, N, 0)
                tl.store(grad_B + (row + k) * N + n_KS, tl.sum(g_EKS * token(x_EK, k), 0), mask=stored_KS)
                grad_x_EK = put(grad_x_EK, k, over_states(g_EKS * B_rows[k][None]))
                g_EKS *= tl.exp2(token(step_EK, k) * a_EKS)
                through_EKS = g_EKS * before[k]
                grad_step_EK = put(grad_step_EK, k, over_states(through_EKS * a_EKS))
                sum_A_EKS += through_EKS * token(step_EK, k)
                if flags is not None:
                    g_EKS = tl.where(is_reset(at + k, end, flags), 0.0, g_EKS)
            written_EK = mask_E1 & (at + tl.arange(0, K) < end)[None]
            grad_u_EK = grad_x_EK * step_EK
            if D_E1 is not None:
                y_EK += D_E1 * u_EK
                grad_u_EK += D_E1 * inner_EK
                sum_D_EK += inner_EK * u_EK
            write(grad_u, tl.where(real_EK, grad_u_EK, 0.0), at, e_EK, written_EK, GRAD_STEP, K)
            if z_EK is not None:
                s_EK = sigmoid(z_EK)
                grad_z_EK = grad_EK * y_EK * (s_EK * (1 + z_EK * (1 - s_EK)))
                write(grad_z, tl.where(real_EK, grad_z_EK, 0.0), at, e_EK, written_EK, GRAD_STEP, K)
            grad_step_EK = grad_step_EK / LOG2E + grad_x_EK * u_EK  # a_EKS holds A log2(e)
            if SOFTPLUS:
                if bias_E1 is not None:
                    raw_EK += bias_E1
                grad_step_EK *= sigmoid(raw_EK)
            grad_step_EK = tl.where(real_EK, grad_step_EK, 0.0)
            sum_bias_EK += grad_step_EK
            write(grad_delta, grad_step_EK, at, e_EK, written_EK, GRAD_STEP, K)
        tl.debug_barrier()  # and the next chunk overwrites it

    tl.store(grad_start + here, g_EKS, mask=exists_EKS)
    tl.store(grad_A + here, sum_A_EKS, mask=exists_EKS)
    per_E = (b * n_splits + split) * CHANNELS + e_E
    if grad_D is not None:
        tl.store(grad_D + per_E, tl.sum(sum_D_EK, 1), mask=e_E < CHANNELS)
    if grad_bias is not None:
        tl.store(grad_bias + per_E, tl.sum(sum_bias_EK, 1), mask=e_E < CHANNELS)
