"""Elementwise work of a vision encoder in one pass over memory: residual and layer norm, the activation of an MLP, each
with int8 output; and that activation within the product before it.

A thousand pictures of 577 tokens are 1.2 GB at every step between two linear layers: each pass that is saved is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longllava.errors import LongLLaVAError
from longllava.ops.dispatch import Backend, choose
from longllava.ops.few_rows import few_rows_linear
from longllava.ops.quantized import Quantized
from longllava.ops.vision import reference, triton

__all__ = [
    "ACTIVATIONS",
    "ACTIVATION_BACKENDS",
    "LAYER_NORM_BACKENDS",
    "LINEAR_ACTIVATED_BACKENDS",
    "Quantized",
    "activate_",
    "activated_rows",
    "add_layer_norm",
    "linear_activated",
]

ACTIVATIONS = tuple(reference.IN_PLACE)
# best first; the last is the judge
MODULES = (("triton", triton), ("reference", reference))
LAYER_NORM_BACKENDS = tuple(Backend(name, module.add_layer_norm, module.why_not_layer_norm) for name, module in MODULES)
ACTIVATION_BACKENDS = tuple(
    Backend(name, module.activate_, module.why_not_activation, run_quantized=module.activated_rows)
    for name, module in MODULES
)


def add_layer_norm(
    x: Tensor,
    delta: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    quantized: bool = False,
    backend: str | None = None,
) -> tuple[Tensor | Quantized, Tensor]:
    """Layer norm of total = x + delta over the last axis, and total: both of x's shape and dtype.

    Shapes:  x, delta (..., C), of one dtype; weight, bias (C).
    dtypes:  fp32, bf16 or fp16 (fp64 in plain torch). total is rounded to it, then normalised in fp32, rounded once.
    With `quantized` the norm is what `quantize_rows` of it gives, and its floats are never written.
    Gradients go to all tensors (by the reference); with `quantized` through total alone.
    Source:  Ba et al. 2016, arXiv:1607.06450.
    """
    if delta.shape != x.shape or delta.dtype != x.dtype or x.ndim < 1:
        raise LongLLaVAError(
            f"add_layer_norm: x and delta must agree, got {tuple(x.shape)} in {x.dtype}, {tuple(delta.shape)} in"
            f" {delta.dtype}"
        )
    if weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        raise LongLLaVAError(
            f"add_layer_norm: weight and bias must be ({x.shape[-1]},), got {tuple(weight.shape)}, {tuple(bias.shape)}"
        )
    args = (x, delta, weight, bias, eps, quantized)
    y, scale, total = choose("add_layer_norm", LAYER_NORM_BACKENDS, *args, forced=backend).run(*args)
    return (y if scale is None else Quantized(y, scale, x.dtype)), total


@torch.no_grad()
def activate_(x: Tensor, activation: str, *, backend: str | None = None) -> Tensor:
    """The activation of x in the place of x, computed in fp32 by kernels. Without gradients.

    activation: "gelu", x Phi(x); "gelu_tanh", its approximation; "quick_gelu", x sigmoid(1.702 x).
    Source: Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2;
    CLIP was trained with the last, SigLIP with the second.
    """
    args = (x, _known(activation))
    y: Tensor = choose("activation", ACTIVATION_BACKENDS, *args, forced=backend).run(*args)
    return y


@torch.no_grad()
def activated_rows(x: Tensor, activation: str, *, backend: str | None = None) -> Quantized:
    """`quantize_rows` of what `activate_` gives, in one pass: x (..., F) stays as it is or becomes what activate_ makes
    of it; take it for lost. Without gradients.
    """
    if x.ndim < 1:
        raise LongLLaVAError("activated_rows: x must be rows (..., F), got a scalar")
    chosen = choose("activation", ACTIVATION_BACKENDS, x, _known(activation), True, forced=backend)
    assert chosen.run_quantized is not None
    values, scale = chosen.run_quantized(x, activation)
    return Quantized(values, scale, x.dtype)


@torch.no_grad()
def linear_activated(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, *, backend: str | None = None
) -> Tensor:
    """y = activation(x weight^T + bias), an activation of `activate_`. Without gradients.

    Shapes:  x (..., K); weight (N, K); bias (N).
    dtypes:  fp32, bf16 or fp16 (fp64 in plain torch), all the same. Sums are fp32. The Triton kernel activates
    these and rounds once; the others round the sum to x's dtype first, as two layers in a row do.
    Returns: (..., N) in x's dtype.
    """
    if x.ndim < 1 or weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        raise LongLLaVAError(
            f"linear_activated: x must be (..., K) and weight (N, K), got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise LongLLaVAError(f"linear_activated: bias must be ({len(weight)},), got {tuple(bias.shape)}")
    args = (x, weight, bias, _known(activation))
    y: Tensor = choose("linear_activated", LINEAR_ACTIVATED_BACKENDS, *args, forced=backend).run(*args)
    return y


def _apart(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return activate_(few_rows_linear(x, weight, bias), activation)


LINEAR_ACTIVATED_BACKENDS = (
    Backend("triton", triton.linear_activated, triton.why_not_linear),
    Backend("apart", _apart, reference.why_not_linear),  # each by its own best backend
    Backend("reference", reference.linear_activated, reference.why_not_linear),
)


def _known(activation: str) -> str:
    if activation not in ACTIVATIONS:
        raise LongLLaVAError(f"activation: got {activation!r}, allowed: {', '.join(ACTIVATIONS)}")
    return activation
