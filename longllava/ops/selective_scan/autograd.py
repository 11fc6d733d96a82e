"""How kernels become a backend: torch custom ops where gradients are wanted or torch.compile looks on, the kernels
themselves otherwise, which saves an op's overhead: decoding comes here once a layer and token.

A backend's compute(*inputs, end, saved) returns y. It writes the state after each row to `end`, which may be the
initial state, and the states that backward starts from to `saved`, of shape saved_shape(B, L, E, N), if that is not
None. Its gradients(grad_y, grad_state, *inputs, saved), without the state among the inputs, returns those of u, delta,
A, B, C, D, z, delta_bias and the initial state, of no size where there is no input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Run = Callable[..., tuple[Tensor, Tensor]]
Compute = Callable[..., Tensor]


def wrapped(
    name: str,
    compute: Compute,
    gradients: Callable[..., tuple[Tensor, ...]],
    saved_shape: Callable[..., tuple[int, ...]],
    device_types: str | None = None,
) -> tuple[Any, Run, Compute]:
    """(custom op `longllava::<name>`, run, run_): run takes the scan's inputs, run_ replaces the state in place."""

    def forward(
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
        _, end, saved = outputs(u, A, save)
        kept = saved if saved.numel() else None
        return compute(u, delta, A, B, C, D, z, delta_bias, delta_softplus, state, seq_idx, end, kept), end, saved

    def outputs(u: Tensor, A: Tensor, save: bool) -> tuple[tuple[int, ...], Tensor, Tensor]:
        # new_empty: torch.empty would follow the caller's default dtype and device
        end = u.new_empty((u.shape[0], *A.shape), dtype=torch.float32)
        shape = saved_shape(*u.shape, A.shape[1]) if save else (0,)
        return u.shape, end, u.new_empty(shape, dtype=torch.float32)

    op = torch.library.custom_op(f"longllava::{name}", forward, mutates_args=(), device_types=device_types)
    backward = torch.library.custom_op(
        f"longllava::{name}_backward", gradients, mutates_args=(), device_types=device_types
    )

    @op.register_fake
    def _(u, delta, A, B, C, D, z, delta_bias, delta_softplus, state, seq_idx, save):  # type: ignore[no-untyped-def]
        shape, end, saved = outputs(u, A, save)
        return u.new_empty(shape), end, saved

    @backward.register_fake
    def _(grad_y, grad_state, u, delta, A, B, C, D, z, delta_bias, delta_softplus, seq_idx, saved):  # type: ignore[no-untyped-def]
        inputs = (u, delta, A, B, C, D, z, delta_bias)
        grads = [u.new_empty(0, dtype=torch.float32) if x is None else x.new_empty(x.shape) for x in inputs]
        return (*grads, outputs(u, A, False)[1])

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        *floats, ctx.delta_softplus, state, seq_idx, _ = inputs
        ctx.has = [x is not None for x in (*floats, state)]
        ctx.state_dtype = None if state is None else state.dtype
        ctx.save_for_backward(*floats, seq_idx, output[2])
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, grad_y: Tensor | None, grad_state: Tensor | None, _: Any) -> tuple[Any, ...]:
        *floats, seq_idx, saved = ctx.saved_tensors
        grad_y = torch.zeros_like(floats[0]) if grad_y is None else grad_y
        grads = backward(grad_y, grad_state, *floats, ctx.delta_softplus, seq_idx, saved)
        *first, initial = [grad if has else None for grad, has in zip(grads, ctx.has)]
        return (*first, None, None if initial is None else initial.to(ctx.state_dtype), None, None)

    op.register_autograd(differentiate, setup_context=setup)

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
        floats = (u, delta, A, B, C, D, z, delta_bias, state)
        save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in floats)
        inputs = (u, delta, A, B, C, D, z, delta_bias, delta_softplus, state, seq_idx)
        if save or type(u) is not Tensor or torch.compiler.is_compiling():
            y, end, _ = op(*inputs, save)
            return y, end
        end = u.new_empty((u.shape[0], *A.shape), dtype=torch.float32)
        return compute(*inputs, end, None), end

    def run_(*inputs: Any) -> Tensor:
        """`run` with the new state in place of the old one: kernels read their part of it before they write it."""
        u, A, state = inputs[0], inputs[2], inputs[9]
        if state.dtype is torch.float32 and state.is_contiguous() and state.data_ptr() % 16 == 0:
            return compute(*inputs, state, None)
        end = u.new_empty((u.shape[0], *A.shape), dtype=torch.float32)
        y = compute(*inputs, end, None)
        state.copy_(end)
        return y

    return op, run, run_
