"""What is timed: each op's backends and peers, its cases, and the least time that a machine could take.

A peer is another library's kernel on tensors in its own layout, made before the clock starts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch

from longllava.ops import attention, causal_conv1d, conv3x3, pixel_conv, selective_scan
from longllava.ops.attention import cases as attention_cases
from longllava.ops.causal_conv1d import cases as conv_cases
from longllava.ops.conv3x3 import cases as conv3x3_cases
from longllava.ops.dispatch import Backend
from longllava.ops.pixel_conv import cases as pixel_conv_cases
from longllava.ops.selective_scan import cases as scan_cases

FORWARD, BACKWARD, STEP = "forward", "backward", "step"  # step: state in place, as decoding in a CUDA graph
Call = Callable[[], Any]
PIECE = 2048  # tokens; mamba-ssm's kernel walks as many at a time


@dataclass(frozen=True)
class Op:
    """What the table needs to know of an op. The last backend is the judge.

    amount(case, direction) is the work of one call in `unit`, in units of 1e9; limit(case, direction, ceilings) the
    milliseconds that a GPU with these ceilings needs at least, and what for, or None.
    """

    name: str
    backends: Sequence[Backend]
    cpu_cases: Sequence[Any]
    gpu_cases: Sequence[Any]
    arguments: Callable[[Any, str], tuple[Any, ...]]
    amount: Callable[[Any, str], float]
    unit: str
    directions: Callable[[Any], Sequence[str]]
    limit: Callable[[Any, str, dict[str, float]], tuple[float, str] | None]
    judge: Callable[..., Any] | None  # of some channels of a call on a GPU; None: the last backend, of the whole
    peers: Callable[[Any, str, tuple[Any, ...]], dict[str, Callable[[], Call]]]


def no_peers(case: Any, direction: str, args: tuple[Any, ...]) -> dict[str, Callable[[], Call]]:
    return {}


def directions_of(case: Any) -> Sequence[str]:
    """A case of one token on a GPU decodes; long ones are not trained on in one piece."""
    if case.length == 1 and case in (*scan_cases.GPU_BENCHMARKS, *conv_cases.GPU_BENCHMARKS):
        return (STEP,)
    return (FORWARD, BACKWARD) if case.length <= 40_000 else (FORWARD,)


def state_elements(case: scan_cases.Case, direction: str) -> float:
    return case.batch * case.length * case.channels * case.n_states / 1e9


def scan_limit(case: scan_cases.Case, direction: str, ceilings: dict[str, float]) -> tuple[float, str] | None:
    """Forward: an exponential a state, two for softplus and two for the gate, or bytes. Step: bytes."""
    per_token = case.batch * case.length * case.channels
    if direction == FORWARD:
        special = per_token * (case.n_states + 4) / ceilings["exponentials"]
        moved = per_token * 4 * case.dtype.itemsize / ceilings["copy"]
        return (special * 1e3, "exponentials") if special > moved else (moved * 1e3, "bytes")
    if direction == STEP:
        state = 2 * 4 * case.batch * case.channels * case.n_states
        other = per_token * 4 * case.dtype.itemsize + 4 * case.channels * (case.n_states + 2)
        return (state + other) / ceilings["copy"] * 1e3, "bytes"
    return None


def scan_peers(case: scan_cases.Case, direction: str, args: tuple[Any, ...]) -> dict[str, Callable[[], Call]]:
    from longllava.ops.selective_scan import upstream

    u, delta, A, B, C, D, z, bias, softplus, state, seq_idx = args
    if u.device.type == "cpu":
        return transformers_loop(args) if direction == FORWARD and case.name == "prefill" else {}
    pieces = scan_in_pieces(args) if direction == FORWARD and case.name == "36,864" else {}
    pieces |= scan_to_int8(args) if direction == FORWARD and case.name == "36,000" else {}
    if direction == STEP or upstream.why_not(u, delta, A, B, C, D, z, bias, softplus, None, seq_idx) is not None:
        return pieces
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def call(*tensors: torch.Tensor) -> Any:
        u_BEL, delta_BEL, A_EN, B_BNL, C_BNL, D_E, z_BEL, bias_E = tensors
        return selective_scan_fn(u_BEL, delta_BEL, A_EN, B_BNL, C_BNL, D_E, z_BEL, bias_E, True, True)[0]

    def prepare() -> Call:
        tensors = [x.transpose(1, 2).contiguous() if x.ndim == 3 else x for x in (u, delta, A, B, C, D, z, bias)]
        return timed_direction(call, tensors, direction)

    return {"mamba-ssm": prepare, **pieces}


def transformers_loop(args: tuple[Any, ...]) -> dict[str, Callable[[], Call]]:
    """The loop over tokens that transformers' Jamba runs in plain torch, on tensors in its layout.

    Not its backward: each token's slice gets a gradient as large as the whole, some 270 GB of zeros at 2,048 tokens.
    """
    try:
        from transformers.models.jamba.modeling_jamba import mamba_selective_scan
    except ImportError:  # older ones have it inside a layer
        return {}
    from transformers.utils import logging

    logging.set_verbosity_error()
    u, delta, A, B, C, D, z, bias, softplus, _, _ = args
    u_BEL, delta_BEL, B_BNL, C_BNL, z_BEL = (x.transpose(1, 2).contiguous() for x in (u, delta, B, C, z))

    def call() -> Any:
        with torch.no_grad():
            return mamba_selective_scan(u_BEL, delta_BEL, A, B_BNL, C_BNL, D, z_BEL, bias, softplus)

    def prepare() -> Call:
        truth = selective_scan.selective_scan(*args, backend="reference")[0].transpose(1, 2)
        if not torch.allclose(call(), truth, rtol=1e-4, atol=1e-4):
            raise RuntimeError("differs from the reference")
        return call

    return {"transformers, its loop": prepare}


def scan_in_pieces(args: tuple[Any, ...]) -> dict[str, Callable[[], Call]]:
    """Our GPU kernels on pieces of 2,048 tokens, the state carried: what chunked prefill costs."""
    u, delta, A, B, C, D, z, bias, softplus, _, seq_idx = args

    def prepare(backend: Backend) -> Call:
        def call() -> Any:
            state = None
            with torch.no_grad():
                for cut in (slice(at, at + PIECE) for at in range(0, u.shape[1], PIECE)):
                    own = (u[:, cut], delta[:, cut], A, B[:, cut], C[:, cut], D, z[:, cut], bias, softplus, state)
                    _, state = backend.run(*own, seq_idx)

        return call

    ours = [b for b in selective_scan.BACKENDS if b.name in ("cuda", "triton") and b.why_not(*args) is None]
    return {f"{backend.name}, in pieces": functools.partial(prepare, backend) for backend in ours}


def scan_to_int8(args: tuple[Any, ...]) -> dict[str, Callable[[], Call]]:
    """The CUDA scan with y as int8 rows: quantised from y alone, with the scan's maxima, by the scan itself."""
    from longllava.ops.int8_linear import quantize_rows
    from longllava.ops.selective_scan import cuda_launch

    backend = next(b for b in selective_scan.BACKENDS if b.name == "cuda")
    if backend.why_not(*args) is not None or backend.run_quantized is None:
        return {}

    def prepare(way: str) -> Call:
        def call() -> Any:
            with torch.no_grad():
                if way == "y":
                    return quantize_rows(backend.run(*args)[0])
                with patch.object(cuda_launch, "EPILOGUE", way):
                    return backend.run_quantized(*args)  # type: ignore[misc]

        return call

    u, delta, _, B, C, _, z, *_ = args
    ways = ["y", "maxima", *(["int8"] if cuda_launch.writes_int8(u, delta, B, C, z, args[-1]) else [])]
    return {f"cuda, int8 by {way}": functools.partial(prepare, way) for way in ways}


