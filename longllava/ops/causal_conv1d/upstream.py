"""The convolution of its authors: causal-conv1d's causal_conv1d_fn (Dao-AILab/causal-conv1d).

x is handed over as a view, in the layout they call channel-last. The returned state is cut from the inputs here. Their
seq_idx has no padding that windows pass over, so calls with ours are refused; so are those whose 32-bit offsets wrap:
up to 1.7.0 they do so without a word (Dao-AILab/causal-conv1d pull request 114).
"""

from __future__ import annotations

import torch
from torch import Tensor

from longllava.ops import upstream_support

MAX_TOKENS = 65_535 * 64  # a grid's second axis, tiles of 64 tokens
MULTIPLE = 8  # of elements: their channel-last kernels read 16 bytes at a time


def why_not(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    activation: str | None = None,
) -> str | None:
    if seq_idx is not None:
        return "causal-conv1d knows no padding that a window passes over, got seq_idx"
    if x.numel() == 0:
        return f"causal-conv1d needs at least one token and one row, got {tuple(x.shape)}"
    if not 2 <= weight.shape[1] <= 4:
        return f"causal-conv1d takes 2 to 4 taps, got {weight.shape[1]}"
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"causal-conv1d takes float32, float16 or bfloat16, got {x.dtype}"
    if x.stride(2) != 1 or any(n % MULTIPLE for n in (x.shape[2], x.stride(0), x.stride(1))):
        return f"causal-conv1d takes channels and strides that {MULTIPLE} divides, got {tuple(x.shape)}, {x.stride()}"
    if x.shape[1] > MAX_TOKENS:
        return f"causal-conv1d takes at most {MAX_TOKENS} tokens, got {x.shape[1]}"
    if upstream_support.reach(x) > upstream_support.BEYOND_UINT32:
        return (
            f"causal-conv1d counts offsets in 32 bits: {x.shape[1]} tokens {x.stride(1)} elements apart would be wrong"
        )
    return upstream_support.why_not("causal-conv1d", first_call, x=x, weight=weight)


def first_call(device: torch.device) -> object:
    return run(torch.ones(1, 1, 8, device=device), torch.ones(8, 4, device=device))


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    from causal_conv1d import causal_conv1d_fn

    n_past = weight.shape[1] - 1
    before_BKE = x.new_zeros(x.shape[0], n_past, x.shape[2]) if state is None else state.to(x.dtype)
    initial = None if state is None else before_BKE.contiguous().transpose(1, 2)
    y_BEL = causal_conv1d_fn(
        x.transpose(1, 2),
        weight.contiguous(),
        None if bias is None else bias.to(weight.dtype),
        initial_states=initial,
        activation=activation,
    )
    tail = torch.cat([before_BKE, x[:, max(0, x.shape[1] - n_past) :]], 1)[:, -n_past:]
    return y_BEL.transpose(1, 2).contiguous(), tail.clone()
