"""Selective scan (Mamba-1): the recurrence of state-space layers, forward and backward, state in and out."""

from __future__ import annotations

import torch
from torch import Tensor

from longllava.errors import LongLLaVAError
from longllava.ops.dispatch import Backend, choose
from longllava.ops.int8_linear import quantize_rows
from longllava.ops.quantized import Quantized
from longllava.ops.selective_scan import blocked, cpu, cuda, reference, triton, upstream

# best first; the last is the judge. On an H100 at LongLLaVA-9B's width the CUDA kernel takes a third of Triton's time.
BACKENDS = tuple(
    Backend(name, module.run, module.why_not, getattr(module, "run_", None), getattr(module, "run_quantized", None))
    for name, module in (
        ("cuda", cuda),
        ("triton", triton),
        ("upstream", upstream),
        ("cpu", cpu),
        ("blocked", blocked),
        ("reference", reference),
    )
)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    *,
    quantized: bool = False,
    backend: str | None = None,
) -> tuple[Tensor | Quantized, Tensor]:
    """h_t = exp(d_t A) h_(t-1) + d_t u_t B_t;  y_t = (C_t . h_t + D u_t) silu(z_t);  d = softplus(delta + bias).

    Shapes:  B batch, L tokens, E channels, N states. u, delta, z (B, L, E); A (E, N); B, C (B, L, N); D,
             delta_bias (E); state (B, E, N); seq_idx (B, L). Without z there is no gate, without
             delta_softplus no softplus. Views are read in place as long as their last stride is 1.
    dtypes:  u, delta, z, B, C fp32, bf16 or fp16, each its own (fp64 runs in plain torch); the rest fp32.
             Computed in fp32.
    seq_idx: int32. -1 is padding: the state stays, y is 0, and what stands there (NaN too) reaches nothing. A
             change of value from one real token to the next empties the state. `state` continues the sequence
             of the row's first real token.
    Returns: y (B, L, E) in u's dtype; the state after each row's last real token, fp32, always a new tensor. With
             `quantized` y is what `quantize_rows(y)` gives.
    Gradients go to every float input, the initial state included, and come from y and the returned state; with
    `quantized` there are none.
    The same call gives the same bits, whatever the number of threads.
    Raises:  LongLLaVAError if shapes disagree; BackendError if the backend asked for cannot run.
    Source:  Gu & Dao 2023, arXiv:2312.00752, section 3.3 (Euler for B, as their code does). Names are those of
             mamba-ssm's selective_scan_fn, whose tensors are channel-major where these are token-major.
    """
    _check(u, delta, A, B, C, D, z, delta_bias, state, seq_idx)
    args = (u, delta, A, B, C, D, z, delta_bias, delta_softplus, state, seq_idx)
    chosen = choose("selective_scan", BACKENDS, *args, forced=backend)
    if not quantized:
        y, end = chosen.run(*args)
        return y, end
    with torch.no_grad():
        if chosen.run_quantized is not None and type(u) is Tensor and not torch.compiler.is_compiling():
            rows, end = chosen.run_quantized(*args)
        else:
            y, end = chosen.run(*args)
            rows = quantize_rows(y)
    return rows, end


@torch.no_grad()
def selective_scan_(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    state: Tensor,
    seq_idx: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """y of `selective_scan`; `state`, fp32, becomes the new state in place. Without gradients.

    For decoding in a CUDA graph, where the state must stay at its address. Raises as `selective_scan` does.
    """
    _check(u, delta, A, B, C, D, z, delta_bias, state, seq_idx)
    args = (u, delta, A, B, C, D, z, delta_bias, delta_softplus, state, seq_idx)
    chosen = choose("selective_scan", BACKENDS, *args, forced=backend)
    if chosen.run_ is not None:
        return chosen.run_(*args)
    y, new_state = chosen.run(*args)
    state.copy_(new_state)
    return y


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    state: Tensor | None,
    seq_idx: Tensor | None,
) -> None:
    if u.ndim != 3 or A.ndim != 2:
        raise LongLLaVAError(
            f"selective_scan: u must be (B, L, E) and A (E, N), got {tuple(u.shape)} and {tuple(A.shape)}"
        )
    batch, length, channels = u.shape
    n_states = A.shape[1]
    per_state = (batch, length, n_states)
    if (  # the whole check in one expression: decoding comes here once per layer and token
        delta.shape == u.shape
        and A.shape[0] == channels
        and B.shape == per_state
        and C.shape == per_state
        and (D is None or D.shape == (channels,))
        and (z is None or z.shape == u.shape)
        and (delta_bias is None or delta_bias.shape == (channels,))
        and (state is None or state.shape == (batch, channels, n_states))
        and (seq_idx is None or (seq_idx.shape == (batch, length) and seq_idx.dtype in (torch.int32, torch.int64)))
    ):
        return
    for name, x, letters, shape in (
        ("delta", delta, "(B, L, E)", (batch, length, channels)),
        ("A", A, "(E, N)", (channels, n_states)),
        ("B", B, "(B, L, N)", (batch, length, n_states)),
        ("C", C, "(B, L, N)", (batch, length, n_states)),
        ("D", D, "(E,)", (channels,)),
        ("z", z, "(B, L, E)", (batch, length, channels)),
        ("delta_bias", delta_bias, "(E,)", (channels,)),
        ("state", state, "(B, E, N)", (batch, channels, n_states)),
        ("seq_idx", seq_idx, "(B, L)", (batch, length)),
    ):
        if x is not None and x.shape != shape:
            raise LongLLaVAError(f"selective_scan: {name} must be {letters} = {shape}, got {tuple(x.shape)}")
    raise LongLLaVAError(f"selective_scan: seq_idx must be int32, got {seq_idx.dtype if seq_idx is not None else None}")
