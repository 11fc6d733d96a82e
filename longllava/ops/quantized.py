"""Rows as int8 numbers and one scale each: what the int8 products take, and the rule that every kernel follows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MIXED = 16  # numbers of a row that are mixed with one another
TINY = 2.0**-100  # rows that stay below are zeros: nothing visible is lost, and 127 / absmax stays finite


class Quantized(NamedTuple):
    """values (..., K) int8 times scale (...) fp32 is what was quantised; dtype is what it was stored in."""

    values: Tensor
    scale: Tensor
    dtype: torch.dtype

    def dequantized(self) -> Tensor:
        return (self.values.float() * self.scale[..., None]).to(self.dtype)


def rotate(x: Tensor) -> Tensor:
    """Rows (..., K) times an orthogonal matrix that is its own inverse, in fp32 or wider; K a multiple of 16.

    Sixteen numbers that lie K / 16 apart are multiplied by the Hadamard matrix of order 16, over 4. One that is far
    larger than the others becomes sixteen of a quarter of it, and the row's scale a quarter: what is gained in int8 is
    up to two bits. Weights whose rows are rotated too give the same product. The sums are taken in this order
    everywhere, so that all backends make the same bits.
    Source: QuaRot, arXiv:2404.00456; for Mamba's out_proj Quamba, arXiv:2410.13229.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    parts = (wide * 0.25).unflatten(-1, (MIXED, x.shape[-1] // MIXED)).unbind(-2)
    for step in (1, 2, 4, 8):
        parts = tuple(
            parts[i - step] - parts[i] if i & step else parts[i] + parts[i + step] for i in range(MIXED)
        )  # fmt: skip
    return torch.cat(parts, -1)


def quantize(x: Tensor, absmax: Tensor | None = None, rotated: bool = False) -> tuple[Tensor, Tensor]:
    """int8 values (..., K) and fp32 scale (...) of rows: absmax / 127, to the nearest, ties to even.

    absmax: (...) fp32, the largest magnitude of each row, where the caller has it already.
    rotated: of the rows that `rotate` makes of them.
    A row of zeros has scale 1. A row that holds NaN or infinity has scale NaN, so that what is made of it is NaN.
    Values are within -127 .. 127.
    """
    x = (rotate(x) if rotated else x).float()
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
