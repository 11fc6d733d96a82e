"""Grouped-query attention without positions, as Jamba's; the Mamba layers carry the order.

B batch, L tokens of this call, S tokens seen, H heads, G key-value heads, K head size, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longllava.config import BackboneConfig
from longllava.nn.cache import AttentionState, Segment, StaticAttentionState
from longllava.nn.context import Context
from longllava.nn.linear import Linear
from longllava.nn.norm import RMSNorm
from longllava.ops.attention import attention, merge

INT8_BLOCK = 8192  # keys that are dequantised at a time: 34 MB in bfloat16 at 8 heads of 128, with their values


class Attention(nn.Module):
    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.q_proj = Linear(config.width, self.n_heads * self.head_dim, bias=False)
        self.k_proj = Linear(config.width, self.n_kv_heads * self.head_dim, bias=False)
        self.v_proj = Linear(config.width, self.n_kv_heads * self.head_dim, bias=False)
        self.o_proj = Linear(self.n_heads * self.head_dim, config.width, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps, feeds_products=False) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps, feeds_products=False) if config.qk_norm else None
        # factor 1 + exp(s_h) log(keys seen) on the logits: a match that wins among 600 tokens must win among
        # 38,000 (the sum it competes with grows with their number). exp keeps it positive.
        self.log_length_H = nn.Parameter(torch.zeros(self.n_heads)) if config.log_length_scale else None

    def forward(
        self,
        x_BLD: Tensor,
        ctx: Context,
        state: AttentionState | StaticAttentionState | None = None,
        last_only: bool = False,
    ):
        q_BLC = self.q_proj(x_BLD)  # x_BLD may be int8 rows, which have no shape of their own
        b, length, _ = q_BLC.shape
        q_BLHK = q_BLC.view(b, length, self.n_heads, self.head_dim)
        k_BLGK = self.k_proj(x_BLD).view(b, length, self.n_kv_heads, self.head_dim)
        v_BLGK = self.v_proj(x_BLD).view(b, length, self.n_kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q_BLHK, k_BLGK = self.q_norm(q_BLHK), self.k_norm(k_BLGK)
        if self.log_length_H is not None:
            q_BLHK = q_BLHK * self.length_factor(ctx, b, length).to(q_BLHK.dtype)
        if ctx.grounding_G4 is not None and len(ctx.grounding_G4):
            report_grounding(ctx, q_BLHK, k_BLGK)
        # under autocast the norms of fp32 weights give fp32
        q_BLHK, k_BLGK = q_BLHK.to(v_BLGK.dtype), k_BLGK.to(v_BLGK.dtype)
        if state is None:
            y_BLHK = attention(q_BLHK, k_BLGK, v_BLGK, seq_idx_q=ctx.seq_idx_BL, seq_idx_k=ctx.seq_idx_BL)
        else:
            state = state.append(k_BLGK, v_BLGK, ctx.seq_idx_BL)
            y_BLHK = attend_segments(q_BLHK, state, ctx.seq_idx_BL)
        return self.o_proj((y_BLHK[:, -1:] if last_only else y_BLHK).flatten(2)), state

    def length_factor(self, ctx: Context, batch: int, length: int) -> Tensor:
        """(B or 1, L, H, 1) fp32."""
        assert self.log_length_H is not None
        positions_BL = ctx.positions_BL
        if positions_BL is None:
            positions_BL = torch.arange(ctx.start, ctx.start + length, device=self.log_length_H.device)[None]
        log_BL = (positions_BL.float() + 1).log()
        return (1 + self.log_length_H.float().exp() * log_BL[..., None])[..., None]

    def empty_state(self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> AttentionState:
        return AttentionState.empty(batch, capacity, self.n_kv_heads, self.head_dim, device, dtype)

    @torch.no_grad()
    def initialise_(self) -> None:
        if self.log_length_H is not None:
            self.log_length_H.fill_(-2.0)  # exp(-2) = 0.14: a factor of 1.9 among 600 tokens, 2.4 among 38,000


def attend_segments(
    q_BLHK: Tensor, state: AttentionState | StaticAttentionState, seq_idx_BL: Tensor | None
) -> Tensor:
    """Attention over shared segments and the own buffer, merged by their log-sum-exp."""
    *shared, own = state.segments()
    if own.keys_BSGK.dtype == torch.int8:  # what this call wrote is causal, what stood there before is not
        before = own.keys_BSGK.shape[1] - q_BLHK.shape[1]
        shared = [*shared, *([own.part(0, before)] if before else [])]
        own = own.part(before, before + q_BLHK.shape[1]).dequantized(q_BLHK.dtype)
    q_BLHK = q_BLHK.to(own.keys_BSGK.dtype)  # under autocast it is in 16 bits, and keys are stored in fp32
    if not shared:
        asked, keys = marks(q_BLHK, own, seq_idx_BL)
        return attention(
            q_BLHK, own.keys_BSGK, own.values_BSGK, causal=state.causal, seq_idx_q=asked, seq_idx_k=keys
        )
    parts = [attend(q_BLHK, segment, seq_idx_BL, causal=False) for segment in shared]
    parts.append(attend(q_BLHK, own, seq_idx_BL, causal=state.causal))
    return merge(parts)[0].to(q_BLHK.dtype)


def attend(q_BLHK: Tensor, segment: Segment, seq_idx_BL: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
    """y (B, L, H, K) and lse (B, L, H) over one segment.

    Keys that all rows of the batch share are read once: the rows' queries become queries of one row.
    """
    batch, length = q_BLHK.shape[:2]
    shared = batch > 1 and not causal and segment.keys_BSGK.stride(0) == 0 and segment.seq_idx_BS is None
    if shared:
        q_BLHK = q_BLHK.reshape(1, batch * length, *q_BLHK.shape[2:])
        seq_idx_BL = None if seq_idx_BL is None else seq_idx_BL.reshape(1, -1)
        segment = Segment._make(None if tensor is None else tensor[:1] for tensor in segment)
    if segment.keys_BSGK.dtype == torch.int8:
        y, lse = attend_int8(q_BLHK, segment, seq_idx_BL)
    else:
        asked, keys = marks(q_BLHK, segment, seq_idx_BL)
        y, lse = attention(
            q_BLHK, segment.keys_BSGK, segment.values_BSGK,
            causal=causal, seq_idx_q=asked, seq_idx_k=keys, return_lse=True,
        )  # fmt: skip
    if shared:
        y, lse = y.reshape(batch, length, *y.shape[2:]), lse.reshape(batch, length, -1)
    return y, lse


def attend_int8(q_BLHK: Tensor, segment: Segment, seq_idx_BL: Tensor | None) -> tuple[Tensor, Tensor]:
    """Not causal. Some thousand keys and values at a time are floats."""
    y_BLHK, lse_BLH = None, None
    for begin in range(0, segment.keys_BSGK.shape[1], INT8_BLOCK):
        block = segment.part(begin, begin + INT8_BLOCK).dequantized(q_BLHK.dtype)
        more_BLHK, more_BLH = attend(q_BLHK, block, seq_idx_BL, causal=False)
        if y_BLHK is None or lse_BLH is None:
            y_BLHK, lse_BLH = more_BLHK.float(), more_BLH
            continue
        both_BLH = torch.logaddexp(lse_BLH, more_BLH)
        # rows that see nothing have only -inf: nothing is added to their zeros
        mine_BLH, theirs_BLH = ((lse - both_BLH).exp().nan_to_num(0.0) for lse in (lse_BLH, more_BLH))
        y_BLHK = y_BLHK * mine_BLH[..., None] + more_BLHK.float() * theirs_BLH[..., None]
        lse_BLH = both_BLH
    assert y_BLHK is not None and lse_BLH is not None
    return y_BLHK, lse_BLH


def marks(q_BLHK: Tensor, segment: Segment, seq_idx_BL: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """seq_idx of the queries and of a segment's keys: both, or neither where nothing is padded."""
    seen = segment.seq_idx_BS
    if seen is None and seq_idx_BL is None:
        return None, None
    if seen is None:
        seen = torch.zeros(segment.keys_BSGK.shape[:2], dtype=torch.int32, device=q_BLHK.device)
    if seq_idx_BL is None:
        seq_idx_BL = torch.zeros(q_BLHK.shape[:2], dtype=torch.int32, device=q_BLHK.device)
    return seq_idx_BL, seen


