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
from longllava.ops.dispatch import without_autocast

QUERY_BLOCK = 512  # at 40,000 keys a block's mask takes 20 MB
SCORES = 2**21  # of a block with lse: 8 MiB, which the system need not bring in anew for every block


def why_not(*args: object) -> str | None:
    return None


@without_autocast
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
        block = max(1, min(QUERY_BLOCK, SCORES // max(1, q_BLHK.shape[0] * q_BLHK.shape[2] * n_keys)))
        q, k, v = (x.to(torch.promote_types(torch.float32, x.dtype)) for x in (q_BLHK, k_BSGK, v_BSGK))
        y, lse = _in_blocks(_with_lse, block, q, k, v, scale, causal, seq_idx_q_BL, seq_idx_k_BS)
        return y.to(q_BLHK.dtype), lse
    if masked or (causal and 1 < n_queries < n_keys):
        y, _ = _in_blocks(_with_mask, QUERY_BLOCK, q_BLHK, k_BSGK, v_BSGK, scale, causal, seq_idx_q_BL, seq_idx_k_BS)
        return y, None
    q, k, v = (x.transpose(1, 2) for x in (q_BLHK, k_BSGK, v_BSGK))
    y = F.scaled_dot_product_attention(
        q, k, v, scale=scale, is_causal=causal and n_queries > 1, enable_gqa=q.shape[1] != k.shape[1]
    )
    return y.transpose(1, 2), None


def _mask(
    q_BLHK: Tensor, k_BSGK: Tensor, causal: bool, seq_idx_q_BL: Tensor | None, seq_idx_k_BS: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """What is visible (1 or B, L, S), and which queries see nothing (1 or B, L); None where all is visible."""
    n_queries, n_keys = q_BLHK.shape[1], k_BSGK.shape[1]
    if seq_idx_q_BL is None and (n_queries == 1 or not causal):
        return None, None
    visible_BLS = reference.visible(n_queries, n_keys, causal, seq_idx_q_BL, seq_idx_k_BS, q_BLHK.device)
    return visible_BLS, ~visible_BLS.any(2)


def _with_lse(
    q_BLHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    scale: float,
    causal: bool,
    seq_idx_q_BL: Tensor | None,
    seq_idx_k_BS: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Plain products of fp32 tensors, without a copy of k and v for each query head. R the query heads of a group."""
    n_queries, n_heads, n_groups = *q_BLHK.shape[1:3], k_BSGK.shape[2]
    group = (n_heads // n_groups, n_queries)
    visible_BLS, blind_BL = _mask(q_BLHK, k_BSGK, causal, seq_idx_q_BL, seq_idx_k_BS)
    q_BLHK, k_BSGK, v_BSGK = _without_padding(q_BLHK, k_BSGK, v_BSGK, blind_BL, visible_BLS, seq_idx_k_BS)
    q_BGRLK = (q_BLHK * scale).unflatten(2, (n_groups, group[0])).permute(0, 2, 3, 1, 4)
    k_BGSK, v_BGSK = k_BSGK.transpose(1, 2), v_BSGK.transpose(1, 2)
    scores_BGRLS = (q_BGRLK.flatten(2, 3) @ k_BGSK.transpose(2, 3)).unflatten(2, group)
    if visible_BLS is not None and blind_BL is not None:
        scores_BGRLS = scores_BGRLS.masked_fill(~(visible_BLS | blind_BL[..., None])[:, None, None], -torch.inf)
    lse_BGRL = scores_BGRLS.logsumexp(-1)
    # lse is -inf where there are no keys at all
    p_BGRLS = (scores_BGRLS - lse_BGRL[..., None]).exp()
    y_BGRLK = (p_BGRLS.flatten(2, 3) @ v_BGSK).unflatten(2, group)
    y_BLHK, lse_BLH = y_BGRLK.permute(0, 3, 1, 2, 4).flatten(2, 3), lse_BGRL.permute(0, 3, 1, 2).flatten(2, 3)
    if blind_BL is not None:
        y_BLHK = y_BLHK.masked_fill(blind_BL[..., None, None], 0)
        lse_BLH = lse_BLH.masked_fill(blind_BL[..., None], -torch.inf)
    return y_BLHK, lse_BLH


def _without_padding(
    q_BLHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    blind_BL: Tensor | None,
    visible_BLS: Tensor | None,
    seq_idx_k_BS: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """0 for queries that see nothing and keys that none sees: NaN there would spread as 0 times NaN."""
    if seq_idx_k_BS is None or visible_BLS is None or blind_BL is None:
        return q_BLHK, k_BSGK, v_BSGK
    unseen_BS11 = ~visible_BLS.any(1)[..., None, None]
    q_BLHK = q_BLHK.masked_fill(blind_BL[..., None, None], 0)
    return q_BLHK, k_BSGK.masked_fill(unseen_BS11, 0), v_BSGK.masked_fill(unseen_BS11, 0)


def _with_mask(
    q_BLHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    scale: float,
    causal: bool,
    seq_idx_q_BL: Tensor | None,
    seq_idx_k_BS: Tensor | None,
) -> tuple[Tensor, None]:
    visible_BLS, blind_BL = _mask(q_BLHK, k_BSGK, causal, seq_idx_q_BL, seq_idx_k_BS)
    q_BLHK, k_BSGK, v_BSGK = _without_padding(q_BLHK, k_BSGK, v_BSGK, blind_BL, visible_BLS, seq_idx_k_BS)
    # a row that sees nothing looks at everything, so that no NaN arises, and counts for nothing
    mask = None if visible_BLS is None or blind_BL is None else (visible_BLS | blind_BL[..., None])[:, None]
    q, k, v = (x.transpose(1, 2) for x in (q_BLHK, k_BSGK, v_BSGK))
    grouped = q.shape[1] != k.shape[1]
    y_BHLK = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
    y_BLHK = y_BHLK.transpose(1, 2)
    return y_BLHK if blind_BL is None else y_BLHK.masked_fill(blind_BL[..., None, None], 0), None


def _in_blocks(  # type: ignore[no-untyped-def]
    attend, block, q_BLHK, k_BSGK, v_BSGK, scale, causal, seq_idx_q_BL, seq_idx_k_BS
) -> tuple[Tensor, Tensor | None]:
    """attend() over blocks of `block` queries, each with the keys that a causal query of it may see."""
    n_queries, n_keys = q_BLHK.shape[1], k_BSGK.shape[1]
    results = []
    for start in range(0, max(1, n_queries), block):
        end = min(start + block, n_queries)
        n_seen = n_keys - n_queries + end if causal else n_keys
        cut_q, cut_k = (slice(None), slice(start, end)), (slice(None), slice(n_seen))
        seq_q = None if seq_idx_q_BL is None else seq_idx_q_BL[cut_q]
        seq_k = None if seq_idx_k_BS is None else seq_idx_k_BS[cut_k]
        results.append(attend(q_BLHK[cut_q], k_BSGK[cut_k], v_BSGK[cut_k], scale, causal, seq_q, seq_k))
    y_BLHK = torch.cat([y for y, _ in results], 1)
    has_lse = results[0][1] is not None
    return y_BLHK, torch.cat([lse for _, lse in results], 1) if has_lse else None
