"""The scan of its authors, mamba-ssm's selective_scan_fn.

Source: state-spaces/mamba, mamba_ssm/ops/selective_scan_interface.py.

Its tensors are channel-major, so u, delta and z are copied on the way in and y on the way out. It has no initial state
and no seq_idx, and its backward leaves out the gradient of the returned state, which raises here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longllava.errors import BackendError
from longllava.ops import upstream_support

MAX_STATES = 256
CHUNK = 2048  # tokens that its kernel keeps a state for


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
    seq_idx: Tensor | None = None,
) -> str | None:
    batch, length, channels = u.shape
    if state is not None:
        return "mamba-ssm's scan starts from an empty state only, got an initial state"
    if seq_idx is not None:
        return "mamba-ssm's scan knows no padding and no packed sequences, got seq_idx"
    if u.numel() == 0:
        return f"mamba-ssm's scan needs at least one token and one row, got {batch} rows of {length}"
    if A.shape[1] > MAX_STATES:
        return f"mamba-ssm's scan takes at most {MAX_STATES} states per channel, got {A.shape[1]}"
    for name, x in (("u", u), ("delta", delta), ("B", B), ("C", C), ("z", z)):
        if x is not None and (x.dtype != u.dtype or x.dtype not in (torch.float32, torch.float16, torch.bfloat16)):
            return f"mamba-ssm's scan takes one of float32, float16, bfloat16 for all, got {name} in {x.dtype}"
    if batch * channels * -(-length // CHUNK) * A.shape[1] >= 2**31:
        return f"mamba-ssm counts saved states in 32 bits: {batch} rows of {length} tokens are too many"
    if u.numel() >= upstream_support.BEYOND_UINT32:
        return f"mamba-ssm counts elements in 32 bits (before 2.3.2), got {u.numel()}"
    return upstream_support.why_not("mamba-ssm", first_call, u=u, delta=delta, B=B, C=C, z=z)


def first_call(device: torch.device) -> object:
    u, A, B = (torch.ones(shape, device=device) for shape in ((1, 1, 8), (8, 4), (1, 1, 4)))
    return run(u, u, -A, B, B)


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
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    u, delta, B, C = (x.transpose(1, 2).contiguous() for x in (u, delta, B, C))
    z = None if z is None else z.transpose(1, 2).contiguous()
    D, delta_bias = (None if x is None else x.float() for x in (D, delta_bias))
    y, last = selective_scan_fn(
        u, delta, A.float(), B, C, D, z, delta_bias, delta_softplus=delta_softplus, return_last_state=True
    )
    state = last.float().clone()
    if state.requires_grad:
        state.register_hook(_refuse)
    return y.transpose(1, 2).contiguous(), state


def _refuse(grad: Tensor) -> None:
    raise BackendError(
        "selective_scan: mamba-ssm's backward has no gradient of the returned state; use another backend"
    )
