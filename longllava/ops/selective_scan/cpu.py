"""The selective scan on the CPU by the compiled kernels (csrc/selective_scan*), as torch custom ops.

`longllava::selective_scan` and `longllava::selective_scan_backward` work under autograd and torch.compile.
When no gradient is wanted and nothing is being traced, `run` calls the kernel itself, which saves the custom
op's overhead: decoding calls this once per layer and token.
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
    call: Callable[..., Any] = selective_scan
    if not save and type(u) is Tensor and not torch.compiler.is_compiling():
        call = _forward
    return call(u, delta, A, B, C, D, z, delta_bias, delta_softplus, state, seq_idx, save)[:2]


@functools.lru_cache(maxsize=1)
def _kernels() -> tuple[Any, Any, Any]:
    library = native.library()
    library.longllava_scan_checkpoints.restype = native.ctypes.c_int64
    library.longllava_scan_checkpoints.argtypes = [native.ctypes.c_int64] * 4
    for function in (library.longllava_scan_forward, library.longllava_scan_backward):
        function.argtypes = [native.ctypes.c_char_p]
    return library.longllava_scan_forward, library.longllava_scan_backward, library.longllava_scan_checkpoints


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
    forward, _, count = _kernels()
    batch, length, channels = u.shape
    n_states = A.shape[1]
    dtype = u.dtype
    u, delta, B, C, z, *parameters = _prepared(u, delta, B, C, z, A, D, delta_bias, state, seq_idx)
    # new_empty: torch.empty would follow the caller's default dtype and device
    y = u.new_empty((batch, length, channels))
    state_out = u.new_empty((batch, channels, n_states), dtype=torch.float32)
    saved = u.new_empty(count(batch, length, channels, n_states) if save else 0, dtype=torch.float32)
    status = forward(
        FIELDS.pack(
            FIELDS.size, batch, length, channels, n_states, delta_softplus, torch.get_num_threads(),
            *rows(u), *rows(delta), *rows(z), *rows(B), *rows(C), *rows(y),
            *map(address, parameters), state_out.data_ptr(), saved.data_ptr() if save else 0,
            *NO_GRADIENTS,
        )
    )  # fmt: skip
    native.succeed(status, "selective_scan")
    return y.to(dtype), state_out, saved


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
    return [*rowed, *packed, None if seq_idx is None else plain(seq_idx, torch.int32)]


def _backward(
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
    """Gradients of u, delta, A, B, C, D, z, delta_bias, initial state; zero-sized where there is no input."""
    _, backward, _ = _kernels()
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
    status = backward(
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


selective_scan = torch.library.custom_op("longllava::selective_scan", _forward, mutates_args=(), device_types="cpu")
selective_scan_backward = torch.library.custom_op(
    "longllava::selective_scan_backward", _backward, mutates_args=(), device_types="cpu"
)


@selective_scan.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, delta_softplus, state, seq_idx, save):  # type: ignore[no-untyped-def]
    batch, length, channels = u.shape
    count = batch * -(-length // 32) * -(-channels // 16) * 16 * A.shape[1] if save else 0
    return (
        u.new_empty(u.shape),
        u.new_empty((batch, channels, A.shape[1]), dtype=torch.float32),
        u.new_empty(count, dtype=torch.float32),
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
