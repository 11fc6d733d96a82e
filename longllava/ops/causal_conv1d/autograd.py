"""How kernels become a backend: torch custom ops where gradients are wanted or torch.compile looks on, the kernels
themselves otherwise, as in selective_scan/autograd.py.

A backend's compute(x, weight, bias, state, seq_idx, silu, end) returns y and writes the new state to `end`. Its
gradients(grad_y, grad_state, x, weight, bias, state, seq_idx, silu) returns those of x, weight, bias and the initial
state: that of no bias is of no size and fp32, that of the state is there without a state too, in x's dtype.
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
    in_place: int = 0,
    device_types: str | None = None,
) -> tuple[Any, Run, Compute]:
    """(custom op `longllava::<name>`, run, run_): run takes the convolution's inputs, run_ replaces the state.

    in_place: tokens up to which the kernels may be given the state itself as `end`.
    """

    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, seq_idx: Tensor | None, silu: bool
    ) -> tuple[Tensor, Tensor]:
        # new_empty: torch.empty would follow the caller's default dtype and device
        end = x.new_empty((x.shape[0], weight.shape[1] - 1, x.shape[2]))
        return compute(x, weight, bias, state, seq_idx, silu, end), end

    op = torch.library.custom_op(f"longllava::{name}", forward, mutates_args=(), device_types=device_types)
    backward: Any = torch.library.custom_op(
        f"longllava::{name}_backward", gradients, mutates_args=(), device_types=device_types
    )

    @op.register_fake
    def _(x, weight, bias, state, seq_idx, silu):  # type: ignore[no-untyped-def]
        return x.new_empty(x.shape), x.new_empty((x.shape[0], weight.shape[1] - 1, x.shape[2]))

    @backward.register_fake
    def _(grad_y, grad_state, x, weight, bias, state, seq_idx, silu):  # type: ignore[no-untyped-def]
        no_bias = x.new_empty(0, dtype=torch.float32)
        grad_bias = no_bias if bias is None else bias.new_empty(bias.shape)
        grad_start = x.new_empty((x.shape[0], weight.shape[1] - 1, x.shape[2]))
        return x.new_empty(x.shape), weight.new_empty(weight.shape), grad_bias, grad_start

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, bias, state, seq_idx, ctx.silu = inputs
        ctx.state_dtype = None if state is None else state.dtype
        ctx.save_for_backward(x, weight, bias, state, seq_idx)
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, grad_y: Tensor | None, grad_state: Tensor | None) -> tuple[Any, ...]:
        x, weight, bias, state, seq_idx = ctx.saved_tensors
        grad_y = torch.zeros_like(x) if grad_y is None else grad_y
        found = backward(grad_y, grad_state, x, weight, bias, state, seq_idx, ctx.silu)
        grad_x, grad_weight, grad_bias, grad_start = found
        start = None if state is None else grad_start.to(ctx.state_dtype)
        return grad_x, grad_weight, None if bias is None else grad_bias, start, None, None

    op.register_autograd(differentiate, setup_context=setup)

    def run(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        state: Tensor | None = None,
        seq_idx: Tensor | None = None,
        activation: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        floats = (x, weight, bias, state)
        wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in floats)
        call: Any = op if wanted or type(x) is not Tensor or torch.compiler.is_compiling() else forward
        y, end = call(x, weight, bias, state, seq_idx, activation == "silu")
        return y, end

    def run_(
        x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, seq_idx: Tensor | None, activation: str | None
    ) -> Tensor:
        """`run` with the new state in place of the old one: at once where one thread holds it, else by a copy."""
        if x.shape[1] <= in_place and state.dtype is x.dtype and state.is_contiguous():
            return compute(x, weight, bias, state, seq_idx, activation == "silu", state)
        y, end = forward(x, weight, bias, state, seq_idx, activation == "silu")
        state.copy_(end)
        return y

    return op, run, run_
