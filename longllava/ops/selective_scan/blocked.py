"""The selective scan in plain torch for machines without a compiler: about 2 sqrt(L) steps instead of L.

Tokens are taken in spans small enough to stay in the cache. A span is cut into chunks, and all chunks walk
their tokens at the same time, twice: first from an empty state, which gives what each chunk adds; these are
chained into the state that each chunk starts from; then from there, which gives y. Decays are only ever
multiplied, never divided by or subtracted in log space, so nothing overflows however large delta |A| is. When
gradients are wanted, a span is computed again in backward, so memory does not grow with L E N.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longllava.ops import native
from longllava.ops.dispatch import without_autocast
from longllava.ops.selective_scan.reference import step_sizes
from longllava.ops.sequences import reset_mask

SPAN_ELEMENTS = 2**20  # state-elements per span: 4 MiB per temporary tensor in fp32


def why_not(*args: object) -> str | None:
    return None


@without_autocast
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
    if u_BLE.device.type == "cpu":
        native.say_once_if_missing()
    dtype = torch.float64 if u_BLE.dtype == torch.float64 else torch.float32
    batch, length, _ = u_BLE.shape
    A = A_EN.to(dtype)
    h_BEN = A.new_zeros(batch, *A.shape) if state_BEN is None else state_BEN.to(dtype, copy=True)
    D = None if D_E is None else D_E.to(dtype)
    resets_BL = None if seq_idx_BL is None else reset_mask(seq_idx_BL)
    save = torch.is_grad_enabled()
    span = max(1, SPAN_ELEMENTS // max(1, batch * A.numel()))
    ys = []
    for start in range(0, length, span):
        cut = slice(start, start + span)
        parts = [None if x is None else x[:, cut] for x in (u_BLE, delta_BLE, B_BLN, C_BLN, z_BLE)]
        masks = [None if x is None else x[:, cut] for x in (seq_idx_BL, resets_BL)]
        args: tuple[Any, ...] = (h_BEN, A, D, delta_bias_E, delta_softplus, *parts, *masks)
        y_BTE, h_BEN = checkpoint(one_span, *args, use_reentrant=False) if save else one_span(*args)
        ys.append(y_BTE)
    return torch.cat(ys, 1) if ys else torch.zeros_like(u_BLE), h_BEN


def one_span(
    h_BEN: Tensor,
    A_EN: Tensor,
    D_E: Tensor | None,
    bias_E: Tensor | None,
    softplus: bool,
    u_BTE: Tensor,
    delta_BTE: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    z_BTE: Tensor | None,
    seq_idx_BT: Tensor | None,
    resets_BT: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y in u's dtype and the state after the span."""
    dtype, length = A_EN.dtype, u_BTE.shape[1]
    u, delta, B, C = (x.to(dtype) for x in (u_BTE, delta_BTE, B_BTN, C_BTN))
    z = None if z_BTE is None else z_BTE.to(dtype)
    padding_BT1 = None
    if seq_idx_BT is not None:
        padding_BT1 = (seq_idx_BT < 0)[..., None]
        u, delta, B, C = (x.masked_fill(padding_BT1, 0) for x in (u, delta, B, C))
        z = None if z is None else z.masked_fill(padding_BT1, 0)
    delta = step_sizes(delta, bias_E, softplus, padding_BT1)

    n_steps = max(1, math.isqrt(length))
    n_chunks = -(-length // n_steps)
    extra = n_chunks * n_steps - length  # tokens of step 0 behind the end: they leave the state as it is

    def steps_first(x: Tensor) -> Tensor:
        """(B, T, k) -> (steps, B, chunks, k)"""
        return F.pad(x, (0, 0, 0, extra)).unflatten(1, (n_chunks, n_steps)).permute(2, 0, 1, 3)

    decay_SBCEN = torch.exp(steps_first(delta)[..., None] * A_EN)
    whole_BCEN = torch.exp(steps_first(delta).sum(0)[..., None] * A_EN)  # decay over a chunk
    if resets_BT is not None:
        resets_SBC11 = steps_first(resets_BT[..., None])[..., None]
        decay_SBCEN = decay_SBCEN.masked_fill(resets_SBC11, 0)
        whole_BCEN = whole_BCEN.masked_fill(resets_SBC11.any(0), 0)
    input_SBCEN = steps_first(delta * u)[..., None] * steps_first(B)[..., None, :]

    added_BCEN = input_SBCEN[0]
    for step in range(1, n_steps):
        added_BCEN = torch.addcmul(input_SBCEN[step], decay_SBCEN[step], added_BCEN)
    starts = []
    for chunk in range(n_chunks):
        starts.append(h_BEN)
        h_BEN = torch.addcmul(added_BCEN[:, chunk], whole_BCEN[:, chunk], h_BEN)

    h_BCEN, states = torch.stack(starts, 1), []
    for step in range(n_steps):
        h_BCEN = torch.addcmul(input_SBCEN[step], decay_SBCEN[step], h_BCEN)
        states.append(h_BCEN)
    y_SBCE = (torch.stack(states) @ steps_first(C)[..., None]).squeeze(-1)
    y_BTE = y_SBCE.permute(1, 2, 0, 3).flatten(1, 2)[:, :length]
    if D_E is not None:
        y_BTE = y_BTE + D_E * u
    if z is not None:
        y_BTE = y_BTE * F.silu(z)
    return y_BTE.to(u_BTE.dtype), h_BEN
