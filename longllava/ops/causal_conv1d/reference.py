"""The causal convolution in plain torch: the specification, the judge, and what runs without a compiler.

fp32 inside, or fp64 when x is fp64. Without seq_idx it is K shifted products. With it, each token gathers its
window by index, so that padding is passed over and a reset is seen.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longllava.ops import native


def why_not(x_BLE: Tensor, *args: object) -> str | None:
    return None


def run(
    x_BLE: Tensor,
    weight_EK: Tensor,
    bias_E: Tensor | None = None,
    state_BKE: Tensor | None = None,
    seq_idx_BL: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    if x_BLE.device.type == "cpu":
        native.say_once_if_missing()
    dtype = torch.float64 if x_BLE.dtype == torch.float64 else torch.float32
    batch, length, channels = x_BLE.shape
    n_past = weight_EK.shape[1] - 1
    if state_BKE is None:
        state_BKE = x_BLE.new_zeros(batch, n_past, channels)
    x = x_BLE if seq_idx_BL is None else x_BLE.masked_fill((seq_idx_BL < 0)[..., None], 0)
    line_BTE = torch.cat([state_BKE.to(x.dtype), x], 1)  # the initial state stands before the tokens
    if seq_idx_BL is None:
        shifts = [line_BTE[:, k : k + length] for k in range(n_past + 1)]
        state = line_BTE[:, length:]
    else:
        places_BLK, last_BK = windows(seq_idx_BL, n_past)
        shifts = [pick(line_BTE, places_BLK[..., k]) for k in range(n_past + 1)]
        state = pick(line_BTE, last_BK)
    y_BLE = torch.zeros_like(x, dtype=dtype)
    for x_shifted_BLE, weight_E in zip(shifts, weight_EK.to(dtype).unbind(1)):
        y_BLE = y_BLE + x_shifted_BLE.to(dtype) * weight_E
    if bias_E is not None:
        y_BLE = y_BLE + bias_E.to(dtype)
    if activation == "silu":
        y_BLE = F.silu(y_BLE)
    if seq_idx_BL is not None:
        y_BLE = y_BLE.masked_fill((seq_idx_BL < 0)[..., None], 0)
    return y_BLE.to(x_BLE.dtype), state.clone()


def pick(line_BTE: Tensor, place_BL: Tensor) -> Tensor:
    """line[b, place[b, l]] for every token; 0 where the place is -1."""
    if not place_BL.numel():
        return line_BTE.new_zeros(*place_BL.shape, line_BTE.shape[2])
    index = place_BL.clamp(min=0)[..., None].expand(-1, -1, line_BTE.shape[2])
    return line_BTE.gather(1, index).masked_fill((place_BL < 0)[..., None], 0)


def windows(seq_idx_BL: Tensor, n_past: int) -> tuple[Tensor, Tensor]:
    """Where each token's window and the final state lie, in the line `initial state, then tokens`.

    Returns places (B, L, n_past + 1) and last (B, n_past), oldest input first; -1 is an input before a reset.
    """
    batch, length = seq_idx_BL.shape
    device = seq_idx_BL.device
    places = torch.full((batch, length, n_past + 1), -1, dtype=torch.long, device=device)
    window_BK = torch.arange(n_past, device=device).repeat(batch, 1)
    previous_B = torch.full((batch,), -1, dtype=seq_idx_BL.dtype, device=device)
    for t, now_B in enumerate(seq_idx_BL.unbind(1)):
        real_B = now_B >= 0
        reset_B = real_B & (previous_B >= 0) & (now_B != previous_B)
        window_BK = window_BK.masked_fill(reset_B[:, None], -1)
        own_B = torch.full_like(now_B, n_past + t, dtype=torch.long)
        whole_BK = torch.cat([window_BK, own_B[:, None]], 1)
        places[:, t] = whole_BK.masked_fill(~real_B[:, None], -1)
        window_BK = torch.where(real_B[:, None], whole_BK[:, 1:], window_BK)
        previous_B = torch.where(real_B, now_B, previous_B)
    return places, window_BK
