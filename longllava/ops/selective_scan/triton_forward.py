"""The scan's forward kernel in Triton, and the one that joins pieces of time. Letters as in triton_parts."""

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
    rows,
    sigmoid,
    state_places,
    step_sizes,
    tile,
    token,
    within,
)


@triton.jit
def advance(h_EKS, a_EKS, step_EK, u_EK, B_rows, C_rows, at, end, flags, STEPS: tl.constexpr):
    """h after the tile's tokens, and y before skip and gate, (E, K). Without C_rows y is 0."""
    x_EK = step_EK * u_EK
    y_EK = tl.zeros_like(x_EK)
    for k in tl.static_range(STEPS):
        if flags is not None:
            h_EKS = tl.where(is_reset(at + k, end, flags), 0.0, h_EKS)
        h_EKS = tl.exp2(token(step_EK, k) * a_EKS) * h_EKS + token(x_EK, k) * B_rows[k].to(tl.float32)[None]
        if C_rows is not None:
            y_EK = put(y_EK, k, over_states(h_EKS * C_rows[k].to(tl.float32)[None]))
    return h_EKS, y_EK


@triton.jit
def write(y, y_EK, u_EK, z_EK, D_E1, at, e_EK, mask_EK, STEP: tl.constexpr, K: tl.constexpr):
    """Skip, gate and store."""
    if D_E1 is not None:
        y_EK += D_E1 * u_EK
    if z_EK is not None:
        y_EK *= z_EK * sigmoid(z_EK)
    spot_EK = y + at.to(tl.int64) * STEP + tl.arange(0, K).to(tl.int64)[None] * STEP + e_EK
    tl.store(spot_EK, y_EK.to(y.dtype.element_ty), mask=mask_EK)


@triton.jit
def load(u, delta, z, e_EK, at, U_STEP: tl.constexpr, DELTA_STEP: tl.constexpr, Z_STEP: tl.constexpr, K: tl.constexpr):
    """What a whole tile reads of its channels. In place of z, if there is none, stands u: nobody looks."""
    u_EK = tile(u, e_EK, at, U_STEP, K)
    return u_EK, tile(delta, e_EK, at, DELTA_STEP, K), tile(z, e_EK, at, Z_STEP, K) if z is not None else u_EK


