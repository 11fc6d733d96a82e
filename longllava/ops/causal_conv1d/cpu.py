"""The causal convolution on the CPU by the compiled kernels (csrc/causal_conv1d*)."""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor

from longllava.ops import native
from longllava.ops.causal_conv1d.autograd import wrapped
from longllava.ops.native import address, ids, plain, readable, rows

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


def _prepared(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, seq_idx: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The same tensors as the kernels read them; copies only where needed."""
    return (
        readable(x),
        plain(weight),
        None if bias is None else plain(bias),
        None if state is None else readable(state),
        ids(seq_idx),
    )


def compute(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
    end: Tensor,
) -> Tensor:
    batch, length, channels = x.shape
    n_taps = weight.shape[1]
    dtype = x.dtype
    x, weight, bias, state, seq_idx = _prepared(x, weight, bias, state, seq_idx)
    y = x.new_empty((batch, length, channels))
    written = end if end.dtype is x.dtype else x.new_empty(end.shape)
    status = native.function("longllava_conv_forward")(
        FIELDS.pack(
            FIELDS.size, batch, length, channels, n_taps, silu, torch.get_num_threads(),
            *rows(x), *rows(state), *rows(y), *rows(written),
            address(weight), address(bias), address(seq_idx), *NO_GRADIENTS,
        )
    )  # fmt: skip
    native.succeed(status, "causal_conv1d")
    if written is not end:
        end.copy_(written)
    return y.to(dtype)


def gradients(
    grad_y: Tensor,
    grad_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
    status = native.function("longllava_conv_backward")(
        FIELDS.pack(
            FIELDS.size, batch, length, channels, n_taps, silu, torch.get_num_threads(),
            *rows(x), *rows(state), *NO_ROWS, *NO_ROWS,
            address(weight), address(bias), address(seq_idx),
            *rows(grad_y), *rows(grad_state), *rows(grad_x), *rows(grad_initial),
            grad_weight.data_ptr(), 0 if bias is None else grad_bias.data_ptr(),
        )
    )  # fmt: skip
    native.succeed(status, "causal_conv1d backward")
    first = [grad.to(dtype) for grad, dtype in zip((grad_x, grad_weight, grad_bias), dtypes)]
    return first[0], first[1], first[2], grad_initial.to(dtypes[0])


causal_conv1d, run, run_ = wrapped("causal_conv1d", compute, gradients, device_types="cpu")