def timed_direction(call: Callable[..., Any], tensors: list[torch.Tensor], direction: str) -> Call:
    """The call itself, or its backward alone."""
    if direction == FORWARD:

        def forward() -> Any:
            with torch.no_grad():
                return call(*tensors)

        return forward
    leaves = [x.detach().requires_grad_() for x in tensors]
    y = call(*leaves)
    grad = torch.randn_like(y)
    return lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True)


def conv_bytes(case: conv_cases.Case, direction: str) -> float:
    """Forward reads x and writes y; backward reads x and grad_y and writes grad_x."""
    n_tensors = 3 if direction == BACKWARD else 2
    return n_tensors * case.batch * case.length * case.channels * case.dtype.itemsize / 1e9


def conv_limit(case: conv_cases.Case, direction: str, ceilings: dict[str, float]) -> tuple[float, str] | None:
    return conv_bytes(case, direction) * 1e9 / ceilings["copy"] * 1e3, "bytes"


def conv_peers(case: conv_cases.Case, direction: str, args: tuple[Any, ...]) -> dict[str, Callable[[], Call]]:
    from longllava.ops.causal_conv1d import upstream

    x, weight, bias, _, seq_idx, activation = args
    if direction == STEP or upstream.why_not(x, weight, bias, None, seq_idx, activation) is not None:
        return {}
    from causal_conv1d import causal_conv1d_fn

    def prepare() -> Call:
        tensors = [x.transpose(1, 2), weight.to(x.dtype), bias.to(x.dtype)]
        return timed_direction(lambda *t: causal_conv1d_fn(*t, activation=activation), tensors, direction)

    return {"causal-conv1d": prepare}


