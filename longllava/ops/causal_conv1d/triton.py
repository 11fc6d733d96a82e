"""The causal convolution on an NVIDIA GPU by Triton kernels. It moves each element once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longllava.ops import triton_support
from longllava.ops.causal_conv1d.autograd import wrapped
from longllava.ops.sequences import reset_mask
from longllava.ops.triton_support import DTYPES, OPTIONS, plain, rowed

MAX_TAPS = 8
TOKENS, CHANNELS = 32, 128  # of a block: 8 KB of bf16
# Tokens, which a program each 32 of them gets done sooner than CUDA's threads walk over theirs: on an H100 67 of 8,192
# channels took 3.1 us, by CUDA 6.3; 2,048 took 66 and 73, but their gradients 325 and 252. Between them none was
# measured (benchmarks/results/kernel-variants-h100.json, kernels-h100.json).
FEW = 256
TILES = 8  # of TOKENS, over which a backward program sums the gradients of its weights


def why_not(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, state: Tensor | None = None, *rest: Any
) -> str | None:
    if weight.shape[1] > MAX_TAPS:
        return f"takes at most {MAX_TAPS} taps, got {weight.shape[1]}"
    return triton_support.why_not(x=x, state=state)


def first_for(x: Tensor, *rest: Any) -> bool:
    return x.device.type != "cpu" and x.shape[0] * x.shape[1] <= FEW  # on a CPU torch.export would keep the bound


def windows(seq_idx_BL: Tensor, n_past: int) -> tuple[Tensor, Tensor]:
    """What reference.windows gives, int32, without a loop over tokens: sources (B, L, K), last (B, K-1).

    Real tokens have ranks; a window is the ranks up to a token's own, from the rank its sequence began with.
    """
    batch, length = seq_idx_BL.shape
    real_BL = seq_idx_BL >= 0
    rank_BL = real_BL.cumsum(1) - 1
    place_BL = torch.arange(length, device=seq_idx_BL.device).expand(batch, length)
    # place of each rank; those of padding all go into one column more, which is dropped
    of_rank_BL = torch.zeros(batch, length + 1, dtype=torch.int64, device=seq_idx_BL.device)
    of_rank_BL = of_rank_BL.scatter_(1, rank_BL.masked_fill(~real_BL, length), place_BL)[:, :length]
    first_BL = rank_BL.masked_fill(~reset_mask(seq_idx_BL), -1).cummax(1).values  # -1: continues the state

    def places(rank_BM: Tensor, first_BM: Tensor) -> Tensor:
        token_BM = of_rank_BL.gather(1, rank_BM.clamp(min=0)) + n_past
        state_BM = (rank_BM + n_past).masked_fill(first_BM >= 0, -1)
        return torch.where(rank_BM >= first_BM.clamp(min=0), token_BM, state_BM.masked_fill(rank_BM >= 0, -1)).int()

    back = range(n_past, -1, -1)
    sources_BLK = torch.stack([places(rank_BL - n, first_BL) for n in back], 2).masked_fill(~real_BL[..., None], -1)
    last_BK = rank_BL[:, -1:] - torch.arange(n_past - 1, -1, -1, device=seq_idx_BL.device)
    return sources_BLK, places(last_BK, first_BL[:, -1:].expand(batch, n_past))


def users_of(sources_BLK: Tensor) -> Tensor:
    """The other way round: the token that reads a position of the line by each tap, (B, K-1+L, K) int32, or -1."""
    batch, length, n_taps = sources_BLK.shape
    n_line = length + n_taps - 1
    users = torch.full((batch, n_line + 1, n_taps), -1, dtype=torch.int32, device=sources_BLK.device)
    token_BLK = torch.arange(length, dtype=torch.int32, device=users.device)[None, :, None].expand(sources_BLK.shape)
    index_BLK = sources_BLK.long().masked_fill(sources_BLK < 0, n_line)  # a last row, dropped, takes what is nowhere
    return users.scatter_(1, index_BLK, token_BLK)[:, :n_line].contiguous()


def _common(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None) -> dict[str, Any]:
    channels, n_taps = weight.shape
    x, state = rowed(x), None if state is None else rowed(state)
    block = min(CHANNELS, 1 << (channels - 1).bit_length())
    arguments: dict[str, Any] = {"CHANNELS": channels, "TAPS": n_taps, "BLOCK": block, **OPTIONS}
    arguments |= {"x": x, "x_batch": x.stride(0), "X_STEP": x.stride(1), "length": x.shape[1], "state": state}
    arguments["state_batch"], arguments["STATE_STEP"] = (0, 0) if state is None else state.stride()[:2]
    return arguments | {"weight": held(weight), "bias": held(bias)}


def held(x: Tensor | None) -> Tensor | None:
    """Taps or bias as the kernels read them, in their own dtype: a cast in each layer would be a launch each token."""
    return x.contiguous() if x is not None and x.dtype in DTYPES else plain(x)


def _grid(batch: int, length: int, tokens: int, common: dict[str, Any]) -> tuple[int]:
    return (batch * -(-length // tokens) * -(-common["CHANNELS"] // common["BLOCK"]),)


def compute(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
    end: Tensor,
) -> Tensor:
    from longllava.ops.causal_conv1d.triton_kernels import forward

    batch, length, channels = x.shape
    n_past = weight.shape[1] - 1
    y = x.new_empty((batch, length, channels))
    if y.numel() == 0:
        end.zero_() if state is None else end.copy_(state)
        return y
    sources, last = (None, None) if seq_idx is None else windows(seq_idx, n_past)
    common = _common(x, weight, bias, state)
    tokens = min(TOKENS, 1 << (length - 1).bit_length())
    with torch.cuda.device_of(x):
        forward[_grid(batch, length, tokens, common)](
            **common, sources=sources, last=last, y=y, state_out=end, SILU=silu, T=tokens
        )
    return y


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
    from longllava.ops.causal_conv1d.triton_kernels import backward_line, backward_sums

    batch, length, channels = x.shape
    n_past = weight.shape[1] - 1
    grad_x = x.new_empty((batch, length, channels))
    grad_start = x.new_empty((batch, n_past, channels))
    no_bias = x.new_empty(0, dtype=torch.float32)
    if grad_x.numel() == 0:
        grad_start = grad_start.zero_() if grad_state is None else grad_start.copy_(grad_state)
        return grad_x, torch.zeros_like(weight), no_bias if bias is None else torch.zeros_like(bias), grad_start
    sources, last = (None, None) if seq_idx is None else windows(seq_idx, n_past)
    common = _common(x, weight, bias, state)
    shape = {name: common[name] for name in ("CHANNELS", "TAPS", "BLOCK", "weight", "length", *OPTIONS)}
    grad_y, grad_state = rowed(grad_y), None if grad_state is None else rowed(grad_state)
    tokens = min(TOKENS, 1 << (length - 1).bit_length())
    n_parts = batch * -(-length // (tokens * TILES))
    grad_weight = x.new_empty((n_parts, channels, n_past + 1), dtype=torch.float32)
    grad_bias = x.new_empty((n_parts, channels), dtype=torch.float32)
    grad_sums = x.new_empty(x.shape, dtype=torch.float32)
    with torch.cuda.device_of(x):
        backward_sums[_grid(batch, length, tokens * TILES, common)](
            **common, sources=sources, grad_y=grad_y, grad_sums=grad_sums, grad_weight=grad_weight,
            grad_bias=grad_bias, grad_y_batch=grad_y.stride(0), GRAD_Y_STEP=grad_y.stride(1), SILU=silu, T=tokens,
            TILES=TILES,
        )  # fmt: skip
        backward_line[_grid(batch, length + n_past, tokens, common)](
            **shape, grad_sums=grad_sums, users=None if sources is None else users_of(sources), last=last,
            grad_state=grad_state, grad_x=grad_x, grad_start=grad_start, T=tokens,
            grad_state_batch=0 if grad_state is None else grad_state.stride(0),
            GRAD_STATE_STEP=0 if grad_state is None else grad_state.stride(1),
        )  # fmt: skip
    weight_total = grad_weight.sum(0).to(weight.dtype)
    return grad_x, weight_total, no_bias if bias is None else grad_bias.sum(0).to(bias.dtype), grad_start


causal_conv1d, run, run_ = wrapped("causal_conv1d_triton", compute, gradients, in_place=TOKENS)
