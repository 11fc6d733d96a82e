"""Attention's forward kernels in Triton. M rows and S keys of a block, D the head size, padded to a power of two.

A row is a query of one head: the heads that share keys are rows of one block, so that decoding, with one query, fills a
tensor core's tile as well as it can and reads every key once. Scores are kept in units of log 2.
"""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def attend(
    q_MD, k, v, begin, end, limit_M, seq_M, seq_k, scale, acc_MD, sum_M, top_M,
    K_STEP: tl.constexpr, V_STEP: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The running softmax over keys begin .. end - 1. MASKED: a row sees keys up to its limit, of its own seq_idx."""
    d_D = tl.arange(0, PADDED)
    for first in range(begin, end, BLOCK_S):
        n_S = first + tl.arange(0, BLOCK_S).to(tl.int64)
        read_S = n_S < end
        if seq_k is not None:
            seq_S = tl.load(seq_k + n_S, mask=read_S, other=-1)
            read_S = read_S & (seq_S >= 0)  # what padding holds may be NaN
        spot_SD = n_S[:, None] * K_STEP + d_D[None]
        if MASKED:
            k_SD = tl.load(k + spot_SD, mask=read_S[:, None] & (d_D < DIM)[None], other=0)
        elif DIM == PADDED:
            k_SD = tl.load(k + spot_SD)
        else:
            k_SD = tl.load(k + spot_SD, mask=(d_D < DIM)[None], other=0)
        score_MS = tl.dot(q_MD, tl.trans(k_SD), input_precision="tf32x3") * scale
        if MASKED:
            seen_MS = read_S[None] & (n_S[None] <= limit_M[:, None])
            if seq_k is not None:
                seen_MS = seen_MS & (seq_S[None] == seq_M[:, None])
            score_MS = tl.where(seen_MS, score_MS, float("-inf"))
        new_M = tl.maximum(top_M, tl.max(score_MS, 1))
        shift_M = tl.where(new_M == float("-inf"), 0.0, new_M)  # a row that has seen nothing yet
        p_MS = tl.exp2(score_MS - shift_M[:, None])
        old_M = tl.exp2(top_M - shift_M)
        sum_M = sum_M * old_M + tl.sum(p_MS, 1)
        spot_SD = n_S[:, None] * V_STEP + d_D[None]
        if MASKED:
            v_SD = tl.load(v + spot_SD, mask=read_S[:, None] & (d_D < DIM)[None], other=0)
        elif DIM == PADDED:
            v_SD = tl.load(v + spot_SD)
        else:
            v_SD = tl.load(v + spot_SD, mask=(d_D < DIM)[None], other=0)
        acc_MD = tl.dot(p_MS.to(v_SD.dtype), v_SD, acc_MD * old_M[:, None], input_precision="tf32x3")
        top_M = new_M
    return acc_MD, sum_M, top_M


@triton.jit
def forward(
    q, k, v, seq_q, seq_k, y, lse, scale, q_batch, k_batch, v_batch, seq_q_batch, seq_k_batch,
    q_head, k_head, v_head, batch, n_queries, n_keys, n_splits, span,
    Q_STEP: tl.constexpr, K_STEP: tl.constexpr, V_STEP: tl.constexpr,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program: a block of rows, one row of the batch, one group of heads, one span of keys. y (n_splits, B, L, H,
    DIM), lse (n_splits, B, L, H) fp32. scale holds log2(e)."""
    SHARE: tl.constexpr = HEADS // GROUPS
    n_blocks = tl.cdiv(n_queries * SHARE, BLOCK_M)
    pid = tl.program_id(0)
    split = pid % n_splits
    block = n_blocks - 1 - pid // n_splits % n_blocks  # the last queries see most: they begin first
    g = (pid // n_splits // n_blocks) % GROUPS
    b = (pid // n_splits // n_blocks // GROUPS).to(tl.int64)
    row_M = block * BLOCK_M + tl.arange(0, BLOCK_M)
    query_M = (row_M // SHARE).to(tl.int64)
    head_M = g * SHARE + row_M % SHARE
    d_D = tl.arange(0, PADDED)
    asked_M = query_M < n_queries
    k += b * k_batch + g.to(tl.int64) * k_head
    v += b * v_batch + g.to(tl.int64) * v_head
    if seq_q is not None:
        seq_M = tl.load(seq_q + b * seq_q_batch + query_M, mask=asked_M, other=-1)
        seq_k += b * seq_k_batch
        mask_M = asked_M & (seq_M >= 0)
        seq_M = tl.where(mask_M, seq_M, -2)  # equal to no key's
    else:
        seq_M = row_M
        mask_M = asked_M
    spot_MD = query_M[:, None] * Q_STEP + (head_M.to(tl.int64) * q_head)[:, None] + d_D[None]
    q_MD = tl.load(q + b * q_batch + spot_MD, mask=mask_M[:, None] & (d_D < DIM)[None], other=0)
    begin = split * span
    end = tl.minimum(begin + span, n_keys)
    limit_M = n_keys + 0 * query_M
    all_see = end
    if CAUSAL:
        older = n_keys - n_queries
        limit_M = older + query_M
        end = tl.minimum(end, older + tl.minimum((block * BLOCK_M + BLOCK_M - 1) // SHARE + 1, n_queries))
        all_see = tl.minimum(end, older + block * BLOCK_M // SHARE + 1)
    acc_MD = tl.zeros([BLOCK_M, PADDED], tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    top_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    masked = begin
    if seq_q is None:
        masked = begin + tl.maximum(all_see - begin, 0) // BLOCK_S * BLOCK_S
        acc_MD, sum_M, top_M = attend(
            q_MD, k, v, begin, masked, limit_M, seq_M, None, scale, acc_MD, sum_M, top_M,
            K_STEP, V_STEP, DIM, PADDED, False, BLOCK_S,
        )  # fmt: skip
    acc_MD, sum_M, top_M = attend(
        q_MD, k, v, masked, end, limit_M, seq_M, seq_k, scale, acc_MD, sum_M, top_M,
        K_STEP, V_STEP, DIM, PADDED, True, BLOCK_S,
    )  # fmt: skip
    out_M = ((split * batch + b) * n_queries + query_M) * HEADS + head_M
    sum_M = tl.where(sum_M == 0, 1.0, sum_M)  # nothing seen: y is 0, and lse -inf
    y_MD = acc_MD / sum_M[:, None]
    tl.store(
        y + out_M[:, None] * DIM + d_D[None], y_MD.to(y.dtype.element_ty), mask=asked_M[:, None] & (d_D < DIM)[None]
    )
    tl.store(lse + out_M, (top_M + tl.log2(sum_M)) * LN2, mask=asked_M)


@triton.jit
def merge(
    parts, part_lse, y, lse, n_rows, n_splits, DIM: tl.constexpr, PADDED: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    """parts (n_splits, rows, DIM) fp32 and lse (n_splits, rows) to y (rows, DIM), lse (rows). A program has a row,
    of which it asks for SPLITS parts at once: decoding has few rows, and part after part would be a wait each."""
    row = tl.program_id(0).to(tl.int64)
    d_D = tl.arange(0, PADDED)
    top = float("-inf")
    for split in range(0, n_splits, SPLITS):
        s_S = split + tl.arange(0, SPLITS)
        lse_S = tl.load(part_lse + s_S * n_rows + row, mask=s_S < n_splits, other=float("-inf"))
        top = tl.maximum(top, tl.max(lse_S, 0))
    top = tl.where(top == float("-inf"), 0.0, top)  # nothing seen: y is 0, and lse -inf
    acc_D = tl.zeros([PADDED], tl.float32)
    total = 0.0
    for split in range(0, n_splits, SPLITS):
        s_S = split + tl.arange(0, SPLITS)
        at_S = s_S * n_rows + row
        lse_S = tl.load(part_lse + at_S, mask=s_S < n_splits, other=float("-inf"))
        weight_S = tl.exp2((lse_S - top) / LN2)
        mask_SD = (s_S < n_splits)[:, None] & (d_D < DIM)[None]
        part_SD = tl.load(parts + at_S[:, None] * DIM + d_D[None], mask=mask_SD, other=0)
        acc_D += tl.sum(part_SD * weight_S[:, None], 0)
        total += tl.sum(weight_S, 0)
    unseen = total == 0  # not where it is NaN
    total = tl.where(unseen, 1.0, total)
    y_D = acc_D / total
    tl.store(y + row * DIM + d_D, y_D.to(y.dtype.element_ty), mask=d_D < DIM)
    tl.store(lse + row, tl.where(unseen, float("-inf"), top + tl.log2(total) * LN2))


@triton.jit
def merge_several(
    parts, lses, y, lse, n_rows, DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """Tuples of y (rows, DIM), any float, and of lse (rows) over disjoint keys to one of each."""
    row_M = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_M = row_M < n_rows
    d_D = tl.arange(0, PADDED)
    mask_MD = mask_M[:, None] & (d_D < DIM)[None]
    top_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for i in tl.static_range(len(lses)):
        top_M = tl.maximum(top_M, tl.load(lses[i] + row_M, mask=mask_M, other=0))
    top_M = tl.where(top_M == float("-inf"), 0.0, top_M)  # nothing seen: y is 0, and lse -inf
    acc_MD = tl.zeros([BLOCK_M, PADDED], tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    for i in tl.static_range(len(lses)):
        weight_M = tl.exp2((tl.load(lses[i] + row_M, mask=mask_M, other=0) - top_M) / LN2)
        part_MD = tl.load(parts[i] + row_M[:, None] * DIM + d_D[None], mask=mask_MD, other=0)
        acc_MD += part_MD.to(tl.float32) * weight_M[:, None]
        sum_M += weight_M
    unseen_M = sum_M == 0  # not where it is NaN
    sum_M = tl.where(unseen_M, 1.0, sum_M)
    y_MD = acc_MD / sum_M[:, None]
    tl.store(y + row_M[:, None] * DIM + d_D[None], y_MD.to(y.dtype.element_ty), mask=mask_MD)
    tl.store(lse + row_M, tl.where(unseen_M, float("-inf"), top_M + tl.log2(sum_M) * LN2), mask=mask_M)
