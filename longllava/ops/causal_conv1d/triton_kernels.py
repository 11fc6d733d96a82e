"""The causal convolution's kernels in Triton. T tokens and E channels of a block, TAPS taps, PAST = TAPS - 1.

The line is the initial state's PAST rows, then the tokens. Token t reads line positions t .. t + PAST, unless `sources`
says which: then padding is passed over, and -1 stands for what lies before the sequence.
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    # the square of a reciprocal square root: a division takes six instructions, this two
    root = tl.rsqrt(1.0 + tl.exp2(-1.4426950408889634 * x))
    return root * root


@triton.jit
def places(pid, length, CHANNELS: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr):
    """(row of the batch, first token, channels E) of a program, all int64: blocks of channels fastest, then of time."""
    n_blocks: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
    n_times = tl.cdiv(length, T)
    e_E = (pid % n_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    time = pid // n_blocks
    return (time // n_times).to(tl.int64), (time % n_times).to(tl.int64) * T, e_E


@triton.jit
def line(x, state, p_T, e_E, length, X_STEP: tl.constexpr, STATE_STEP: tl.constexpr, CHANNELS: tl.constexpr,
         PAST: tl.constexpr):  # fmt: skip
    """The line at positions p, (T, E) fp32; 0 where there is nothing."""
    t_T1 = (p_T - PAST)[:, None]
    mask_1E = (e_E < CHANNELS)[None]
    mask_TE = (t_T1 >= 0) & (t_T1 < length) & mask_1E
    row_TE = tl.load(x + t_T1 * X_STEP + e_E[None], mask=mask_TE, other=0).to(tl.float32)
    if state is not None:
        mask_TE = (p_T >= 0)[:, None] & (t_T1 < 0) & mask_1E
        row_TE += tl.load(state + p_T[:, None] * STATE_STEP + e_E[None], mask=mask_TE, other=0).to(tl.float32)
    return row_TE


@triton.jit
def source(sources, t_T, length, k: tl.constexpr, TAPS: tl.constexpr):
    """Where in the line the tokens' tap k reads."""
    if sources is None:
        return t_T + k
    else:
        return tl.load(sources + t_T * TAPS + k, mask=t_T < length, other=-1).to(tl.int64)


