"""The backends of the int8 products, and torch custom ops that call the chosen one: autograd and torch.compile see
those, everything else goes straight to the backend."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from longllava.errors import LongLLaVAError
from longllava.ops.dispatch import Backend, choose, transformed
from longllava.ops.int8_linear import cpu, cuda, reference, triton

# best first; the last is the judge
MODULES = (("cuda", cuda), ("triton", triton), ("cpu", cpu), ("reference", reference))
QUANTIZERS = (("triton", triton), ("cpu", cpu), ("reference", reference))
BACKENDS = tuple(Backend(name, module.run, module.why_not) for name, module in MODULES)
QUANTIZE_BACKENDS = tuple(Backend(name, module.quantize_rows, module.why_not_quantize) for name, module in QUANTIZERS)
ROTATE_BACKENDS = tuple(Backend(name, module.rotate_rows, module.why_not_rotate) for name, module in QUANTIZERS)


def multiply(
    x_TK: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    x_scale_T: Tensor | None,
    offsets: Tensor | None,
    mode: str,
    dtype: torch.dtype,
    backend: str | None,
) -> Tensor:
    """The product by the first backend that can, or the one asked for. Gradients go to x alone."""
    wants_grad = torch.is_grad_enabled() and x_TK.requires_grad
    if transformed() and (wants_grad or any(_has_tangent(t) for t in (x_TK, x_scale_T))):
        raise LongLLaVAError(
            "int8_linear: torch.func and forward-mode differentiation find no derivative here; call backward(), or use "
            "the float weights"
        )
    plain = type(x_TK) is Tensor and not wants_grad and not torch.compiler.is_compiling()
    call: Any = _multiply if plain else int8_linear
    y_TN: Tensor = call(x_TK, weight, scale, bias, x_scale_T, offsets, mode, dtype, backend)
    return y_TN


def _has_tangent(x: Tensor | None) -> bool:
    return x is not None and forward_ad.unpack_dual(x).tangent is not None


def _multiply(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    x_scale: Tensor | None,
    offsets: Tensor | None,
    mode: str,
    dtype: torch.dtype,
    backend: str | None,
) -> Tensor:
    args = (x, weight, scale, bias, x_scale, offsets, mode, dtype)
    chosen = choose("int8_linear", BACKENDS, *args, forced=backend)
    with torch.set_grad_enabled(False) if torch.is_grad_enabled() else nullcontext():
        y_TN: Tensor = chosen.run(*args)
    return y_TN


def quantized(x_TK: Tensor, absmax_T: Tensor | None, rotated: bool, backend: str | None) -> tuple[Tensor, Tensor]:
    plain = type(x_TK) is Tensor and not torch.compiler.is_compiling()
    call: Any = _quantized if plain else quantize_rows
    values, scale = call(x_TK, absmax_T, rotated, backend)
    return values, scale


def _quantized(x: Tensor, absmax: Tensor | None, rotated: bool, backend: str | None) -> tuple[Tensor, Tensor]:
    args = (x, absmax, rotated)
    values, scale = choose("quantize_rows", QUANTIZE_BACKENDS, *args, forced=backend).run(*args)
    return values, scale


def rotated_rows(x_TK: Tensor, backend: str | None) -> Tensor:
    """Rotated rows, with gradients."""
    wants_grad = torch.is_grad_enabled() and x_TK.requires_grad and not transformed()
    plain = type(x_TK) is Tensor and not wants_grad and not torch.compiler.is_compiling()
    call: Any = _rotated if plain else rotate_rows
    y_TK: Tensor = call(x_TK, backend)
    return y_TK


def _rotated(x: Tensor, backend: str | None) -> Tensor:
    y: Tensor = choose("rotate_rows", ROTATE_BACKENDS, x, forced=backend).run(x)
    return y


int8_linear = torch.library.custom_op("longllava::int8_linear", _multiply, mutates_args=())
quantize_rows = torch.library.custom_op("longllava::quantize_rows", _quantized, mutates_args=())
rotate_rows = torch.library.custom_op("longllava::rotate_rows", _rotated, mutates_args=())


@int8_linear.register_fake
def _(x, weight, scale, bias, x_scale, offsets, mode, dtype, backend):  # type: ignore[no-untyped-def]
    return x.new_empty((x.shape[0], weight.shape[-2]), dtype=dtype)


@quantize_rows.register_fake
def _(x, absmax, rotated, backend):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:1], dtype=torch.float32)


@rotate_rows.register_fake
def _(x, backend):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, scale, _, _, offsets, *_ = inputs
    ctx.wanted = x.requires_grad
    ctx.dtype = x.dtype
    ctx.save_for_backward(weight, scale, offsets)


def _differentiate(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    weight, scale, offsets = ctx.saved_tensors
    grad_x = reference.grad_input(grad_y, weight, scale, offsets).to(ctx.dtype) if ctx.wanted else None
    return grad_x, *(None,) * 8


int8_linear.register_autograd(_differentiate, setup_context=_setup)
rotate_rows.register_autograd(lambda ctx, grad_y: (rotated_rows(grad_y, None), None))  # its own inverse and transpose
