"""The causal convolution on the CPU by the compiled kernels (csrc/causal_conv1d*), as torch custom ops.

As in selective_scan/cpu.py: custom ops under autograd and torch.compile, the kernel itself otherwise.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longllava.ops import native
from longllava.ops.native import address, plain, readable, rows

FIELDS = struct.Struct("@44q")  # csrc/causal_conv1d.h, ConvArguments
NO_ROWS = (0, 0, 0, 0)
NO_GRADIENTS = (*NO_ROWS * 4, 0, 0)
MAX_KERNEL = 8
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(x: Tensor, weight: Tensor, *rest: Any) -> str | None:
    if x.device.type != "cpu":
        return f"needs CPU tensors, got {x.device.type}"
    if weight.shape[1] > MAX_KERNEL:
        return f"takes at most {MAX_KERNEL} taps, got {weight.shape[1]}"
    if x.dtype not in DTYPES:
        return f"takes float32, bfloat16 or float16, got {str(x.dtype).removeprefix('torch.')}"
    return native.why_not()


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    inputs = (x, weight, bias, state)
    wants_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    call: Callable[..., Any] = causal_conv1d
    if not wants_grad and type(x) is Tensor and not torch.compiler.is_compiling():
        call = _forward
    y, new_state = call(x, weight, bias, state, seq_idx, activation == "silu")
    return y, new_state


@functools.lru_cache(maxsize=1)
def _kernels() -> tuple[Any, Any]:
    library = native.library()
    for function in (library.longllava_conv_forward, library.longllava_conv_backward):
        function.argtypes = [native.ctypes.c_char_p]
    return library.longllava_conv_forward, library.longllava_conv_backward


def _prepared(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, seq_idx: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The same tensors as the kernels read them; copies only where needed."""
    return (
        readable(x),
        plain(weight),
        None if bias is None else plain(bias),
        None if state is None else readable(state),
        None if seq_idx is None else plain(seq_idx, torch.int32),
    )


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, seq_idx: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    forward, _ = _kernels()
    batch, length, channels = x.shape
    n_taps = weight.shape[1]
    dtype = x.dtype
    x, weight, bias, state, seq_idx = _prepared(x, weight, bias, state, seq_idx)
    # new_empty: torch.empty would follow the caller's default dtype and device
    y = x.new_empty((batch, length, channels))
    state_out = x.new_empty((batch, n_taps - 1, channels))
    status = forward(
        FIELDS.pack(
            FIELDS.size, batch, length, channels, n_taps, silu, torch.get_num_threads(),
            *rows(x), *rows(state), *rows(y), *rows(state_out),
            weight.data_ptr(), address(bias), address(seq_idx), *NO_GRADIENTS,
        )
    )  # fmt: skip
    native.succeed(status, "causal_conv1d")
    return y.to(dtype), state_out.to(dtype)


def _backward(
    grad_y: Tensor,
    grad_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and the initial state (zero-sized, fp32, where there is no bias)."""
    _, backward = _kernels()
    batch, length, channels = x.shape
    n_taps = weight.shape[1]
    dtypes = x.dtype, weight.dtype, torch.float32 if bias is None else bias.dtype
    x, weight, bias, state, seq_idx = _prepared(x, weight, bias, state, seq_idx)
    grad_y = readable(grad_y)
    grad_state = None if grad_state is None else readable(grad_state)
    grad_x = x.new_empty((batch, length, channels))
    grad_weight = x.new_empty((channels, n_taps), dtype=torch.float32)
    grad_bias = x.new_empty(0 if bias is None else channels, dtype=torch.float32)
    grad_initial = x.new_empty((batch, n_taps - 1, channels))
    status = backward(
        FIELDS.pack(
            FIELDS.size, batch, length, channels, n_taps, silu, torch.get_num_threads(),
            *rows(x), *rows(state), *NO_ROWS, *NO_ROWS,
            weight.data_ptr(), address(bias), address(seq_idx),
            *rows(grad_y), *rows(grad_state), *rows(grad_x), *rows(grad_initial),
            grad_weight.data_ptr(), 0 if bias is None else grad_bias.data_ptr(),
        )
    )  # fmt: skip
    native.succeed(status, "causal_conv1d backward")
    first = [grad.to(dtype) for grad, dtype in zip((grad_x, grad_weight, grad_bias), dtypes)]
    return first[0], first[1], first[2], grad_initial.to(dtypes[0])


causal_conv1d = torch.library.custom_op("longllava::causal_conv1d", _forward, mutates_args=(), device_types="cpu")
causal_conv1d_backward = torch.library.custom_op(
    "longllava::causal_conv1d_backward", _backward, mutates_args=(), device_types="cpu"
)


@causal_conv1d.register_fake
def _(x, weight, bias, state, seq_idx, silu):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), x.new_empty((x.shape[0], weight.shape[1] - 1, x.shape[2]))


@causal_conv1d_backward.register_fake
def _(grad_y, grad_state, x, weight, bias, state, seq_idx, silu):  # type: ignore[no-untyped-def]
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        x.new_empty(0, dtype=torch.float32) if bias is None else bias.new_empty(bias.shape),
        x.new_empty((x.shape[0], weight.shape[1] - 1, x.shape[2])),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, state, seq_idx, ctx.silu = inputs
    ctx.state_dtype = None if state is None else state.dtype
    ctx.save_for_backward(x, weight, bias, state, seq_idx)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_y: Tensor | None, grad_state: Tensor | None) -> tuple[Any, ...]:
    x, weight, bias, state, seq_idx = ctx.saved_tensors
    if grad_y is None:
        grad_y = torch.zeros_like(x)
    grads = causal_conv1d_backward(grad_y, grad_state, x, weight, bias, state, seq_idx, ctx.silu)
    grad_x, grad_weight, grad_bias, grad_initial = grads
    initial = None if state is None else grad_initial.to(ctx.state_dtype)
    return grad_x, grad_weight, None if bias is None else grad_bias, initial, None, None


causal_conv1d.register_autograd(_differentiate, setup_context=_setup)
