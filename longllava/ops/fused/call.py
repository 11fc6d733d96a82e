"""The backends of the fused ops, and torch custom ops that call the chosen one.

Plain torch differentiates and compiles the reference by itself. A kernel is called directly where nothing watches;
under autograd and torch.compile it stands in a custom op. Gradients come from the compiled kernels on the CPU, else
from torch, which computes the op again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longllava.ops.dispatch import Backend, choose
from longllava.ops.fused import cpu, reference, triton

MODULES = (("cpu", cpu), ("triton", triton), ("reference", reference))
# the last is the judge; of the others the quickest to say no goes first: a CPU that decodes comes here for each norm
RMS_NORM_BACKENDS = tuple(Backend(name, module.rms_norm, module.why_not_rms_norm) for name, module in MODULES)
SWIGLU_BACKENDS = tuple(Backend(name, module.swiglu, module.why_not_swiglu) for name, module in MODULES)
RMS_NORM_PARTS_BACKENDS = (
    Backend("triton", triton.rms_norm_parts, triton.why_not_rms_norm_parts),
    Backend("reference", reference.rms_norm_parts, reference.why_not_rms_norm_parts),
)


def normed(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None,
    quantized: bool,
    dtype: torch.dtype,
    backend: str | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y or its int8 values, the scale of these, the new residual."""
    args = (x, weight, eps, residual, quantized, dtype)
    chosen = choose("rms_norm", RMS_NORM_BACKENDS, *args, forced=backend)
    if chosen.run is reference.rms_norm or not _watched(x, weight, residual):
        y, scale, total = chosen.run(*args)
        return y, scale, total
    found = list(rms_norm(*args, chosen.name))
    return found[0], found[1] if quantized else None, None if residual is None else found[-1]


def swish_gated(
    gate: Tensor, up: Tensor, absmax: Tensor | None, quantized: bool, rotated: bool, backend: str | None
) -> tuple[Tensor, Tensor | None]:
    """y, or its int8 values and their scale."""
    args = (gate, up, absmax, quantized, rotated)
    chosen = choose("swiglu", SWIGLU_BACKENDS, *args, forced=backend)
    if chosen.run is reference.swiglu or not _watched(gate, up, absmax):
        y, scale = chosen.run(*args)
        return y, scale
    found = swiglu(*args, chosen.name)
    return found[0], found[1] if quantized else None


def _watched(*tensors: Tensor | None) -> bool:
    given = [x for x in tensors if x is not None]
    wants_grad = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    return wants_grad or torch.compiler.is_compiling() or any(type(x) is not Tensor for x in given[:1])


def _rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None,
    quantized: bool,
    dtype: torch.dtype,
    backend: str,
) -> list[Tensor]:
    args = (x, weight, eps, residual, quantized, dtype)
    found = choose("rms_norm", RMS_NORM_BACKENDS, *args, forced=backend).run(*args)
    return [x for x in found if x is not None]


def _swiglu(
    gate: Tensor, up: Tensor, absmax: Tensor | None, quantized: bool, rotated: bool, backend: str
) -> list[Tensor]:
    args = (gate, up, absmax, quantized, rotated)
    found = choose("swiglu", SWIGLU_BACKENDS, *args, forced=backend).run(*args)
    return [x for x in found if x is not None]


# Schemas are written out since torch 2.6 cannot read list[Tensor] in annotations.
rms_norm = torch.library.custom_op(
    "longllava::rms_norm", _rms_norm, mutates_args=(), schema="(Tensor x, Tensor weight, float eps, Tensor? residual, "
    "bool quantized, ScalarType dtype, str backend) -> Tensor[]"
)  # fmt: skip
swiglu = torch.library.custom_op(
    "longllava::swiglu", _swiglu, mutates_args=(), schema="(Tensor gate, Tensor up, Tensor? absmax, bool quantized, "
    "bool rotated, str backend) -> Tensor[]"
)  # fmt: skip
rms_norm_gradients = torch.library.custom_op(
    "longllava::rms_norm_backward", cpu.rms_norm_gradients, mutates_args=(), device_types="cpu"
)
swiglu_gradients = torch.library.custom_op(
    "longllava::swiglu_backward", cpu.swiglu_gradients, mutates_args=(), device_types="cpu"
)


