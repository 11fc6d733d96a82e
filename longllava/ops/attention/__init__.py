"""Attention of queries over all keys before them: chunked prefill, decode and training, with grouped heads."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from longllava.errors import LongLLaVAError
from longllava.ops.attention import cpu, cudnn, reference, sdpa, triton
from longllava.ops.dispatch import Backend, choose, transformed

# best first; the last is the judge
BACKENDS = tuple(
    Backend(name, module.run, module.why_not)
    for name, module in (
        ("cudnn", cudnn),
        ("triton", triton),
        ("cpu", cpu),
        ("sdpa", sdpa),
        ("reference", reference),
    )
)


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, causal: bool = True,
    seq_idx_q: Tensor | None = None, seq_idx_k: Tensor | None = None, return_lse: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, causal: bool = True,
    seq_idx_q: Tensor | None = None, seq_idx_k: Tensor | None = None, return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    seq_idx_q: Tensor | None = None,
    seq_idx_k: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """y_i = sum_j p_ij v_j with p_i = softmax over the visible keys j of scale q_i . k_j.

    Shapes:  q (B, L, H, K); k and v (B, S, G, K), G divides H: query heads h G / H share a key head. Views are read
             in place as long as their last stride is 1, expanded batches (stride 0) too.
    dtypes:  fp32, bf16 or fp16, q, k and v the same (fp64 runs in plain torch). Scores and sums are fp32.
    Visible: causal: the queries are the last L of the S tokens, so query i sees keys 0 .. S - L + i. Otherwise all.
             With seq_idx (int32; q's (B, L), k's (B, S), which may be left out when S == L) only keys of the query's
             own value, and only values >= 0: -1 is padding. A query that sees nothing gets y = 0, lse = -inf, and no
             gradient. What padding holds (NaN too) reaches nothing; with the cpu backend that holds for every key
             a query does not see.
    Returns: y (B, L, H, K) in q's dtype; with return_lse also lse (B, L, H) fp32, the natural log of the softmax's
             denominator, with which results over several sets of keys are merged (`merge`).
    Gradients go to q, k and v, from y and from lse.
    The same call gives the same bits, whatever the number of threads.
    Raises:  LongLLaVAError if shapes or dtypes disagree; BackendError if the backend asked for cannot run.
    Source:  Ainslie et al. 2023, arXiv:2305.13245 (groups); Dao et al. 2022, arXiv:2205.14135 (blocks, lse).
    """
    if seq_idx_q is not None and seq_idx_k is None and k.shape[1] == q.shape[1]:
        seq_idx_k = seq_idx_q
    _check(q, k, v, causal, seq_idx_q, seq_idx_k)
    args = (q, k, v, q.shape[3] ** -0.5 if scale is None else scale, causal, seq_idx_q, seq_idx_k, return_lse)
    y, lse = choose("attention", BACKENDS, *args, forced=backend).run(*args)
    return (y, lse) if return_lse else y


def merge(results: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The (y, lse) over all keys from the (y, lse) over disjoint sets of keys, such as a shared prefix and a tail.

    y (B, L, H, K) in any float dtype, lse (B, L, H) fp32; the result has the first y's dtype. A query that saw
    nothing in a set takes nothing from it.
    """
    if results[0][0].device.type != "cpu" and not transformed() and triton.why_not_merge(results) is None:
        return triton.merged(results)
    lse_NBLH = torch.stack([lse for _, lse in results])
    lse_BLH = lse_NBLH.logsumexp(0)
    # where no set was visible, -inf - -inf would be NaN
    weights_NBLH = (lse_NBLH - lse_BLH.masked_fill(lse_BLH == -torch.inf, 0)).exp()
    y_BLHK = sum(y.to(weight.dtype) * weight[..., None] for (y, _), weight in zip(results, weights_NBLH))
    return y_BLHK.to(results[0][0].dtype), lse_BLH  # type: ignore[union-attr]


def _check(q: Tensor, k: Tensor, v: Tensor, causal: bool, seq_idx_q: Tensor | None, seq_idx_k: Tensor | None) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise LongLLaVAError(
            "attention: q must be (B, L, H, K), k and v (B, S, G, K), "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    batch, n_queries, n_heads, head_dim = q.shape
    _, n_keys, n_groups, _ = k.shape
    if k.shape[0] != batch or k.shape[3] != head_dim or head_dim == 0:
        raise LongLLaVAError(
            "attention: q, k and v must agree in batch and head size, and that must not be 0, "
            f"got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if n_groups == 0 or n_heads == 0 or n_heads % n_groups:
        raise LongLLaVAError(f"attention: q's heads must be a multiple of k's, got {n_heads} and {n_groups}")
    if causal and n_keys < n_queries:
        raise LongLLaVAError(
            f"attention: causal queries are the last of the keys, but there are {n_queries} queries and "
            f"{n_keys} keys; pass the keys of all tokens, or causal=False"
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise LongLLaVAError(f"attention: q, k and v must have one float dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if (seq_idx_q is None) != (seq_idx_k is None):
        raise LongLLaVAError("attention: seq_idx_q and seq_idx_k go together; got only one of them")
    for name, seq_idx, length in (("seq_idx_q", seq_idx_q, n_queries), ("seq_idx_k", seq_idx_k, n_keys)):
        if seq_idx is not None and (
            seq_idx.shape != (batch, length) or seq_idx.dtype not in (torch.int32, torch.int64)
        ):
            raise LongLLaVAError(
                f"attention: {name} must be int32 of shape {(batch, length)}, "
                f"got {seq_idx.dtype} of {tuple(seq_idx.shape)}"
            )
