"""What seq_idx means, for every op that takes it: -1 is padding, a change of value starts a new sequence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def reset_mask(seq_idx_BL: Tensor) -> Tensor:
    """True at each real token whose sequence is not that of the real token before it, if there is one."""
    real_BL = seq_idx_BL >= 0
    place_BL = torch.arange(seq_idx_BL.shape[1], device=seq_idx_BL.device).expand(seq_idx_BL.shape)
    latest_BL = place_BL.masked_fill(~real_BL, -1).cummax(1).values if seq_idx_BL.numel() else place_BL
    before_BL = F.pad(latest_BL[:, :-1], (1, 0), value=-1)[:, : seq_idx_BL.shape[1]]  # latest real before t
    previous_BL = seq_idx_BL.gather(1, before_BL.clamp(min=0))
    return real_BL & (before_BL >= 0) & (previous_BL != seq_idx_BL)


def sample_seq_idx(kind: str | None, batch: int, length: int, random: torch.Generator) -> Tensor | None:
    """seq_idx (batch, length), int32, for the case tables of the ops. None gives None.

    kind: padding to the left, in the middle, to the right; several sequences packed; wild is short sequences
    whose numbers come back, padding anywhere, and a last row of padding only.
    """
    if kind is None:
        return None
    seq_idx = torch.zeros(batch, length, dtype=torch.int32)
    third = max(1, length // 3)
    if kind == "left":
        seq_idx[:, :third] = -1
    elif kind == "right":
        seq_idx[:, length - third :] = -1
    elif kind == "middle":
        seq_idx[:, third : 2 * third] = -1
    elif kind == "packed":
        seq_idx[:] = torch.arange(length) // third
    elif kind == "wild":
        seq_idx = torch.randint(-1, 3, (batch, length), generator=random, dtype=torch.int32)
        seq_idx[-1] = -1
    else:
        raise ValueError(f"seq_idx: left, middle, right, packed or wild, got {kind!r}")
    return seq_idx


def poison_padding_(x_BLE: Tensor, seq_idx_BL: Tensor) -> None:
    """NaN at padding, in place: what stands there must reach nothing."""
    x_BLE.masked_fill_((seq_idx_BL < 0)[..., None], torch.nan)