def report_grounding(ctx: Context, q_BLHK: Tensor, k_BLGK: Tensor) -> None:
    """Training aid: -log of the attention that marked queries give to their evidence, mean over all heads.

    Marks are (row, query position, first key, end key). A query with several marks (two pictures show the thing)
    may look at any of their keys: its masses are added before the log. Keys of other samples and of later tokens
    are left out, as in attention itself. G marks, Q different queries.
    """
    assert ctx.grounding_G4 is not None
    heads, groups = q_BLHK.shape[2], k_BLGK.shape[2]
    at = torch.arange(k_BLGK.shape[1], device=k_BLGK.device)
    kv_of_head = torch.arange(heads, device=k_BLGK.device) // (heads // groups)
    log_mass = []
    for row in ctx.grounding_G4[:, 0].unique():
        marks_G4 = ctx.grounding_G4[ctx.grounding_G4[:, 0] == row]
        query_Q, of_mark_G = marks_G4[:, 1].unique(return_inverse=True)
        inside_GS = (at >= marks_G4[:, 2, None]) & (at < marks_G4[:, 3, None])
        n_marks_QS = torch.zeros(len(query_Q), len(at), dtype=torch.int32, device=at.device)
        inside_QS = n_marks_QS.index_add_(0, of_mark_G, inside_GS.int()) > 0
        q_QHK, k_SHK = q_BLHK[row, query_Q].float(), k_BLGK[row][:, kv_of_head].float()
        logits_QHS = torch.einsum("qhk,shk->qhs", q_QHK, k_SHK) * q_QHK.shape[-1] ** -0.5
        visible_QS = at <= query_Q[:, None]
        if ctx.seq_idx_BL is not None:
            visible_QS = visible_QS & (ctx.seq_idx_BL[row] == ctx.seq_idx_BL[row, query_Q][:, None])
        logits_QHS = logits_QHS.masked_fill(~visible_QS[:, None], -torch.inf)
        on_evidence_QH = torch.logsumexp(logits_QHS.masked_fill(~inside_QS[:, None], -torch.inf), -1)
        log_mass.append(on_evidence_QH - torch.logsumexp(logits_QHS, -1))
    log_mass_QH = torch.cat(log_mass)
    ctx.report("grounding", -log_mass_QH.mean())
    ctx.report("grounding_mass", log_mass_QH.detach().exp().mean())
