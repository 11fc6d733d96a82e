"""Pieces that the scan's Triton kernels share. E channels of a block, K steps of a tile, S states of a lane.

Four lanes hold a channel, each S = N / 4 of its states, and walk time serially. What is done once a token and channel
(softplus, gate, loads, stores) is spread over the same four lanes, one token each: a tile is four tokens, and a
step takes its token's values from the lane that has them by one shuffle. So no exponential is computed twice.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def exponential(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def softplus(x):
    """log(1 + exp(x)) to 2e-7 of its value: log1p as a polynomial that a fit on [0, 1] gave, no logarithm unit."""
    e = exponential(-tl.abs(x))
    p = 0.0052326936 * e - 0.02950524
    p = p * e + 0.07822596
    p = p * e - 0.13663247
    p = p * e + 0.19106008
    p = p * e - 0.24842982
    p = p * e + 0.33319098
    p = p * e - 0.49999493
    p = p * e + 0.99999994
    return tl.maximum(x, 0.0) + p * e


@triton.jit
def sigmoid(x):
    root = tl.rsqrt(1.0 + exponential(-x))  # its square costs two instructions, a division six
    return root * root


@triton.jit
def places(pid, span, length, n_splits, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """A program's row of the batch (int64), split of time, block of channels, channels (int64), first and end token."""
    n_blocks: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
    block = (pid % n_blocks).to(tl.int64)
    split = (pid // n_blocks) % n_splits
    begin = split * span
    e_E = block * BLOCK + tl.arange(0, BLOCK)
    return (pid // n_blocks // n_splits).to(tl.int64), split, block, e_E, begin, tl.minimum(begin + span, length)


@triton.jit
def state_places(e_E, CHANNELS: tl.constexpr, N: tl.constexpr, K: tl.constexpr, S: tl.constexpr):
    """Offsets (E, K, S) of a block's states in an (E, N) tensor, which of them exist, and their numbers (K, S)."""
    n_KS = tl.arange(0, K)[:, None] * S + tl.arange(0, S)[None, :]
    exists_EKS = (e_E < CHANNELS)[:, None, None] & (n_KS < N)[None]
    return e_E[:, None, None] * N + n_KS[None], exists_EKS, n_KS


@triton.jit
def within(e_E, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """Channels to read, (E, 1): those beyond the last read the last."""
    if CHANNELS % BLOCK == 0:
        return e_E[:, None]
    else:
        return tl.minimum(e_E, CHANNELS - 1)[:, None]


@triton.jit
def tile(x, e_EK, at, STEP: tl.constexpr, K: tl.constexpr):
    """Rows at .. at + K - 1 of x as (E, K), in x's dtype. Every token must exist."""
    return tl.load(x + at.to(tl.int64) * STEP + tl.arange(0, K).to(tl.int64)[None] * STEP + e_EK)


@triton.jit
def masked_tile(x, e_EK, at, real_EK, STEP: tl.constexpr, K: tl.constexpr):
    """The same in fp32, where only tokens marked real are read, and the others are 0."""
    spot_EK = x + at.to(tl.int64) * STEP + tl.arange(0, K).to(tl.int64)[None] * STEP + e_EK
    return tl.load(spot_EK, mask=real_EK, other=0).to(tl.float32)


@triton.jit
def rows(x, n_KS, at, STEP: tl.constexpr, N: tl.constexpr, STEPS: tl.constexpr):
    """A tuple of STEPS rows (K, S) of B or C, in their dtype."""
    out = ()
    for k in tl.static_range(STEPS):
        spot_KS = x + at.to(tl.int64) * STEP + k * STEP + n_KS
        if N == n_KS.numel:
            row_KS = tl.load(spot_KS)
        else:
            row_KS = tl.load(spot_KS, mask=n_KS < N, other=0)
        out = out + (row_KS,)  # type: ignore[assignment]
    return out


@triton.jit
def masked_rows(x, n_KS, at, end, flags, STEP: tl.constexpr, N: tl.constexpr, STEPS: tl.constexpr):
    """The same where tokens may be missing or padding: their rows are 0. In fp32."""
    out = ()
    for k in tl.static_range(STEPS):
        real = at + k < end
        if flags is not None:
            real = real & (tl.load(flags + at + k, mask=real, other=1) != 1)
        row_KS = tl.load(x + (at + k).to(tl.int64) * STEP + n_KS, mask=n_KS < tl.where(real, N, 0), other=0)
        out = out + (row_KS.to(tl.float32),)  # type: ignore[assignment]
    return out


@triton.jit
def real_tokens(at, end, flags, K: tl.constexpr):
    """(1, K), True where a token exists and is no padding."""
    t_K = at + tl.arange(0, K)
    real_K = t_K < end
    if flags is not None:
        real_K = real_K & (tl.load(flags + t_K, mask=real_K, other=1) != 1)
    return real_K[None]


@triton.jit
def is_reset(at, end, flags):
    """Whether the token empties the state."""
    return tl.load(flags + at, mask=at < end, other=0) == 2


@triton.jit
def token(x_EK, k: tl.constexpr):
    """Column k of (E, K), as (E, K, 1) with the same in every lane."""
    return tl.gather(x_EK, tl.full(x_EK.shape, k, tl.int32), 1)[:, :, None]


@triton.jit
def put(x_EK, k: tl.constexpr, value_E):
    """x with column k set to value."""
    return tl.where(tl.arange(0, x_EK.shape[1])[None] == k, value_E[:, None], x_EK)


@triton.jit
def over_states(x_EKS):
    """Sum over all states of each channel, (E,)."""
    return tl.sum(tl.sum(x_EKS, 2), 1)


@triton.jit
def step_sizes(delta_EK, bias_E1, SOFTPLUS: tl.constexpr):
    if bias_E1 is not None:
        delta_EK += bias_E1
    if SOFTPLUS:
        delta_EK = softplus(delta_EK)
    return delta_EK


@triton.jit
def per_channel(x, e_E, CHANNELS: tl.constexpr):
    """D or bias as (E, 1)."""
    return tl.load(x + e_E, mask=e_E < CHANNELS, other=0)[:, None]