def attention_arguments(case: attention_cases.Case, device: str) -> tuple[Any, ...]:
    return (*case.inputs(device=device), case.head_dim**-0.5, case.causal, *case.seq_idx(device), False)


def attention_operations(case: attention_cases.Case, direction: str) -> float:
    """Additions and multiplications for visible pairs; backward computes the scores again."""
    return 2 * case.multiplications() * (2.5 if direction == BACKWARD else 1) / 1e9


def attention_limit(case: attention_cases.Case, direction: str, ceilings: dict[str, float]) -> tuple[float, str] | None:
    products = attention_operations(case, direction) * 1e9 / ceilings["bf16"]
    moved = 2 * case.batch * case.n_keys * case.n_groups * case.head_dim * case.dtype.itemsize / ceilings["copy"]
    return (products * 1e3, "products") if products > moved else (moved * 1e3, "bytes")


def attention_peers(case: attention_cases.Case, direction: str, args: tuple[Any, ...]) -> dict[str, Callable[[], Call]]:
    """torch's own kernels, by name, on a mask that is aligned to the last key; k and v repeated for each query head
    where a kernel asks for it is part of its time."""
    q, k, v = args[:3]
    if q.device.type != "cuda" or args[5] is not None or direction == BACKWARD:
        return {}
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.bias import causal_lower_right

    def peer(kernel: SDPBackend) -> Callable[[], Call]:
        def prepare() -> Call:
            heads = [x.transpose(1, 2) for x in (q, k, v)]
            mask = causal_lower_right(q.shape[1], k.shape[1]) if q.shape[1] > 1 else None

            def call() -> Any:
                with torch.no_grad(), sdpa_kernel([kernel]):
                    return torch.nn.functional.scaled_dot_product_attention(
                        *heads, attn_mask=mask, scale=case.head_dim**-0.5, enable_gqa=True
                    )

            return call

        return prepare

    return {"torch flash": peer(SDPBackend.FLASH_ATTENTION), "torch cudnn": peer(SDPBackend.CUDNN_ATTENTION)}


def inputs(case: Any, device: str) -> tuple[Any, ...]:
    return case.inputs(device=device)


OPS = (
    Op(
        "selective_scan", selective_scan.BACKENDS, scan_cases.BENCHMARKS, scan_cases.GPU_BENCHMARKS,
        inputs, state_elements, "G state-elements/s", directions_of, scan_limit,
        selective_scan.blocked.run, scan_peers,
    ),
    Op(
        "causal_conv1d", causal_conv1d.BACKENDS, conv_cases.BENCHMARKS, conv_cases.GPU_BENCHMARKS,
        inputs, conv_bytes, "GB/s", directions_of, conv_limit,
        causal_conv1d.reference.run, conv_peers,
    ),
    Op(
        # the reference's score matrix would take 1.2 GB; torch's own kernel judges
        "attention", attention.BACKENDS[:-1], attention_cases.BENCHMARKS, attention_cases.GPU_BENCHMARKS,
        attention_arguments, attention_operations, "GFLOP/s",
        lambda case: [(FORWARD, BACKWARD)[backward] for backward in case.directions], attention_limit,
        None, attention_peers,
    ),
    Op(
        "conv3x3", conv3x3.BACKENDS, conv3x3_cases.BENCHMARKS, (),
        inputs, lambda case, direction: 2 * case.products() / 1e9, "GFLOP/s", lambda case: (FORWARD,),
        lambda *args: None, None, no_peers,
    ),
    Op(
        "pixel_conv", pixel_conv.BACKENDS, pixel_conv_cases.BENCHMARKS, (),
        inputs, lambda case, direction: 2 * case.products() / 1e9, "GFLOP/s", lambda case: (FORWARD,),
        lambda *args: None, None, no_peers,
    ),
)  # fmt: skip
