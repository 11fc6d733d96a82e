"""The selective scan on an NVIDIA GPU by Triton kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from longllava.ops import triton_support
from longllava.ops.selective_scan import triton_launch
from longllava.ops.selective_scan.autograd import wrapped
from longllava.ops.selective_scan.triton_launch import compute, gradients

MAX_STATES = 256


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
    return triton_support.why_not(u=u, delta=delta, B=B, C=C, z=z)


def saved_shape(batch: int, length: int, channels: int, n_states: int) -> tuple[int, ...]:
    return batch, -(-length // triton_launch.CHUNK), channels, n_states


selective_scan, run, run_ = wrapped("selective_scan_triton", compute, gradients, saved_shape)
