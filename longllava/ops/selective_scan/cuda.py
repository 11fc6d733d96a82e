"""The selective scan on an NVIDIA GPU by the compiled CUDA kernels (csrc/selective_scan*.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from longllava.ops import native_cuda
from longllava.ops.int8_linear import quantize_rows
from longllava.ops.quantized import Quantized
from longllava.ops.selective_scan import cuda_launch
from longllava.ops.selective_scan.autograd import wrapped
from longllava.ops.selective_scan.cuda_launch import CHUNK, MAX_STATES, compute, gradients


def why_not(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> str | None:
    if not 1 <= A.shape[1] <= MAX_STATES:
        return f"takes 1 to {MAX_STATES} states per channel, got {A.shape[1]}"
    others = {"A": A, "D": D, "delta_bias": delta_bias, "state": state, "seq_idx": seq_idx}
    if reason := native_cuda.why_not(others, u=u, delta=delta, B=B, C=C, z=z):
        return reason
    floats = (u, delta, A, B, C, D, z, delta_bias, state)
    gradients = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in floats)
    return cuda_launch.lacks_room(u.device, native_cuda.common_dtype(u, delta, B, C, z), gradients)


def saved_shape(batch: int, length: int, channels: int, n_states: int) -> tuple[int, ...]:
    return batch, -(-length // CHUNK), channels, n_states


selective_scan, run, run_ = wrapped("selective_scan_cuda", compute, gradients, saved_shape)


def run_quantized(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    state: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Quantized, Tensor]:
    """`run` with y in int8: the kernels find each token's largest |y|. What quantises is said by EPILOGUE.

    Raises: BackendError for a word of LONGLLAVA_SCAN_EPILOGUE that is none."""
    dtype, wanted = native_cuda.common_dtype(u, delta, B, C, z), u.dtype
    u, delta, B, C, z = (native_cuda.rowed(x, dtype) for x in (u, delta, B, C, z))  # type: ignore[assignment]
    args = (u, delta, A, B, C, D, z, delta_bias, delta_softplus, state, seq_idx)
    end = u.new_empty((u.shape[0], *A.shape), dtype=torch.float32)
    maxima = u.new_zeros(u.shape[:2], dtype=torch.float32)
    direct = cuda_launch.epilogue() == "int8" and dtype is wanted
    if direct and cuda_launch.writes_int8(u, delta, B, C, z, seq_idx):
        values, scale = u.new_empty(u.shape, dtype=torch.int8), torch.empty_like(maxima)
        compute(*args, end, None, maxima, (values, scale))
        return Quantized(values, scale, wanted), end
    y = compute(*args, end, None, maxima)
    # y is rounded after its maxima were taken where the inputs' dtypes differ
    return quantize_rows(y.to(wanted), maxima if dtype is wanted else None), end
