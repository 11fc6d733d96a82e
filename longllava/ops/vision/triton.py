"""The encoder's passes on an NVIDIA GPU by Triton kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longllava.ops import triton_support
from longllava.ops.triton_support import OPTIONS

MAX_WIDTH = 8192  # of a row that one program holds in registers
BLOCK = 4096  # elements of a program of quick_gelu_


def why_not(x: Tensor, *rest: Any) -> str | None:
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in (x, *rest)):
        return "has no backward, and gradients are wanted"
    if rest and x.shape[-1] > MAX_WIDTH:
        return f"takes rows of at most {MAX_WIDTH}, got {x.shape[-1]}"
    if torch.compiler.is_compiling():
        return "is not traced"
    return triton_support.why_not(x=x)


def add_layer_norm(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from longllava.ops.vision.triton_kernels import add_layer_norm as kernel

    x, delta = x.contiguous(), delta.contiguous()
    y, total = torch.empty_like(x), torch.empty_like(x)
    width = x.shape[-1]
    if y.numel() == 0:
        return y, total
    padded = max(16, 1 << (width - 1).bit_length())
    with torch.cuda.device_of(x):
        kernel[(x.numel() // width,)](
            x, delta, weight.contiguous(), bias.contiguous(), y, total, eps, WIDTH=width, PADDED=padded,
            num_warps=min(16, max(1, padded // 256)), **OPTIONS,
        )  # fmt: skip
    return y, total


def quick_gelu_(x: Tensor) -> Tensor:
    from longllava.ops.vision.triton_kernels import quick_gelu as kernel

    flat = x if x.is_contiguous() else x.contiguous()
    if flat.numel():
        with torch.cuda.device_of(x):
            kernel[(-(-flat.numel() // BLOCK),)](flat, flat.numel(), BLOCK=BLOCK, num_warps=8, **OPTIONS)
    return x if flat is x else x.copy_(flat)