@triton.jit
def forward(
    u, delta, A, B, C, D, z, bias, state, flags, y, ends, sums, saved,
    u_batch, delta_batch, B_batch, C_batch, z_batch,
    length, span, n_splits,
    U_STEP: tl.constexpr, DELTA_STEP: tl.constexpr, B_STEP: tl.constexpr, C_STEP: tl.constexpr, Z_STEP: tl.constexpr,
    Y_STEP: tl.constexpr, SOFTPLUS: tl.constexpr, FAST: tl.constexpr,
    CHANNELS: tl.constexpr, N: tl.constexpr,
    BLOCK: tl.constexpr, K: tl.constexpr, S: tl.constexpr, STEPS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program: a block of channels, one row, one span of time. Time is cut in n_splits spans.

    state (B, n_splits, E, N): before each span. ends, alike: after it. sums (B, n_splits, E): the span's sum of
    steps, NaN if it has a reset; with it only states are computed, no y. saved (B, chunks, E, N): before each CHUNK
    tokens. flags (B, L) int8: 1 padding, 2 reset. FAST: no flags, and at least K tokens. None: not wanted.
    """
    b, split, _, e_E, begin, end = places(tl.program_id(0), span, length, n_splits, CHANNELS, BLOCK)
    spot_EKS, exists_EKS, n_KS = state_places(e_E, CHANNELS, N, K, S)
    mask_E1 = (e_E < CHANNELS)[:, None]
    e_EK = within(e_E, CHANNELS, BLOCK)
    u += b * u_batch
    delta += b * delta_batch
    B += b * B_batch
    if C is not None:
        C += b * C_batch
    if z is not None:
        z += b * z_batch
    if y is not None:
        y += b * length * Y_STEP
    if flags is not None:
        flags += b * length
    a_EKS = tl.load(A + spot_EKS, mask=exists_EKS, other=0) * LOG2E
    one_state = CHANNELS * N
    if state is not None:
        h_EKS = tl.load(state + (b * n_splits + split) * one_state + spot_EKS, mask=exists_EKS, other=0)
    else:
        h_EKS = tl.zeros([BLOCK, K, S], tl.float32)
    if saved is not None:
        saved += b * tl.cdiv(length, CHUNK) * one_state
    bias_E1 = per_channel(bias, e_E, CHANNELS) if bias is not None else None
    D_E1 = per_channel(D, e_E, CHANNELS) if D is not None else None
    sum_EK = tl.zeros([BLOCK, K], tl.float32)

    at = begin
    if FAST:
        # what a tile reads is asked for before it is needed: rows of B and C, which the L2 cache has, one tile ahead,
        # channels, which come from memory, three
        last = length - K
        B_next = rows(B, n_KS, tl.minimum(at, last), B_STEP, N, K)
        C_next = rows(C, n_KS, tl.minimum(at, last), C_STEP, N, K) if C is not None else B_next
        first = load(u, delta, z, e_EK, tl.minimum(at, last), U_STEP, DELTA_STEP, Z_STEP, K)
        second = load(u, delta, z, e_EK, tl.minimum(at + K, last), U_STEP, DELTA_STEP, Z_STEP, K)
        third = load(u, delta, z, e_EK, tl.minimum(at + 2 * K, last), U_STEP, DELTA_STEP, Z_STEP, K)
        for _ in tl.range(0, (end - begin) // K, loop_unroll_factor=3):
            B_rows, C_rows = B_next, C_next
            B_next = rows(B, n_KS, tl.minimum(at + K, last), B_STEP, N, K)
            C_next = rows(C, n_KS, tl.minimum(at + K, last), C_STEP, N, K) if C is not None else B_next
            fourth = load(u, delta, z, e_EK, tl.minimum(at + 3 * K, last), U_STEP, DELTA_STEP, Z_STEP, K)
            if saved is not None:
                if at % CHUNK == 0:
                    tl.store(saved + (at // CHUNK).to(tl.int64) * one_state + spot_EKS, h_EKS, mask=exists_EKS)
            u_EK = first[0].to(tl.float32)
            step_EK = step_sizes(first[1].to(tl.float32), bias_E1, SOFTPLUS)
            h_EKS, y_EK = advance(
                h_EKS, a_EKS, step_EK, u_EK, B_rows, C_rows if C is not None else None, at, end, None, K
            )
            if sums is not None:
                sum_EK += step_EK
            if y is not None:
                z_EK = first[2].to(tl.float32) if z is not None else None
                write(y, y_EK, u_EK, z_EK, D_E1, at, e_EK, mask_E1, Y_STEP, K)
            first, second, third = second, third, fourth
            at += K
    for i in range(tl.cdiv(end - at, K)):
        tail = at + i * K
        real_1K = real_tokens(tail, end, flags, K)
        u_EK = masked_tile(u, e_EK, tail, real_1K, U_STEP, K)
        delta_EK = masked_tile(delta, e_EK, tail, real_1K, DELTA_STEP, K)
        if saved is not None:
            if tail % CHUNK == 0:
                tl.store(saved + (tail // CHUNK).to(tl.int64) * one_state + spot_EKS, h_EKS, mask=exists_EKS)
        step_EK = tl.where(real_1K, step_sizes(delta_EK, bias_E1, SOFTPLUS), 0.0)
        B_rows = masked_rows(B, n_KS, tail, end, flags, B_STEP, N, STEPS)
        C_rows = masked_rows(C, n_KS, tail, end, flags, C_STEP, N, STEPS) if C is not None else None
        h_EKS, y_EK = advance(h_EKS, a_EKS, step_EK, u_EK, B_rows, C_rows, tail, end, flags, STEPS)
        if sums is not None:
            sum_EK += step_EK
            if flags is not None:
                for k in tl.static_range(STEPS):
                    sum_EK = tl.where(is_reset(tail + k, end, flags), float("nan"), sum_EK)
        if y is not None:
            z_EK = masked_tile(z, e_EK, tail, real_1K, Z_STEP, K) if z is not None else None
            written_EK = mask_E1 & (tail + tl.arange(0, K) < end)[None]
            write(y, tl.where(real_1K, y_EK, 0.0), u_EK, z_EK, D_E1, tail, e_EK, written_EK, Y_STEP, K)

    tl.store(ends + (b * n_splits + split) * one_state + spot_EKS, h_EKS, mask=exists_EKS)
    if sums is not None:
        tl.store(sums + (b * n_splits + split) * CHANNELS + e_E, tl.sum(sum_EK, 1), mask=e_E < CHANNELS)


@triton.jit
def join(
    pieces, sums, A, state, ends, n_splits,
    REVERSE: tl.constexpr, CHANNELS: tl.constexpr, N: tl.constexpr,
    BLOCK: tl.constexpr, K: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """From what each span adds to an empty state (pieces, replaced) and its sum of steps to the state before each.

    pieces (B, n_splits, E, N); state (B, E, N) before the first or None; ends (B, E, N) after the last. REVERSE:
    from the last span to the first, for gradients.
    """
    b, _, _, e_E, _, _ = places(tl.program_id(0), 0, 0, 1, CHANNELS, BLOCK)
    spot_EKS, exists_EKS, _ = state_places(e_E, CHANNELS, N, K, S)
    one_state = CHANNELS * N
    a_EKS = tl.load(A + spot_EKS, mask=exists_EKS, other=0) * LOG2E
    if state is not None:
        h_EKS = tl.load(state + b * one_state + spot_EKS, mask=exists_EKS, other=0)
    else:
        h_EKS = tl.zeros([BLOCK, K, S], tl.float32)
    for i in range(n_splits):
        split = b * n_splits + (n_splits - 1 - i if REVERSE else i)
        sum_E11 = tl.load(sums + split * CHANNELS + e_E, mask=e_E < CHANNELS, other=0)[:, None, None]
        added_EKS = tl.load(pieces + split * one_state + spot_EKS, mask=exists_EKS, other=0)
        tl.store(pieces + split * one_state + spot_EKS, h_EKS, mask=exists_EKS)
        # NaN marks a reset; a step that is NaN itself has made what is added NaN, and that stays
        h_EKS = added_EKS + tl.where(sum_E11 == sum_E11, tl.exp2(sum_E11 * a_EKS) * h_EKS, 0.0)
    tl.store(ends + b * one_state + spot_EKS, h_EKS, mask=exists_EKS)
