"""Attention through torch's scaled_dot_product_attention: any device, and CPUs without the compiled kernels.

torch's own causal flag means "the first of the keys", so it serves only L == S; other calls go in blocks of queries
with a mask. lse, which torch does not give, is computed with plain products, in blocks as well.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longllava.ops import native
from longllava.ops.attention import reference

QUERY_BLOCK = 512  # at 40,000 keys a block's mask takes 20 MB, its scores (only for lse) 80 MB a head in fp32


def why_not(*args: object) -> str | None:
    return None


def run(
    q_BLHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    scale: float,
    causal: bool = True,
    seq_idx_q_BL: Tensor | None = None,
    seq_idx_k_BS: Tensor | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    if q_BLHK.device.type == "cpu":
        native.say_once_if_missing()
    n_queries, n_keys = q_BLHK.shape[1], k_BSGK.shape[1]
    masked = seq_idx_q_BL is not None
    if n_queries == 0 or n_keys == 0 or return_lse:
        return _in_blocks(reference.run, q_BLHK, k_BSGK, v_BSGK, scale, causal, seq_idx_q_BL, seq_idx_k_BS)
    if masked or (causal and 1 < n_queries < n_keys):
        y, _ = _in_blocks(_with_mask, q_BLHK, k_BSGK, v_BSGK, scale, causal, seq_idx_q_BL, seq_idx_k_BS)
        return y, None
    q, k, v = (x.transpose(1, 2) for x in (q_BLHK, k_BSGK, v_BSGK))
    y = F.scaled_dot_product_attention(
        q, k, v, scale=scale, is_causal=causal and n_queries > 1, enable_gqa=q.shape[1] != k.shape[1]
    )
    return y.transpose(1, 2), None


def _with_mask(
    q_BLHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    scale: float,
    causal: bool,
    seq_idx_q_BL: Tensor | None,
    seq_idx_k_BS: Tensor | None,
) -> tuple[Tensor, None]:
    visible_BLS = reference.visible(q_BLHK.shape[1], k_BSGK.shape[1], causal, seq_idx_q_BL, seq_idx_k_BS, q_BLHK.device)
    blind_BL11 = ~visible_BLS.any(2)[:, :, None, None]
    unseen_BS11 = ~visible_BLS.any(1)[:, :, None, None]
    if seq_idx_k_BS is not None:
        q_BLHK = q_BLHK.masked_fill(blind_BL11, 0)
        k_BSGK, v_BSGK = (x.masked_fill(unseen_BS11, 0) for x in (k_BSGK, v_BSGK))
    q, k, v = (x.transpose(1, 2) for x in (q_BLHK, k_BSGK, v_BSGK))
    # a row that sees nothing looks at everything, so that no NaN arises, and counts for nothing
    y = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=(visible_BLS | blind_BL11[..., 0])[:, None],
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return y.transpose(1, 2).masked_fill(blind_BL11, 0), None


def _in_blocks(  # type: ignore[no-untyped-def]
    attend, q_BLHK, k_BSGK, v_BSGK, scale, causal, seq_idx_q_BL, seq_idx_k_BS
) -> tuple[Tensor, Tensor | None]:
    """attend() over blocks of queries, each with the keys that a causal query of it may see."""
    n_queries, n_keys = q_BLHK.shape[1], k_BSGK.shape[1]
    results = []
    for start in range(0, max(1, n_queries), QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, n_queries)
        n_seen = n_keys - n_queries + end if causal else n_keys
        cut_q, cut_k = (slice(None), slice(start, end)), (slice(None), slice(n_seen))
        seq_q = None if seq_idx_q_BL is None else seq_idx_q_BL[cut_q]
        seq_k = None if seq_idx_k_BS is None else seq_idx_k_BS[cut_k]
        results.append(attend(q_BLHK[cut_q], k_BSGK[cut_k], v_BSGK[cut_k], scale, causal, seq_q, seq_k))
    y_BLHK = torch.cat([y for y, _ in results], 1)
    has_lse = results[0][1] is not None
    return y_BLHK, torch.cat([lse for _, lse in results], 1) if has_lse else None
