"""The causal convolution on an NVIDIA GPU by compiled CUDA kernels (csrc/causal_conv1d*.cu)."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from longllava.ops import native_cuda
from longllava.ops.causal_conv1d.autograd import wrapped
from longllava.ops.causal_conv1d.triton import users_of, windows
from longllava.ops.native_cuda import address, rowed, rows

MAX_TAPS = 8
RUN, BACKWARD_RUN = 32, 64  # CONV_RUN and CONV_BACKWARD_RUN of csrc/causal_conv1d_cuda.cuh
FIELDS = struct.Struct("@42q")  # ConvArguments there
NO_ROWS = (0, 0, 0)


def why_not(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    activation: str | None = None,
) -> str | None:
    if weight.shape[1] > MAX_TAPS:
        return f"takes at most {MAX_TAPS} taps, got {weight.shape[1]}"
    return native_cuda.why_not({"weight": weight, "bias": bias, "seq_idx": seq_idx}, x=x, state=state)


def _call(
    entry: str, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, silu: bool,
    y: Tensor | None = None, state_out: Tensor | None = None, sources: Tensor | None = None, last: Tensor | None = None,
    grad_y: Tensor | None = None, grad_state: Tensor | None = None, grad_x: Tensor | None = None,
    grad_start: Tensor | None = None, grad_weight: Tensor | None = None, grad_bias: Tensor | None = None,
    users: Tensor | None = None, grad_sums: Tensor | None = None,
) -> None:  # fmt: skip
    batch, length, channels = x.shape
    x, state, grad_y, grad_state = (rowed(t, x.dtype) for t in (x, state, grad_y, grad_state))  # type: ignore[assignment]
    weight, bias = parameters(weight, bias)
    tensors = (x, state, y, state_out, grad_y, grad_state, grad_x, grad_start)
    first = [rows(t) for t in tensors]
    arguments = FIELDS.pack(
        FIELDS.size, native_cuda.DTYPES[x.dtype], batch, length, channels, weight.shape[1], silu,
        native_cuda.is_wide(4 * x.element_size(), *tensors), native_cuda.DTYPES[weight.dtype], native_cuda.stream(x),
        *(field for row in first[:4] for field in row),
        address(weight), address(bias), address(sources), address(last),
        *(field for row in first[4:] for field in row), address(grad_weight), address(grad_bias),
        address(users), address(grad_sums),
    )  # fmt: skip
    with torch.cuda.device_of(x):
        native_cuda.succeed(native_cuda.function(entry)(arguments), "causal_conv1d")


def parameters(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """As the kernels read them: as they are, where both are of one dtype; a cast would be a launch in each layer."""
    if weight.dtype not in native_cuda.DTYPES or (bias is not None and bias.dtype != weight.dtype):
        weight, bias = weight.float(), None if bias is None else bias.float()
    found = [None if x is None else x.contiguous() for x in (weight, bias)]
    weight, bias = (x if x is None or x.data_ptr() % 16 == 0 else x.clone() for x in found)  # type: ignore[assignment]
    return weight, bias


def compute(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
    end: Tensor,
) -> Tensor:
    y = x.new_empty(x.shape)
    if y.numel() == 0:
        end.zero_() if state is None else end.copy_(state)
        return y
    _call("longllava_cuda_conv_forward", x, weight, bias, state, silu, y=y, state_out=end, **_tables(seq_idx, weight))
    return y


def _tables(seq_idx: Tensor | None, weight: Tensor) -> dict[str, Tensor]:
    if seq_idx is None:
        return {}
    sources, last = windows(seq_idx, weight.shape[1] - 1)
    return {"sources": sources.contiguous(), "last": last.contiguous()}


def gradients(
    grad_y: Tensor,
    grad_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, length, channels = x.shape
    n_taps = weight.shape[1]
    grad_x, grad_start = x.new_empty(x.shape), x.new_empty((batch, n_taps - 1, channels))
    no_bias = x.new_empty(0, dtype=torch.float32)
    if grad_x.numel() == 0:
        grad_start = grad_start.zero_() if grad_state is None else grad_start.copy_(grad_state)
        return grad_x, torch.zeros_like(weight), no_bias if bias is None else torch.zeros_like(bias), grad_start
    n_runs = batch * -(-length // BACKWARD_RUN)
    grad_weight = x.new_empty((n_runs, channels, n_taps), dtype=torch.float32)
    grad_bias = x.new_empty((n_runs, channels), dtype=torch.float32)
    tables = _tables(seq_idx, weight)
    if tables:
        tables |= {"users": users_of(tables["sources"]), "grad_sums": x.new_empty(x.shape, dtype=torch.float32)}
    _call(
        "longllava_cuda_conv_backward", x, weight, bias, state, silu, grad_y=grad_y, grad_state=grad_state,
        grad_x=grad_x, grad_start=grad_start, grad_weight=grad_weight, grad_bias=grad_bias, **tables,
    )  # fmt: skip
    weight_total = grad_weight.sum(0).to(weight.dtype)
    return grad_x, weight_total, no_bias if bias is None else grad_bias.sum(0).to(bias.dtype), grad_start


causal_conv1d, run, run_ = wrapped("causal_conv1d_cuda", compute, gradients, in_place=RUN)
