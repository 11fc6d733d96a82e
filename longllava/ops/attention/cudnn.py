"""Long causal prefill on Hopper and newer by cuDNN's attention, which Triton's compiler does not reach there.

cuDNN's own causal mask is for as many queries as keys, and it makes a plan, in tenths of a second, for each length. So
the keys before a chunk are cut into blocks of the chunk's length times a power of two, whose plans serve every prompt;
the results are merged by their lse, in one pass. What does not fit the blocks goes through the Triton kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longllava.ops import triton_support, upstream_support
from longllava.ops.attention import reference, triton
from longllava.ops.attention.triton import Part

UNIT = 4096  # queries come in multiples of it: fewer would not pay, other lengths would need plans of their own
LARGEST = 16  # of a block of keys, in lengths of the chunk


def why_not(q: Tensor, k: Tensor, v: Tensor, scale: float = 0.0, causal: bool = True, *rest: Any) -> str | None:
    if q.device.type != "cuda":
        return f"needs CUDA tensors, got {q.device.type}"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 or float16, got {str(q.dtype).removeprefix('torch.')}"
    if q.shape[1] == 0 or q.shape[1] % UNIT or k.shape[1] < q.shape[1]:
        return f"takes multiples of {UNIT} queries and as many keys or more, got {q.shape[1]} and {k.shape[1]}"
    if q.shape[3] % 8 or q.shape[3] > 128:
        return f"takes heads of at most 128, a multiple of 8, got {q.shape[3]}"
    if rest and rest[0] is not None:
        return "takes no seq_idx"
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return "has no backward here, and gradients are wanted"
    if torch.compiler.is_compiling():
        return "is not traced"
    if torch.cuda.get_device_capability(q.device) < (9, 0):
        return "is faster than the Triton kernels from compute capability 9.0 on only"
    return triton_support.missing() or broken(q.device)


@functools.cache
def broken(device: torch.device) -> str | None:
    return upstream_support.tried("cuDNN's attention", trial, device, "LONGLLAVA_ATTENTION=triton does without")


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool = True,
    seq_q: Tensor | None = None,
    seq_k: Tensor | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    parts = pieces(q, k, v, scale, causal, by_cudnn, by_triton)
    return parts[0] if len(parts) == 1 else triton.merged(parts)


def pieces(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    square: Callable[[Tensor, Tensor, Tensor, float, bool], Part],
    other: Callable[[Tensor, Tensor, Tensor, float, bool], Part],
) -> list[Part]:
    """Results over disjoint sets of keys: `square` over those in blocks, `other` over fewer than a chunk's."""
    n_queries, n_keys = q.shape[1], k.shape[1]
    before = n_keys - n_queries if causal else n_keys
    parts = [square(q, k[:, before:], v[:, before:], scale, True)] if causal else []
    at = before % n_queries
    if at:
        parts.append(other(q, k[:, :at], v[:, :at], scale, False))
    while at < before:
        left = (before - at) // n_queries
        end = at + n_queries * min(LARGEST, 1 << (left.bit_length() - 1))
        parts.append(square(q, k[:, at:end], v[:, at:end], scale, False))
        at = end
    return parts


def by_cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Part:
    batch, n_queries, n_heads, _ = q.shape
    # a plan is for strides too: the stride of one row, which tells how long the prompt is, is made the part's own
    q, k, v = (x[0][None] if batch == 1 else x for x in (q, k, v))
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, True, 0.0, causal, False, scale=scale
    )
    return found[0].transpose(1, 2), found[1].reshape(batch, n_heads, n_queries).transpose(1, 2)


def by_triton(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Part:
    y, lse = triton.run(q, k, v, scale, causal, None, None, True)
    assert lse is not None
    return y, lse


def trial(device: torch.device) -> None:
    """Groups of heads, strides, the mask and lse, on a small call, against the reference."""
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 256, heads, 64, generator=random).to(device, torch.bfloat16) for heads in (4, 2, 2))
    for causal in (True, False):
        truth = reference.run(q.float(), k.float(), v.float(), 0.125, causal, None, None, True)
        for got, expected in zip(by_cudnn(q, k, v, 0.125, causal), truth):
            if expected is None or (got.float() - expected).norm() > 0.01 * expected.norm():
                raise RuntimeError("cuDNN's attention gives other values than it should")
