"""Attention on the CPU by the compiled kernels (csrc/attention*), as torch custom ops.

`longllava::attention` and `longllava::attention_backward` work under autograd and torch.compile. When no gradient
is wanted and nothing is being traced, `run` calls the kernel directly, which saves the custom op's overhead:
decoding calls this once per attention layer and token.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longllava.ops import native
from longllava.ops.native import address, ids, plain

FIELDS = struct.Struct("@10qd36q")  # csrc/attention_plan.h, AttentionArguments
NO_ROWS = (0, 0, 0, 0)
NO_GRADIENTS = (*NO_ROWS * 4, 0)
MAX_HEADS_PER_GROUP = 64  # a tile of the backward kernel holds the heads of at least one query
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> str | None:
    if q.device.type != "cpu" or k.device.type != "cpu":
        return f"needs CPU tensors, got {q.device.type} and {k.device.type}"
    if q.dtype not in DTYPES:
        return f"takes float32, bfloat16 or float16, got {str(q.dtype).removeprefix('torch.')}"
    if q.shape[2] > MAX_HEADS_PER_GROUP * k.shape[2]:
        return f"takes at most {MAX_HEADS_PER_GROUP} query heads per key head, got {q.shape[2] // k.shape[2]}"
    return native.why_not()


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool = True,
    seq_idx_q: Tensor | None = None,
    seq_idx_k: Tensor | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    save = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    call: Callable[..., Any] = attention
    if not save and type(q) is Tensor and not torch.compiler.is_compiling():
        call = _forward
    return call(q, k, v, scale, causal, seq_idx_q, seq_idx_k, return_lse or save)


def _readable(x_BLHK: Tensor) -> Tensor:
    """`x` itself if the kernels can read it in place, else a copy they can."""
    if x_BLHK.dtype is torch.float16:
        x_BLHK = x_BLHK.float()
    return x_BLHK if x_BLHK.stride(3) == 1 or x_BLHK.shape[3] == 1 else x_BLHK.contiguous()


def _rows(x_BLHK: Tensor) -> tuple[int, int, int, int]:
    """The fields of csrc/attention_plan.h's AttentionRows: address, strides of batch, token and head."""
    return address(x_BLHK), x_BLHK.stride(0), x_BLHK.stride(1), x_BLHK.stride(2)


def _sizes(q: Tensor, k: Tensor, causal: bool) -> tuple[int, ...]:
    batch, n_queries, n_heads, head_dim = q.shape
    sizes = FIELDS.size, batch, n_queries, k.shape[1], n_heads, k.shape[2], head_dim
    return *sizes, causal, q.dtype is torch.bfloat16, torch.get_num_threads()


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    seq_idx_q: Tensor | None,
    seq_idx_k: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """y in q's dtype, and lse (empty unless `return_lse`)."""
    dtype = q.dtype
    q, k, v = _readable(q), _readable(k), _readable(v)
    seq_idx_q, seq_idx_k = ids(seq_idx_q), ids(seq_idx_k)
    # new_empty: torch.empty would follow the caller's default dtype and device
    y = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:3] if return_lse else 0, dtype=torch.float32)
    status = native.function("longllava_attention_forward")(
        FIELDS.pack(
            *_sizes(q, k, causal), scale, *_rows(q), *_rows(k), *_rows(v), *_rows(y),
            lse.data_ptr() if return_lse else 0, address(seq_idx_q), address(seq_idx_k), *NO_GRADIENTS,
        )
    )  # fmt: skip
    native.succeed(status, "attention")
    return y if dtype is y.dtype else y.to(dtype), lse


def _backward(
    grad_y: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    seq_idx_q: Tensor | None,
    seq_idx_k: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in their dtype."""
    dtype = q.dtype
    q, k, v, y, grad_y = (_readable(x) for x in (q, k, v, y, grad_y))
    seq_idx_q, seq_idx_k = ids(seq_idx_q), ids(seq_idx_k)
    lse = plain(lse)
    grad_lse = None if grad_lse is None else plain(grad_lse)
    grads = tuple(x.new_empty(x.shape) for x in (q, k, v))
    status = native.function("longllava_attention_backward")(
        FIELDS.pack(
            *_sizes(q, k, causal), scale, *_rows(q), *_rows(k), *_rows(v), *_rows(y),
            lse.data_ptr(), address(seq_idx_q), address(seq_idx_k),
            *_rows(grad_y), *_rows(grads[0]), *_rows(grads[1]), *_rows(grads[2]), address(grad_lse),
        )
    )  # fmt: skip
    native.succeed(status, "attention backward")
    grad_q, grad_k, grad_v = (grad if dtype is grad.dtype else grad.to(dtype) for grad in grads)
    return grad_q, grad_k, grad_v


attention = torch.library.custom_op("longllava::attention", _forward, mutates_args=(), device_types="cpu")
attention_backward = torch.library.custom_op(
    "longllava::attention_backward", _backward, mutates_args=(), device_types="cpu"
)


@attention.register_fake
def _(q, k, v, scale, causal, seq_idx_q, seq_idx_k, return_lse):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), q.new_empty(q.shape[:3] if return_lse else 0, dtype=torch.float32)


@attention_backward.register_fake
def _(grad_y, grad_lse, q, k, v, y, lse, scale, causal, seq_idx_q, seq_idx_k):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.scale, ctx.causal, seq_idx_q, seq_idx_k, _ = inputs
    ctx.save_for_backward(q, k, v, *output, seq_idx_q, seq_idx_k)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_y: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, y, lse, seq_idx_q, seq_idx_k = ctx.saved_tensors
    if grad_y is None:
        grad_y = torch.zeros_like(y)
    grads = attention_backward(grad_y, grad_lse, q, k, v, y, lse, ctx.scale, ctx.causal, seq_idx_q, seq_idx_k)
    return (*grads, None, None, None, None, None)


attention.register_autograd(_differentiate, setup_context=_setup)
