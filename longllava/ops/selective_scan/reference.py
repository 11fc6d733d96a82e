"""The selective scan as a loop over time: the specification, and the judge of every other backend.

fp32 inside, or fp64 when u is fp64 (the state returned is then fp64 too).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longllava.ops.sequences import reset_mask


def why_not(*args: object) -> str | None:
    return None


def run(
    u_BLE: Tensor,
    delta_BLE: Tensor,
    A_EN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_E: Tensor | None = None,
    z_BLE: Tensor | None = None,
    delta_bias_E: Tensor | None = None,
    delta_softplus: bool = False,
    state_BEN: Tensor | None = None,
    seq_idx_BL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if u_BLE.dtype == torch.float64 else torch.float32
    u, delta, A, B, C = (x.to(dtype) for x in (u_BLE, delta_BLE, A_EN, B_BLN, C_BLN))
    z = None if z_BLE is None else z_BLE.to(dtype)
    padding_BL1, resets_BL = None, None
    if seq_idx_BL is not None:
        padding_BL1 = (seq_idx_BL < 0)[..., None]
        resets_BL = reset_mask(seq_idx_BL)
        # whatever stands at padding, also NaN, reaches neither values nor gradients
        u, delta, B, C = (x.masked_fill(padding_BL1, 0) for x in (u, delta, B, C))
        z = None if z is None else z.masked_fill(padding_BL1, 0)
    delta = step_sizes(delta, delta_bias_E, delta_softplus, padding_BL1)

    h_BEN = u.new_zeros(u.shape[0], *A.shape) if state_BEN is None else state_BEN.to(dtype, copy=True)
    # Written in place where no gradient is wanted: rows that live on between the loop's states keep the heap from
    # reusing their room, and it grew by nearly a state a token.
    rows_BLE = None if torch.is_grad_enabled() else torch.empty_like(u)
    ys = []
    for t in range(u.shape[1]):
        if resets_BL is not None:
            h_BEN = h_BEN.masked_fill(resets_BL[:, t, None, None], 0)
        input_BEN = (delta[:, t] * u[:, t])[..., None] * B[:, t, None, :]
        h_BEN = torch.exp(delta[:, t, :, None] * A) * h_BEN + input_BEN
        y_BE = (h_BEN * C[:, t, None, :]).sum(-1)
        if rows_BLE is None:
            ys.append(y_BE)
        else:
            rows_BLE[:, t] = y_BE
    y_BLE = rows_BLE if rows_BLE is not None else torch.stack(ys, 1) if ys else torch.zeros_like(u)
    if D_E is not None:
        y_BLE = y_BLE + D_E.to(dtype) * u
    if z is not None:
        y_BLE = y_BLE * F.silu(z)
    return y_BLE.to(u_BLE.dtype), h_BEN


def step_sizes(delta_BLE: Tensor, bias_E: Tensor | None, softplus: bool, padding_BL1: Tensor | None) -> Tensor:
    """The step the recurrence takes at each token; exactly 0 at padding, which leaves the state as it is."""
    if bias_E is not None:
        delta_BLE = delta_BLE + bias_E.to(delta_BLE.dtype)
    if softplus:
        delta_BLE = F.softplus(delta_BLE)
    return delta_BLE if padding_BL1 is None else delta_BLE.masked_fill(padding_BL1, 0)
