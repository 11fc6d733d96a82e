"""The selective scan on an NVIDIA GPU by the compiled CUDA kernels (csrc/selective_scan*.cu)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from longllava.ops import native_cuda
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
    *rest: Any,
) -> str | None:
    if not 1 <= A.shape[1] <= MAX_STATES:
        return f"takes 1 to {MAX_STATES} states per channel, got {A.shape[1]}"
    return native_cuda.why_not(u=u, delta=delta, B=B, C=C, z=z)


def saved_shape(batch: int, length: int, channels: int, n_states: int) -> tuple[int, ...]:
    return batch, -(-length // CHUNK), channels, n_states


selective_scan, run, run_ = wrapped("selective_scan_cuda", compute, gradients, saved_shape)
