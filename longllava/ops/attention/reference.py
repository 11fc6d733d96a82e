"""Attention with the full score matrix, in fp32 (fp64 for fp64 input): the judge of the other backends."""

from __future__ import annotations

import torch
from torch import Tensor

from longllava.ops.dispatch import without_autocast


def why_not(*args: object) -> str | None:
    return None


def visible(
    n_queries: int,
    n_keys: int,
    causal: bool,
    seq_idx_q_BL: Tensor | None,
    seq_idx_k_BS: Tensor | None,
    device: torch.device,
) -> Tensor:
    """(1 or B, L, S), True where the query sees the key."""
    visible_BLS = torch.ones(1, n_queries, n_keys, dtype=torch.bool, device=device)
    if causal:
        visible_BLS = visible_BLS.tril(n_keys - n_queries)
    if seq_idx_q_BL is not None and seq_idx_k_BS is not None:
        same_BLS = seq_idx_q_BL[:, :, None] == seq_idx_k_BS[:, None, :]
        visible_BLS = visible_BLS & same_BLS & (seq_idx_q_BL >= 0)[:, :, None]
    return visible_BLS


@without_autocast
def run(
    q_BLHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    scale: float,
    causal: bool = True,
    seq_idx_q_BL: Tensor | None = None,
    seq_idx_k_BS: Tensor | None = None,
    return_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """y in q's dtype and lse, whether it was asked for or not."""
    dtype = torch.float64 if q_BLHK.dtype == torch.float64 else torch.float32
    n_queries, n_heads, n_keys, n_groups = *q_BLHK.shape[1:3], *k_BSGK.shape[1:3]
    visible_BLS = visible(n_queries, n_keys, causal, seq_idx_q_BL, seq_idx_k_BS, q_BLHK.device)
    q, k, v = (x.to(dtype) for x in (q_BLHK, k_BSGK, v_BSGK))
    unseen_BS11 = ~visible_BLS.any(1)[:, :, None, None]
    blind_BL = ~visible_BLS.any(2)
    q = q.masked_fill(blind_BL[:, :, None, None], 0)  # 0 times NaN would be NaN
    k, v = (x.masked_fill(unseen_BS11, 0).repeat_interleave(n_heads // n_groups, 2) for x in (k, v))
    scores_BHLS = torch.einsum("blhk,bshk->bhls", q, k) * scale
    scores_BHLS = scores_BHLS.masked_fill(~visible_BLS[:, None], -torch.inf)
    scores_BHLS = scores_BHLS.masked_fill(blind_BL[:, None, :, None], 0)  # a softmax of nothing has no gradient
    p_BHLS = scores_BHLS.softmax(-1).masked_fill(~visible_BLS[:, None], 0)
    y_BLHK = torch.einsum("bhls,bshk->blhk", p_BHLS, v)
    lse_BLH = scores_BHLS.logsumexp(-1).masked_fill(blind_BL[:, None], -torch.inf).transpose(1, 2)
    return y_BLHK.to(q_BLHK.dtype), lse_BLH.to(torch.promote_types(torch.float32, dtype))
