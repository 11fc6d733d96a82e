"""The selective scan on the CPU by the compiled kernels (csrc/selective_scan*)."""

from __future__ import annotations

import ctypes
import functools
import struct
from typing import Any

import torch
from torch import Tensor

from longllava.ops import native
from longllava.ops.native import address, ids, plain, readable, rows
from longllava.ops.selective_scan.autograd import wrapped

FIELDS = struct.Struct("@67q")  # csrc/selective_scan.h, ScanArguments
NO_ROWS = (0, 0, 0, 0)
NO_GRADIENTS = (*NO_ROWS * 6, 0, 0, 0, 0, 0)
MAX_STATES = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    if u.device.type != "cpu":
        return f"needs CPU tensors, got {u.device.type}"
    if A.shape[1] > MAX_STATES:
        return f"takes at most {MAX_STATES} states per channel, got {A.shape[1]}"
    for name, x in (("u", u), ("delta", delta), ("B", B), ("C", C), ("z", z)):
        if x is not None and x.dtype not in DTYPES:
            return f"takes float32, bfloat16 or float16, got {name} in {str(x.dtype).removeprefix('torch.')}"
    return native.why_not()


@functools.lru_cache(maxsize=1)
def _count() -> Any:
    function = native.library().longllava_scan_checkpoints
    function.restype = ctypes.c_int64
    function.argtypes = [ctypes.c_int64] * 4
    return function


def compute(
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
    end: Tensor,
    saved: Tensor | None,
) -> Tensor:
    batch, length, channels = u.shape
    n_states = A.shape[1]
    dtype = u.dtype
    assert saved is None or saved.numel() == _count()(batch, length, channels, n_states)
    u, delta, B, C, z, *parameters = _prepared(u, delta, B, C, z, A, D, delta_bias, state, seq_idx)
    y = u.new_empty((batch, length, channels))
    status = native.function("longllava_scan_forward")(
        FIELDS.pack(
            FIELDS.size, batch, length, channels, n_states, delta_softplus, torch.get_num_threads(),
            *rows(u), *rows(delta), *rows(z), *rows(B), *rows(C), *rows(y),
            *map(address, parameters), end.data_ptr(), address(saved),
            *NO_GRADIENTS,
        )
    )  # fmt: skip
    native.succeed(status, "selective_scan")
    return y.to(dtype)


def _prepared(
    u: Tensor,
    delta: Tensor,
    B: Tensor,
    C: Tensor,
    z: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    bias: Tensor | None,
    state: Tensor | None,
    seq_idx: Tensor | None,
) -> list[Any]:
    """The same tensors as the kernels read them; copies only where needed."""
    rowed = [None if x is None else readable(x) for x in (u, delta, B, C, z)]
    packed = [None if x is None else plain(x) for x in (A, D, bias, state)]
    return [*rowed, *packed, ids(seq_idx)]


def gradients(
    grad_y: Tensor,
    grad_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    seq_idx: Tensor | None,
    saved: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, length, channels = u.shape
    n_states = A.shape[1]
    wanted = (u, delta, A, B, C, D, z, delta_bias)
    dtypes = [torch.float32 if x is None else x.dtype for x in wanted]
    u, delta, B, C, z, A, D, delta_bias, _, seq_idx = _prepared(u, delta, B, C, z, A, D, delta_bias, None, seq_idx)
    grad_y = readable(grad_y)
    grad_state = None if grad_state is None else plain(grad_state)
    grads = [
        u.new_empty(0, dtype=torch.float32) if x is None else x.new_empty(x.shape)
        for x in (u, delta, A, B, C, D, z, delta_bias)
    ]
    grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias = grads
    grad_initial = u.new_empty((batch, channels, n_states), dtype=torch.float32)
    status = native.function("longllava_scan_backward")(
        FIELDS.pack(
            FIELDS.size, batch, length, channels, n_states, delta_softplus, torch.get_num_threads(),
            *rows(u), *rows(delta), *rows(z), *rows(B), *rows(C), *NO_ROWS,
            *map(address, (A, D, delta_bias, None, seq_idx)), 0, saved.data_ptr(),
            *rows(grad_y), *rows(grad_u), *rows(grad_delta), *rows(None if z is None else grad_z),
            *rows(grad_B), *rows(grad_C),
            address(grad_state), grad_A.data_ptr(),
            0 if D is None else grad_D.data_ptr(), 0 if delta_bias is None else grad_bias.data_ptr(),
            grad_initial.data_ptr(),
        )
    )  # fmt: skip
    native.succeed(status, "selective_scan backward")
    first = [grad.to(dtype) for grad, dtype in zip(grads, dtypes)]
    return (*first, grad_initial)  # type: ignore[return-value]


def saved_shape(batch: int, length: int, channels: int, n_states: int) -> tuple[int, ...]:
    """(numbers,): states of whole vectors of 16 channels before every 16 tokens, as the kernels order them."""
    return (batch * -(-length // 16) * -(-channels // 16) * 16 * n_states,)


selective_scan, run, run_ = wrapped("selective_scan", compute, gradients, saved_shape, device_types="cpu")
