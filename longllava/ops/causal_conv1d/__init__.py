"""Causal depthwise convolution along time, forward and backward, state in and out."""

from __future__ import annotations

import torch
from torch import Tensor

from longllava.errors import LongLLaVAError
from longllava.ops.causal_conv1d import cpu, cuda, reference, triton, upstream
from longllava.ops.dispatch import Backend, choose

# best first; the last is the judge
BACKENDS = tuple(
    Backend(
        name, module.run, module.why_not, getattr(module, "run_", None), first_for=getattr(module, "first_for", None)
    )
    for name, module in (
        ("cuda", cuda),
        ("triton", triton),
        ("upstream", upstream),
        ("cpu", cpu),
        ("reference", reference),
    )
)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    activation: str | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """y_t = act(bias + sum over k of weight_k x_(t - K + 1 + k)), each channel by itself.

    Shapes:  B batch, L tokens, E channels, K taps (1 to 8 in C++ and Triton). x (B, L, E); weight (E, K), the last
             tap on the token itself; bias (E); state (B, K-1, E), the last K-1 real inputs, oldest first; seq_idx
             (B, L).
             A view of x is read in place as long as its last stride is 1.
    dtypes:  x fp32, bf16 or fp16 (fp64 in plain torch); weight and bias any float; computed in fp32.
    activation: None or "silu".
    seq_idx: int32. -1 is padding: y is 0 and the token enters no window, what stands there (NaN too) reaches
             nothing. A change of value from one real token to the next starts from an empty window. `state`
             continues the sequence of the row's first real token.
    Returns: y (B, L, E) in x's dtype; the new state in x's dtype, always a new tensor.
    Gradients go to x, weight, bias and the initial state, and come from y and the returned state. The same call
    gives the same bits, whatever the number of threads.
    Raises:  LongLLaVAError if shapes disagree; BackendError if the backend asked for cannot run.
    """
    _check(x, weight, bias, state, seq_idx, activation)
    args = (x, weight, bias, state, seq_idx, activation)
    return choose("causal_conv1d", BACKENDS, *args, forced=backend).run(*args)


@torch.no_grad()
def causal_conv1d_(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    seq_idx: Tensor | None = None,
    activation: str | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """y of `causal_conv1d`; `state`, in x's dtype, becomes the new state in place. Without gradients.

    For decoding in a CUDA graph, where the state must stay at its address. Raises as `causal_conv1d` does.
    """
    _check(x, weight, bias, state, seq_idx, activation)
    args = (x, weight, bias, state, seq_idx, activation)
    chosen = choose("causal_conv1d", BACKENDS, *args, forced=backend)
    if chosen.run_ is not None:
        return chosen.run_(*args)
    y, new_state = chosen.run(*args)
    state.copy_(new_state)
    return y


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    seq_idx: Tensor | None,
    activation: str | None,
) -> None:
    if x.ndim != 3 or weight.ndim != 2 or weight.shape[1] < 1:
        raise LongLLaVAError(
            f"causal_conv1d: x must be (B, L, E) and weight (E, K), got {tuple(x.shape)}, {tuple(weight.shape)}"
        )
    batch, length, channels = x.shape
    n_past = weight.shape[1] - 1
    for name, tensor, letters, shape in (
        ("weight", weight, "(E, K)", (channels, n_past + 1)),
        ("bias", bias, "(E,)", (channels,)),
        ("state", state, "(B, K-1, E)", (batch, n_past, channels)),
        ("seq_idx", seq_idx, "(B, L)", (batch, length)),
    ):
        if tensor is not None and tensor.shape != shape:
            raise LongLLaVAError(f"causal_conv1d: {name} must be {letters} = {shape}, got {tuple(tensor.shape)}")
    if activation not in (None, "silu"):
        raise LongLLaVAError(f"causal_conv1d: activation must be None or 'silu', got {activation!r}")
    if seq_idx is not None and seq_idx.dtype not in (torch.int32, torch.int64):
        raise LongLLaVAError(f"causal_conv1d: seq_idx must be int32, got {seq_idx.dtype}")
