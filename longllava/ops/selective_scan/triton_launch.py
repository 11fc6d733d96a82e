"""How the scan's Triton kernels are launched: block sizes, spans of time, buffers.

Time is walked serially where the channels fill the GPU. Where they do not, it is cut into spans: one launch finds what
each span adds to an empty state, `join` carries the state from span to span, and a last launch does the work.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longllava.ops import triton_support
from longllava.ops.sequences import reset_mask
from longllava.ops.triton_support import OPTIONS, plain, rowed

LANES = 4  # that hold a channel; also the tokens of a tile
CHUNK = 64  # tokens between saved states: with 16 states they take 1 byte a token and channel
MIN_SPAN = 256  # tokens: a shorter span would not pay for its extra exponentials
WARPS_WANTED = 4  # a processor, one for each of its schedulers
PACK = 512  # tokens from which B and C are converted to fp32 once, not by every block


def geometry(channels: int, n_states: int) -> dict[str, int]:
    """What the kernels are compiled for. 16 channels a block of one warp: two for each group of four lanes, which
    share the loads of B and C; one where many states fill the registers."""
    per_lane = max(LANES, 1 << max(0, n_states - 1).bit_length()) // LANES
    block = 16 if per_lane <= 8 else 8
    return {"CHANNELS": channels, "N": n_states, "BLOCK": block, "K": LANES, "S": per_lane}


def n_blocks(shape: dict[str, int]) -> int:
    return -(-shape["CHANNELS"] // shape["BLOCK"])


def spans(batch: int, length: int, shape: dict[str, int], device: torch.device) -> tuple[int, int]:
    """(number of spans of time, tokens of each, a multiple of CHUNK)."""
    missing = WARPS_WANTED * triton_support.n_processors(device) // max(1, batch * n_blocks(shape))
    wanted = max(1, min(missing, length // MIN_SPAN))
    span = -(-max(1, length) // (wanted * CHUNK)) * CHUNK
    return -(-max(1, length) // span), span


def flags_of(seq_idx: Tensor | None) -> Tensor | None:
    """(B, L) int8, row after row: 1 at padding, 2 where the state is emptied first."""
    if seq_idx is None:
        return None
    return ((seq_idx < 0).to(torch.int8) + 2 * reset_mask(seq_idx).to(torch.int8)).contiguous()


def rows_of(**tensors: Tensor | None) -> dict[str, Any]:
    """The arguments that describe tensors read by rows: themselves, strides of the batch and of a token."""
    arguments: dict[str, Any] = {}
    for name, x in tensors.items():
        arguments[name] = x
        arguments[f"{name}_batch"] = 0 if x is None else x.stride(0)
        arguments[f"{name.upper()}_STEP"] = 0 if x is None else x.stride(1)
    return arguments


def _inputs(
    u: Tensor, delta: Tensor, B: Tensor, C: Tensor, z: Tensor | None, A: Tensor, D: Tensor | None, bias: Tensor | None
) -> dict[str, Any]:
    """Arguments that both directions take; copies only where needed."""
    if u.shape[1] >= PACK:
        B, C = B.float(), C.float()
    named = {"u": rowed(u), "delta": rowed(delta), "B": rowed(B), "C": rowed(C), "z": None if z is None else rowed(z)}
    return {**rows_of(**named), "A": plain(A), "D": plain(D), "bias": plain(bias)}


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
    """y; the state after each row goes to `end`, which may be `state`, the states for backward to `saved`."""
    from longllava.ops.selective_scan.triton_forward import forward, join

    batch, length, channels = u.shape
    n_states = A.shape[1]
    y = u.new_empty((batch, length, channels))
    if end.numel() == 0:
        return y.zero_()
    shape = geometry(channels, n_states)
    n_splits, span = spans(batch, length, shape, u.device)
    inputs = _inputs(u, delta, B, C, z, A, D, delta_bias)
    state, flags = plain(state), flags_of(seq_idx)
    common = {**shape, **OPTIONS, "length": length, "span": span, "n_splits": n_splits, "SOFTPLUS": delta_softplus}
    common |= {"flags": flags, "CHUNK": CHUNK, "Y_STEP": channels, "STEPS": min(length, LANES) or 1, "num_warps": 1}
    common["FAST"] = flags is None and length >= LANES
    grid = (n_blocks(shape) * n_splits * batch,)
    ends = end
    with torch.cuda.device_of(u):
        if n_splits > 1:
            pieces = u.new_empty((batch, n_splits, channels, n_states), dtype=torch.float32)
            sums = u.new_empty((batch, n_splits, channels), dtype=torch.float32)
            states_only = {**inputs, "C": None, "z": None, "D": None}
            forward[grid](**states_only, state=None, y=None, ends=pieces, sums=sums, saved=None, **common)
            join[(n_blocks(shape) * batch,)](
                pieces, sums, inputs["A"], state, end, n_splits, REVERSE=False, **shape, **OPTIONS, num_warps=1
            )
            state, ends = pieces, torch.empty_like(pieces)
        forward[grid](**inputs, state=state, y=y, ends=ends, sums=None, saved=saved, **common)
    return y


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
    """Gradients of u, delta, A, B, C, D, z, delta_bias, initial state; zero-sized where there is no input."""
    from longllava.ops.selective_scan.triton_backward import backward, backward_states
    from longllava.ops.selective_scan.triton_forward import join

    batch, length, channels = u.shape
    n_states = A.shape[1]

    def fp32(*sizes: int) -> Tensor:
        return u.new_empty(sizes, dtype=torch.float32)

    grad_start = fp32(batch, channels, n_states)
    if grad_start.numel() == 0 or length == 0:
        zeros = [fp32(0) if x is None else torch.zeros_like(x) for x in (u, delta, A, B, C, D, z, delta_bias)]
        first = grad_start.zero_() if grad_state is None else grad_state.to(torch.float32, copy=True)
        return (*zeros, first)  # type: ignore[return-value]
    shape = geometry(channels, n_states)
    n_splits, span = spans(batch, length, shape, u.device)
    inputs = _inputs(u, delta, B, C, z, A, D, delta_bias) | rows_of(grad_y=rowed(grad_y))
    grad_state = plain(grad_state)
    common = {**shape, **OPTIONS, "length": length, "span": span, "n_splits": n_splits, "SOFTPLUS": delta_softplus}
    common |= {"flags": flags_of(seq_idx), "num_warps": 1}
    grid = (n_blocks(shape) * n_splits * batch,)
    grads: dict[str, Tensor | None] = {
        "grad_u": u.new_empty(u.shape),
        "grad_delta": delta.new_empty(u.shape),
        "grad_z": None if z is None else z.new_empty(u.shape),
        "grad_A": fp32(batch, n_splits, channels, n_states),
        "grad_B": fp32(n_blocks(shape), batch, length, n_states),
        "grad_C": fp32(n_blocks(shape), batch, length, n_states),
        "grad_D": None if D is None else fp32(batch, n_splits, channels),
        "grad_bias": None if delta_bias is None else fp32(batch, n_splits, channels),
    }
    grad_starts = grad_start
    with torch.cuda.device_of(u):
        if n_splits > 1:
            pieces, sums = fp32(batch, n_splits, channels, n_states), fp32(batch, n_splits, channels)
            unused = ("u", "u_batch", "U_STEP", "B", "B_batch", "B_STEP", "D")
            some = {name: value for name, value in inputs.items() if name not in unused}
            backward_states[grid](**some, pieces=pieces, sums=sums, **common)
            join[(n_blocks(shape) * batch,)](
                pieces, sums, inputs["A"], grad_state, grad_start, n_splits, REVERSE=True, **shape, **OPTIONS,
                num_warps=1,
            )  # fmt: skip
            grad_state, grad_starts = pieces, torch.empty_like(pieces)
        scratch = fp32(grid[0], CHUNK * shape["BLOCK"] * shape["S"])
        backward[grid](
            **inputs, **grads, grad_state=grad_state, saved=saved, scratch=scratch, grad_start=grad_starts,
            batch=batch, CHUNK=CHUNK, GRAD_STEP=channels, **common,
        )  # fmt: skip

    def total(name: str, x: Tensor | None, axes: int | tuple[int, int]) -> Tensor:
        grad = grads[name]
        return fp32(0) if grad is None or x is None else grad.sum(axes).to(x.dtype)

    grad_A, grad_B, grad_C = total("grad_A", A, (0, 1)), total("grad_B", B, 0), total("grad_C", C, 0)
    grad_D, grad_bias = total("grad_D", D, (0, 1)), total("grad_bias", delta_bias, (0, 1))
    grad_u, grad_delta, grad_z = (grads[name] for name in ("grad_u", "grad_delta", "grad_z"))
    assert grad_u is not None and grad_delta is not None
    grad_z = fp32(0) if grad_z is None else grad_z
    return grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias, grad_start
