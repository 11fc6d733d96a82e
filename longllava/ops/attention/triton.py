"""Attention's forward pass on an NVIDIA GPU by Triton kernels: chunked prefill, decode and shared prefixes.

It gives lse, takes seq_idx and reads a causal chunk's older keys without a mask, which torch's own kernels do not do
together. It has no backward: calls that want gradients go to the next backend. Few queries: keys are cut in spans.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from longllava.ops import triton_support
from longllava.ops.triton_support import OPTIONS, rowed

MAX_HEAD_DIM = 256
BLOCK_S = 64  # keys
ROW_BYTES = 256  # of a head's key, up to which blocks are whole: 128 numbers of 16 bits
MIN_SPAN = 256  # keys: shorter spans would spend more on their merge
PROGRAMS_WANTED = 2  # a processor
Part = tuple[Tensor, Tensor]  # y (B, L, H, K), lse (B, L, H)


def why_not(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> str | None:
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return "has no backward, and gradients are wanted"
    if q.shape[3] > MAX_HEAD_DIM:
        return f"takes heads of at most {MAX_HEAD_DIM}, got {q.shape[3]}"
    return triton_support.why_not(q=q, k=k, v=v)


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
    plain_call = type(q_BLHK) is Tensor and not torch.compiler.is_compiling()
    call: Any = _forward if plain_call else attention  # the custom op's own overhead is a decode step's
    return call(q_BLHK, k_BSGK, v_BSGK, scale, causal, seq_idx_q_BL, seq_idx_k_BS)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, seq_q: Tensor | None, seq_k: Tensor | None
) -> tuple[Tensor, Tensor]:
    from longllava.ops.attention.triton_kernels import forward, merge

    batch, n_queries, n_heads, dim = q.shape
    n_keys, n_groups = k.shape[1:3]
    y = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if y.numel() == 0:
        return y, lse
    n_rows = n_queries * (n_heads // n_groups)
    padded = max(16, 1 << (dim - 1).bit_length())
    # Wider heads get fewer rows and keys at a time: for whole blocks no GPU has room in shared memory. fp32, of whose
    # numbers each is multiplied in three parts, gets fewer rows still, or registers spill.
    wider = max(1, padded * q.element_size() // ROW_BYTES)
    most = 128 // wider ** (q.element_size() // 2)
    block_m = max(16, min(most, 1 << (n_rows - 1).bit_length()))
    programs = batch * n_groups * -(-n_rows // block_m)
    wanted = PROGRAMS_WANTED * triton_support.n_processors(q.device) // programs
    n_splits = max(1, min(wanted, n_keys // MIN_SPAN))
    span = max(1, -(-n_keys // (n_splits * BLOCK_S))) * BLOCK_S
    n_splits = max(1, -(-n_keys // span))
    shape = {"DIM": dim, "PADDED": padded, **OPTIONS}
    arguments: dict[str, Any] = {}
    for name, x in (("q", rowed(q)), ("k", rowed(k)), ("v", rowed(v))):
        arguments |= {name: x, f"{name}_batch": x.stride(0)}
        arguments |= {f"{name.upper()}_STEP": x.stride(1), f"{name}_head": x.stride(2)}
    for name, seq in (("seq_q", seq_q), ("seq_k", seq_k)):
        seq = None if seq is None else rowed(seq)
        arguments |= {name: seq, f"{name}_batch": 0 if seq is None else seq.stride(0)}
    parts, part_lse = y, lse
    if n_splits > 1:
        parts = q.new_empty((n_splits, *y.shape), dtype=torch.float32)
        part_lse = q.new_empty((n_splits, *lse.shape), dtype=torch.float32)
    with torch.cuda.device_of(q):
        forward[(programs * n_splits,)](
            **arguments, **shape, y=parts, lse=part_lse, scale=scale * math.log2(math.e), batch=batch,
            n_queries=n_queries, n_keys=n_keys, n_splits=n_splits, span=span, HEADS=n_heads, GROUPS=n_groups,
            CAUSAL=causal, BLOCK_M=block_m, BLOCK_S=BLOCK_S // wider, num_warps=8 if block_m == 128 or wider > 1 else 4,
            num_stages=triton_support.stages(q.device),
        )  # fmt: skip
        if n_splits > 1:
            rows = lse.numel()
            merge[(rows,)](parts, part_lse, y, lse, rows, n_splits, SPLITS=32, **shape, num_warps=4)
    return y, lse


def why_not_merge(parts: list[Part]) -> str | None:
    if torch.is_grad_enabled() and any(x.requires_grad for part in parts for x in part):
        return "has no backward, and gradients are wanted"
    if torch.compiler.is_compiling():
        return "is not traced"
    return triton_support.why_not(y=parts[0][0], lse=parts[0][1])


def merged(parts: list[Part]) -> Part:
    """`merge` in one pass."""
    from longllava.ops.attention.triton_kernels import merge_several

    ys, lses = tuple(y.contiguous() for y, _ in parts), tuple(lse.contiguous() for _, lse in parts)
    y, lse = torch.empty_like(ys[0]), torch.empty_like(lses[0])
    dim = y.shape[3]
    with torch.cuda.device_of(y):
        merge_several[(-(-lse.numel() // 16),)](
            ys, lses, y, lse, lse.numel(), DIM=dim, PADDED=max(16, 1 << (dim - 1).bit_length()), BLOCK_M=16,
            num_warps=4, **OPTIONS,
        )  # fmt: skip
    return y, lse


attention = torch.library.custom_op("longllava::attention_triton", _forward, mutates_args=())


@attention.register_fake
def _(q, k, v, scale, causal, seq_q, seq_k):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)
