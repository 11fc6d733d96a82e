"""The linear layer of a handful of rows on an NVIDIA GPU by a Triton kernel: each weight is read once."""

from __future__ import annotations

import torch
from torch import Tensor

from longllava.ops import triton_support
from longllava.ops.triton_support import OPTIONS

MAX_ROWS = 4  # each row's sums are held in registers beside the others'
WARPS = 4  # of a program
STEP_BYTES = 8192  # of weights that a program asks for at once: four times 16 a thread


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
    if len(weight) == 0 or x.shape[-1] == 0:
        return torch.nn.functional.linear(x, weight, bias)
    y_MN = product(x.reshape(-1, x.shape[-1]), weight, None, None if bias is None else bias.contiguous())
    return y_MN.view(*x.shape[:-1], len(weight))


def product(x_MK: Tensor, weight_NK: Tensor, scale_N: Tensor | None, bias_N: Tensor | None) -> Tensor:
    """At most MAX_ROWS rows (M, K) and weights of any dtype, int8 with a scale for each output: (M, N)."""
    from longllava.ops.few_rows.triton_kernels import multiply

    n_rows, n_inputs = x_MK.shape
    y_MN = x_MK.new_empty((n_rows, len(weight_NK)))
    outputs, inputs = shape(len(weight_NK), n_inputs, weight_NK.element_size(), n_rows)
    with torch.cuda.device_of(x_MK):
        multiply[(-(-len(weight_NK) // outputs),)](
            x_MK.contiguous(), weight_NK, scale_N, bias_N, y_MN, len(weight_NK), weight_NK.stride(0), K=n_inputs,
            ROWS=n_rows, BLOCK_N=outputs, BLOCK_K=inputs, num_warps=WARPS, **OPTIONS,
        )  # fmt: skip
    return y_MN


def shape(n_outputs: int, n_inputs: int, bytes_each: int, n_rows: int) -> tuple[int, int]:
    """(outputs, inputs of a step) of a program: one each where outputs are few, so that there are programs for all
    processors; otherwise as many as an H100 was fastest with, more where a step of two would reach past the inputs."""
    if n_outputs < 2048:
        outputs = 1
    else:
        outputs = 4 if n_inputs <= 1024 or (bytes_each == 1 and n_outputs < 8192) else 2
    inputs = STEP_BYTES // (outputs * bytes_each * (1 if n_rows == 1 else 2))
    return outputs, min(inputs, max(16, 1 << (n_inputs - 1).bit_length()))
