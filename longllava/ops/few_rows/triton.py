"""The linear layer of a handful of rows on an NVIDIA GPU by a Triton kernel: each weight is read once."""

from __future__ import annotations

import torch
from torch import Tensor

from longllava.ops import triton_support
from longllava.ops.triton_support import OPTIONS

MAX_ROWS = 4  # each row's sums are held in registers beside the others'
OUTPUTS, INPUTS = 8, 512  # of a program, and of a step


def why_not(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> str | None:
    n_rows = x.shape[:-1].numel()
    if not 1 <= n_rows <= MAX_ROWS:
        return f"takes 1 to {MAX_ROWS} rows, got {n_rows}"
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return "has no backward, and gradients are wanted"
    if torch.compiler.is_compiling():
        return "is not traced"
    if weight.dtype != x.dtype or weight.stride(1) != 1:
        return f"takes weights in rows, of x's dtype {x.dtype}, got {weight.dtype} with strides {weight.stride()}"
    return triton_support.why_not(x=x, weight=weight, bias=bias)


def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    from longllava.ops.few_rows.triton_kernels import multiply

    rows_MK = x.reshape(-1, x.shape[-1]).contiguous()
    n_rows, n_inputs = rows_MK.shape
    y_MN = x.new_empty((n_rows, len(weight)))
    if y_MN.numel() == 0 or n_inputs == 0:
        return torch.nn.functional.linear(x, weight, bias)
    inputs = INPUTS if n_rows == 1 else INPUTS // 2
    with torch.cuda.device_of(x):
        multiply[(-(-len(weight) // OUTPUTS),)](
            rows_MK, weight, bias, y_MN, len(weight), weight.stride(0), K=n_inputs, ROWS=n_rows, BLOCK_N=OUTPUTS,
            BLOCK_K=min(inputs, max(16, 1 << (n_inputs - 1).bit_length())), num_warps=4, **OPTIONS,
        )  # fmt: skip
    return y_MN.view(*x.shape[:-1], len(weight))
