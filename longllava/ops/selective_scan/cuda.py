"""The selective scan on an NVIDIA GPU by the compiled CUDA kernels (csrc/selective_scan*.cu), as a torch custom op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longllava.ops import native_cuda
from longllava.ops.selective_scan.cuda_launch import MAX_STATES, compute


def why_not(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    state: Tensor | None = None,
    *rest: Any,
) -> str | None:
    if not 1 <= A.shape[1] <= MAX_STATES:
        return f"takes 1 to {MAX_STATES} states per channel, got {A.shape[1]}"
    inputs = (u, delta, A, B, C, D, z, delta_bias, state)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        return "has no backward, and gradients are wanted"
    return native_cuda.why_not(u=u, delta=delta, B=B, C=C, z=z)


def run(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    call: Any = selective_scan
    if type(u) is Tensor and not torch.compiler.is_compiling():
        call = _forward
    y, end = call(u, delta, A, B, C, D, z, delta_bias, delta_softplus, state, seq_idx)
    return y, end


def run_(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    state: Tensor,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """`run` with the new state in place of `state`. Each thread reads its part of the state before it writes it."""
    if state.dtype is torch.float32 and state.is_contiguous() and state.data_ptr() % 16 == 0:
        return compute(u, delta, A, B, C, D, z, delta_bias, delta_softplus, state, seq_idx, state, None)
    y, new_state = _forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, state, seq_idx)
    state.copy_(new_state)
    return y


def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    state: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    end = u.new_empty((u.shape[0], *A.shape), dtype=torch.float32)
    return compute(u, delta, A, B, C, D, z, delta_bias, delta_softplus, state, seq_idx, end, None), end


selective_scan = torch.library.custom_op("longllava::selective_scan_cuda", _forward, mutates_args=())


@selective_scan.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, delta_softplus, state, seq_idx):  # type: ignore[no-untyped-def]
    return u.new_empty(u.shape), u.new_empty((u.shape[0], *A.shape), dtype=torch.float32)
