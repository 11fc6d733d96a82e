"""Fewer tokens an image: means over squares of the grid (2-D), over the flat sequence (1-D), or none.

The published 24 x 24 -> 12 x 12 is bilinear interpolation, which at exactly one half equals a 2 x 2 mean;
24 -> 6 is two halvings (bilinear in one step would read only the centre of each square). The 1-D form is
what LongLLaVA's stage 1 ran with (llava/model/multimodal_encoder/clip_encoder.py).
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from longllava.errors import InputError


def pool_features(features_NTC: Tensor, n_tokens: int, mode: str) -> Tensor:
    """(N, T, C) -> (N, n_tokens, C). mode "2d", "1d" or "none". Raises: InputError when T does not divide so."""
    n, t, c = features_NTC.shape
    if t == n_tokens:
        return features_NTC
    if mode == "1d":
        return F.interpolate(features_NTC.transpose(1, 2), size=n_tokens, mode="linear").transpose(1, 2)
    grid, side = math.isqrt(t), math.isqrt(n_tokens)
    if mode != "2d" or grid * grid != t or side * side != n_tokens or side == 0 or grid % side:
        raise InputError(f"pooling {mode!r}: {t} tokens cannot become {n_tokens}; use squares that divide, such as"
                         f" {[(grid // f) ** 2 for f in range(1, grid + 1) if grid % f == 0]}")  # fmt: skip
    f = grid // side
    # one axis after the other: over both at once torch takes eighteen times as long (nano's 32 pictures, two cores)
    return features_NTC.reshape(n, side, f, grid * c).mean(2).view(n, side, side, f, c).mean(3).view(n, n_tokens, c)