@triton.jit
def convolve(x, weight, bias, state, sources, t_T, e_E, length, X_STEP: tl.constexpr, STATE_STEP: tl.constexpr,
             CHANNELS: tl.constexpr, TAPS: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The sums before the activation, (T, E) fp32."""
    mask_E = e_E < CHANNELS
    sum_TE = tl.zeros([T, BLOCK], tl.float32)
    for k in tl.static_range(TAPS):
        weight_E = tl.load(weight + e_E * TAPS + k, mask=mask_E, other=0).to(tl.float32)
        p_T = source(sources, t_T, length, k, TAPS)
        sum_TE += weight_E[None] * line(x, state, p_T, e_E, length, X_STEP, STATE_STEP, CHANNELS, TAPS - 1)
    if bias is not None:
        sum_TE += tl.load(bias + e_E, mask=mask_E, other=0).to(tl.float32)[None]
    return sum_TE


@triton.jit
def forward(
    x, weight, bias, state, sources, last, y, state_out, x_batch, state_batch, length,
    X_STEP: tl.constexpr, STATE_STEP: tl.constexpr, SILU: tl.constexpr,
    CHANNELS: tl.constexpr, TAPS: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y (B, L, E); state_out (B, PAST, E): the line at positions last (B, PAST), or its end without them."""
    b, begin, e_E = places(tl.program_id(0), length, CHANNELS, T, BLOCK)
    PAST: tl.constexpr = TAPS - 1
    x += b * x_batch
    if state is not None:
        state += b * state_batch
    if sources is not None:
        sources += b * length * TAPS
    t_T = begin + tl.arange(0, T)
    if sources is None and begin > 0:  # no window reaches the state
        y_TE = convolve(x, weight, bias, None, None, t_T, e_E, length, X_STEP, STATE_STEP, CHANNELS, TAPS, T, BLOCK)
    else:
        y_TE = convolve(x, weight, bias, state, sources, t_T, e_E, length, X_STEP, STATE_STEP, CHANNELS, TAPS, T, BLOCK)
    if SILU:
        y_TE *= sigmoid(y_TE)
    if sources is not None:
        y_TE = tl.where((source(sources, t_T, length, PAST, TAPS) >= 0)[:, None], y_TE, 0.0)
    mask_TE = (t_T < length)[:, None] & (e_E < CHANNELS)[None]
    tl.store(y + (b * length + t_T)[:, None] * CHANNELS + e_E[None], y_TE.to(y.dtype.element_ty), mask=mask_TE)
    if begin == 0:
        kept = ()  # type: ignore[var-annotated]
        for j in tl.static_range(PAST):
            if last is not None:
                p_1 = tl.load(last + b * PAST + j + tl.arange(0, 1)).to(tl.int64)
            else:
                p_1 = tl.arange(0, 1).to(tl.int64) + length + j
            row_1E = line(x, state, p_1, e_E, length, X_STEP, STATE_STEP, CHANNELS, PAST)
            kept = kept + (row_1E,)  # type: ignore[assignment]
        tl.debug_barrier()  # state_out may be state: all of it has been read
        for j in tl.static_range(PAST):
            spot_1E = state_out + (b * PAST + j) * CHANNELS + e_E[None]
            tl.store(spot_1E, kept[j].to(state_out.dtype.element_ty), mask=(e_E < CHANNELS)[None])


@triton.jit
def backward_sums(
    x, weight, bias, state, sources, grad_y, grad_sums, grad_weight, grad_bias,
    x_batch, state_batch, grad_y_batch, length,
    X_STEP: tl.constexpr, STATE_STEP: tl.constexpr, GRAD_Y_STEP: tl.constexpr, SILU: tl.constexpr,
    CHANNELS: tl.constexpr, TAPS: tl.constexpr, T: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of the sums, (B, L, E) fp32, and a program's part, over its TILES x T tokens, of those of weight
    (programs, E, TAPS) and bias (programs, E)."""
    b, begin, e_E = places(tl.program_id(0), length, CHANNELS, T * TILES, BLOCK)
    x += b * x_batch
    grad_y += b * grad_y_batch
    if state is not None:
        state += b * state_batch
    if sources is not None:
        sources += b * length * TAPS
    mask_E = e_E < CHANNELS
    part = (b * tl.cdiv(length, T * TILES) + begin // (T * TILES)) * CHANNELS + e_E
    taps_P = tl.arange(0, triton.next_power_of_2(TAPS))
    sum_weight_EP = tl.zeros([BLOCK, triton.next_power_of_2(TAPS)], tl.float32)
    sum_bias_E = tl.zeros([BLOCK], tl.float32)
    for i in range(TILES):
        t_T = begin + i * T + tl.arange(0, T)
        mask_TE = (t_T < length)[:, None] & mask_E[None]
        real_TE = mask_TE
        if sources is not None:
            real_TE = real_TE & (source(sources, t_T, length, TAPS - 1, TAPS) >= 0)[:, None]
        spot_TE = t_T[:, None] * GRAD_Y_STEP + e_E[None]
        grad_TE = tl.load(grad_y + spot_TE, mask=real_TE, other=0).to(tl.float32)
        if SILU:
            y_TE = convolve(
                x, weight, bias, state, sources, t_T, e_E, length, X_STEP, STATE_STEP, CHANNELS, TAPS, T, BLOCK
            )
            s_TE = sigmoid(y_TE)
            # far out y times (1 - s) is infinity times 0
            slope_TE = s_TE * (1 + tl.where(s_TE < 1, y_TE * (1 - s_TE), 0.0))
            # a real token's NaN stays; what stands at the others is of no token
            grad_TE = tl.where(real_TE, grad_TE * tl.where(s_TE == 0, 0.0, slope_TE), 0.0)
        tl.store(grad_sums + (b * length + t_T)[:, None] * CHANNELS + e_E[None], grad_TE, mask=mask_TE)
        sum_bias_E += tl.sum(grad_TE, 0)
        for k in tl.static_range(TAPS):
            p_T = source(sources, t_T, length, k, TAPS)
            read_TE = line(x, state, p_T, e_E, length, X_STEP, STATE_STEP, CHANNELS, TAPS - 1)
            sum_weight_EP += tl.where(taps_P[None] == k, tl.sum(grad_TE * read_TE, 0)[:, None], 0.0)
    mask_EP = mask_E[:, None] & (taps_P < TAPS)[None]
    tl.store(grad_weight + part[:, None] * TAPS + taps_P[None], sum_weight_EP, mask=mask_EP)
    tl.store(grad_bias + part, sum_bias_E, mask=mask_E)


@triton.jit
def backward_line(
    grad_sums, weight, users, last, grad_state, grad_x, grad_start, grad_state_batch, length,
    GRAD_STATE_STEP: tl.constexpr,
    CHANNELS: tl.constexpr, TAPS: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of the line: its first PAST rows to grad_start, the others to grad_x. users (B, PAST + L, TAPS) is the
    token that reads a position by each tap, or -1; without it token p - k reads p by tap k."""
    PAST: tl.constexpr = TAPS - 1
    b, begin, e_E = places(tl.program_id(0), length + PAST, CHANNELS, T, BLOCK)
    mask_1E = (e_E < CHANNELS)[None]
    p_T = begin + tl.arange(0, T)
    inside_T = p_T < length + PAST
    grad_TE = tl.zeros([T, BLOCK], tl.float32)
    for k in tl.static_range(TAPS):
        if users is not None:
            user_T = tl.load(users + (b * (length + PAST) + p_T) * TAPS + k, mask=inside_T, other=-1).to(tl.int64)
        else:
            user_T = p_T - k
        mask_TE = ((user_T >= 0) & (user_T < length))[:, None] & mask_1E
        weight_E = tl.load(weight + e_E * TAPS + k, mask=e_E < CHANNELS, other=0).to(tl.float32)
        row_TE = tl.load(grad_sums + (b * length + user_T)[:, None] * CHANNELS + e_E[None], mask=mask_TE, other=0)
        grad_TE += weight_E[None] * row_TE
    if grad_state is not None:
        for j in tl.static_range(PAST):
            kept = tl.load(last + b * PAST + j) if last is not None else length + j
            spot_TE = (0 * p_T)[:, None] + grad_state + b * grad_state_batch + j * GRAD_STATE_STEP + e_E[None]
            grad_TE += tl.load(spot_TE, mask=(p_T == kept)[:, None] & mask_1E, other=0).to(tl.float32)
    mask_TE = (inside_T & (p_T >= PAST))[:, None] & mask_1E
    spot_TE = grad_x + (b * length + p_T - PAST)[:, None] * CHANNELS + e_E[None]
    tl.store(spot_TE, grad_TE.to(grad_x.dtype.element_ty), mask=mask_TE)
    mask_TE = (p_T < PAST)[:, None] & mask_1E
    spot_TE = grad_start + (b * PAST + p_T)[:, None] * CHANNELS + e_E[None]
    tl.store(spot_TE, grad_TE.to(grad_start.dtype.element_ty), mask=mask_TE)
