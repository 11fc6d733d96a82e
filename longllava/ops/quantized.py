"""Rows as int8 numbers and one scale each: what the int8 products take, and the rule that every kernel follows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TINY = 2.0**-100  # rows that stay below are zeros: nothing visible is lost, and 127 / absmax stays finite


class Quantized(NamedTuple):
    """values (..., K) int8 times scale (...) fp32 is what was quantised; dtype is what it was stored in."""

    values: Tensor
    scale: Tensor
    dtype: torch.dtype

    def dequantized(self) -> Tensor:
        return (self.values.float() * self.scale[..., None]).to(self.dtype)


def quantize(x: Tensor, absmax: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """int8 values (..., K) and fp32 scale (...) of rows: absmax / 127, to the nearest, ties to even.

    absmax: (...) fp32, the largest magnitude of each row, where the caller has it already.
    A row of zeros has scale 1. A row that holds NaN or infinity has scale NaN, so that what is made of it is NaN.
    Values are within -127 .. 127.
    """
    x = x.float()
    if absmax is None:
        # amax of an empty row is an error; NaN wins over any number
        absmax = x.abs().amax(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])
    finite = absmax.isfinite()
    seen = finite & (absmax >= TINY)
    # 127 / absmax with a number on the left is 127 times a rounded reciprocal in torch: other bits than a division's
    inverse = torch.where(seen, torch.full_like(absmax, 127) / absmax, 0)
    scale = torch.where(seen, absmax / 127, 1).masked_fill(~finite, torch.nan)
    values = (x * inverse[..., None]).round().clamp(-127, 127).masked_fill(~seen[..., None], 0)
    return values.to(torch.int8), scale