def _outputs(x: Tensor, quantized: bool, dtype: torch.dtype) -> list[Tensor]:
    if not quantized:
        return [x.new_empty(x.shape, dtype=dtype)]
    return [x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:1], dtype=torch.float32)]


@rms_norm.register_fake
def _(x, weight, eps, residual, quantized, dtype, backend):  # type: ignore[no-untyped-def]
    return _outputs(x, quantized, dtype) + ([] if residual is None else [x.new_empty(x.shape)])


@swiglu.register_fake
def _(gate, up, absmax, quantized, rotated, backend):  # type: ignore[no-untyped-def]
    return _outputs(gate, quantized, gate.dtype)


@rms_norm_gradients.register_fake
def _(grad, x, weight, eps):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


@swiglu_gradients.register_fake
def _(grad, gate, up):  # type: ignore[no-untyped-def]
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _setup_norm(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weight, ctx.eps, residual, ctx.quantized, ctx.dtype, _ = inputs
    ctx.save_for_backward(x, weight, residual)


def _differentiate_norm(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    x, weight, residual = ctx.saved_tensors
    grad = None if ctx.quantized else grads[0]
    by_kernel = residual is None and cpu.why_not_rms_norm(x, weight, ctx.eps, None, False, ctx.dtype) is None
    if by_kernel and grad is not None and not torch.is_grad_enabled():
        return *rms_norm_gradients(grad, x, weight, ctx.eps), *[None] * 5
    wanted = [grad, None, None if residual is None else grads[-1]]
    found = _again(lambda x, weight, residual: reference.rms_norm(x, weight, ctx.eps, residual, False, ctx.dtype),
                   (x, weight, residual), wanted)  # fmt: skip
    return found[0], found[1], None, found[2], None, None, None


def _setup_swiglu(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    gate, up, _, ctx.quantized, *_ = inputs
    ctx.save_for_backward(gate, up)


def _differentiate_swiglu(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    gate, up = ctx.saved_tensors
    grad = None if ctx.quantized else grads[0]
    if grad is None or torch.is_grad_enabled():  # gradients are to have gradients of their own
        found = _again(lambda gate, up: reference.swiglu(gate, up, None, False), (gate, up), [grad, None])
    elif cpu.why_not_swiglu(gate) is None:
        found = list(swiglu_gradients(grad, gate, up))
    else:
        found = [torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)]
    return found[0], found[1], None, None, None, None


def _again(run: Any, inputs: tuple[Tensor | None, ...], grads: list[Tensor | None]) -> list[Tensor | None]:
    """Gradients of run's inputs, by running it again; None where an input is missing or reached by no gradient.

    With a graph of their own where one is wanted (create_graph): an input's view then stands between it and its like.
    """
    graph = torch.is_grad_enabled()
    leaves = [None if x is None else x.view_as(x) if graph and x.requires_grad else x.detach().requires_grad_()
              for x in inputs]  # fmt: skip
    with torch.enable_grad():
        outputs = run(*leaves)
    pairs = [(y, grad) for y, grad in zip(outputs, grads) if y is not None and grad is not None]
    if not pairs:
        return [None] * len(leaves)
    given = [x for x in leaves if x is not None]
    ys, wanted = zip(*pairs)
    found = iter(torch.autograd.grad(ys, given, wanted, create_graph=graph, allow_unused=True))
    return [None if x is None else next(found) for x in leaves]


rms_norm.register_autograd(_differentiate_norm, setup_context=_setup_norm)
swiglu.register_autograd(_differentiate_swiglu, setup_context=_setup_swiglu)
