"""The selective scan on an NVIDIA GPU by the compiled CUDA kernels (csrc/selective_scan*.cu), as torch custom ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longllava.ops import native_cuda
from longllava.ops.selective_scan.cuda_launch import CHUNK, MAX_STATES, compute, gradients


def why_not(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *rest: Any,
) -> str | None:
    if not 1 <= A.shape[1] <= MAX_STATES:
        return f"takes 1 to {MAX_STATES} states per channel, got {A.shape[1]}"
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
    inputs = (u, delta, A, B, C, D, z, delta_bias, state)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    call: Any = selective_scan
    if not save and type(u) is Tensor and not torch.compiler.is_compiling():
        call = _forward
    y, state_out, _ = call(u, delta, A, B, C, D, z, delta_bias, delta_softplus, state, seq_idx, save)
    return y, state_out


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
    y, new_state, _ = _forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, state, seq_idx, False)
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
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and the states saved for backward (empty unless `save`)."""
    batch, length, channels = u.shape
    end = u.new_empty((batch, channels, A.shape[1]), dtype=torch.float32)
    n_saved = -(-length // CHUNK) if save else 0
    saved = u.new_empty((batch, n_saved, channels, A.shape[1]), dtype=torch.float32)
    y = compute(u, delta, A, B, C, D, z, delta_bias, delta_softplus, state, seq_idx, end, saved if n_saved else None)
    return y, end, saved


selective_scan = torch.library.custom_op("longllava::selective_scan_cuda", _forward, mutates_args=())
selective_scan_backward = torch.library.custom_op(
    "longllava::selective_scan_cuda_backward", gradients, mutates_args=()
)


@selective_scan.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, delta_softplus, state, seq_idx, save):  # type: ignore[no-untyped-def]
    batch, length, channels = u.shape
    n_saved = -(-length // CHUNK) if save else 0
    return (
        u.new_empty(u.shape),
        u.new_empty((batch, *A.shape), dtype=torch.float32),
        u.new_empty((batch, n_saved, *A.shape), dtype=torch.float32),
    )


@selective_scan_backward.register_fake
def _(grad_y, grad_state, u, delta, A, B, C, D, z, delta_bias, delta_softplus, seq_idx, saved):  # type: ignore[no-untyped-def]
    grads = [
        x.new_empty(x.shape) if x is not None else u.new_empty(0, dtype=torch.float32)
        for x in (u, delta, A, B, C, D, z, delta_bias)
    ]
    return (*grads, u.new_empty((u.shape[0], *A.shape), dtype=torch.float32))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    u, delta, A, B, C, D, z, delta_bias, ctx.delta_softplus, state, seq_idx, _ = inputs
    ctx.has = [x is not None for x in (u, delta, A, B, C, D, z, delta_bias, state)]
    ctx.state_dtype = None if state is None else state.dtype
    ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, seq_idx, output[2])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_y: Tensor | None, grad_state: Tensor | None, _: Any) -> tuple[Any, ...]:
    u, delta, A, B, C, D, z, delta_bias, seq_idx, saved = ctx.saved_tensors
    if grad_y is None:
        grad_y = torch.zeros_like(u)
    grads = selective_scan_backward(
        grad_y, grad_state, u, delta, A, B, C, D, z, delta_bias, ctx.delta_softplus, seq_idx, saved
    )
    *first, initial = [grad if has else None for grad, has in zip(grads, ctx.has)]
    if initial is not None:
        initial = initial.to(ctx.state_dtype)
    return (*first, None, initial, None, None)


selective_scan.register_autograd(_differentiate, setup_context=_setup)
