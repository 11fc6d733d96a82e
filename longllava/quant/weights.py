"""Float weights into int8, a few rows at a time: beside the result, never more than those is held in fp32."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longllava.errors import LongLLaVAError
from longllava.ops.int8_linear import quantize_weight

BLOCK_VALUES = 1 << 20  # 4 MB in fp32; quantising takes five times that


def fill_(weight: Tensor, scale: Tensor, start: int, rows_NK: Tensor, rotated: bool) -> None:
    """Quantise `rows_NK` into rows start, start + 1, ... of an int8 weight (..., N, K) and its scale (..., N).

    rotated: for inputs that are rotated. Raises: LongLLaVAError when a value is not finite.
    """
    flat_NK, scale_N = weight.view(-1, weight.shape[-1]), scale.view(-1)
    if rows_NK.shape[-1] != flat_NK.shape[-1] or start + len(rows_NK) > len(flat_NK):
        raise LongLLaVAError(f"int8: {tuple(rows_NK.shape)} does not fit at row {start} of {tuple(flat_NK.shape)}")
    block = max(1, BLOCK_VALUES // max(1, rows_NK.shape[-1]))
    for first in range(0, len(rows_NK), block):
        part_NK = rows_NK[first : first + block].to(weight.device)
        at = slice(start + first, start + first + len(part_NK))
        flat_NK[at], scale_N[at] = quantize_weight(part_NK, rotated=rotated)


def all_finite(weight: Tensor) -> bool:
    """By the smallest and the largest value, NaN where any is: isfinite takes 20 times as long, and memory."""
    return weight.numel() == 0 or all(math.isfinite(value.item()) for value in torch.aminmax(weight.detach()))
