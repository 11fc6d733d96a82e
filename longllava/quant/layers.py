"""Layers with int8 weights. Each stands where a layer of floats stood, and knows where that one's weights went.

N outputs, K inputs, B batch, L tokens of this call, T = B * L, X experts, S rows sorted by expert, F hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longllava.encoders.vit import Activation, LayerNorm
from longllava.nn.norm import RMSNorm
from longllava.ops import triton_support
from longllava.ops.fused import rms_norm, swiglu
from longllava.ops.int8_linear import int8_grouped_linear, int8_linear, quantize_rows, rotate_rows, triton
from longllava.ops.quantized import Quantized
from longllava.ops.vision import activated_rows, add_layer_norm

NEVER = 2**31  # dynamic_from of a layer whose inputs stay floats
Multiply = Callable[[Tensor | Quantized, str, bool], Tensor]  # rows, mode, whether the bias is added


class Inputs(NamedTuple):
    """What becomes of a layer's inputs: int8 from dynamic_from tokens a sequence on, twice with two_terms; rotated as
    the layer's weights are."""

    dynamic_from: int
    two_terms: bool = False
    rotated: bool = False

    def once(self, length: int) -> bool:
        """Whether rows become int8, once."""
        return length >= self.dynamic_from and not self.two_terms

    def fused(self, length: int) -> bool:
        """Whether a norm, an activation or a scan may make int8 rows: none of them rotates."""
        return self.once(length) and not self.rotated

    def product(self, x: Tensor | Quantized, length: int, multiply: Multiply) -> Tensor:
        if isinstance(x, Quantized):
            return multiply(x, "dynamic", True)
        if self.rotated and self.once(length) and not differentiated(x):
            return multiply(quantize_rows(x, rotated=True), "dynamic", True)
        if self.rotated:
            x = rotate_rows(x)
        if length < self.dynamic_from:
            return multiply(x, "weight_only", True)
        if not self.two_terms or differentiated(x):
            return multiply(x, "dynamic", True)
        first = quantize_rows(x)._replace(dtype=torch.float32)
        rest = quantize_rows(x.float() - first.dequantized())
        return (multiply(first, "dynamic", True) + multiply(rest, "dynamic", False)).to(x.dtype)


class Slot(NamedTuple):
    """Where the weight of a layer of floats lies: these rows of all rows of an int8 weight, and of its scales. rotated:
    what lies there are the rotated rows."""

    weight: str
    scale: str
    start: int
    n_rows: int
    width: int
    rotated: bool


class Int8Module(nn.Module):
    """Holds int8 weights of any leading axes before N, K, and their fp32 scales."""

    weight_names: tuple[str, str]

    def hold(self, shape: tuple[int, ...], device: torch.device) -> None:
        weight, scale = self.weight_names
        self.register_buffer(weight, torch.empty(shape, dtype=torch.int8, device=device))
        self.register_buffer(scale, torch.empty(shape[:-1], dtype=torch.float32, device=device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """A cast of the whole model leaves the scales in fp32, unrounded."""
        name = self.weight_names[1]
        before = getattr(self, name)
        super()._apply(fn, recurse)
        after = getattr(self, name)
        if after.dtype != torch.float32:
            setattr(self, name, after.float() if before.is_meta else before.to(after.device))
        return self


class Int8Linear(Int8Module):
    """y = x (scale * weight)^T + bias. x: floats (..., L, K), or rows that are quantised already.

    Where rows become int8, the result of one does not depend on those beside it.
    """

    weight_names = ("weight_NK", "scale_N")
    weight_NK: Tensor
    scale_N: Tensor

    def __init__(self, n_in: int, n_out: int, bias: nn.Parameter | None, device: torch.device, inputs: Inputs):
        super().__init__()
        self.hold((n_out, n_in), device)
        self.bias = bias
        self.inputs = inputs

    def forward(self, x: Tensor | Quantized) -> Tensor:
        def multiply(rows: Tensor | Quantized, mode: str, with_bias: bool) -> Tensor:
            return int8_linear(rows, self.weight_NK, self.scale_N, self.bias if with_bias else None, mode=mode)

        return self.inputs.product(x, 0 if isinstance(x, Quantized) else x.shape[-2], multiply)

    def slots(self) -> dict[str, Slot]:
        n_out, n_in = self.weight_NK.shape
        return {"weight": Slot(*self.weight_names, 0, n_out, n_in, self.inputs.rotated)}

    def extra_repr(self) -> str:
        n_out, n_in = self.weight_NK.shape
        return f"{n_in} -> {n_out}, bias={self.bias is not None}, {self.inputs}"


class Int8SwiGLU(nn.Module):
    """SwiGLU whose gate and up projections are one product, and whose hidden rows are quantised as they are made."""

    def __init__(self, width: int, hidden: int, device: torch.device, up: Inputs, down: Inputs):
        super().__init__()
        self.gate_up_proj = Int8Linear(width, 2 * hidden, None, device, up)
        self.down_proj = Int8Linear(hidden, width, None, device, down)

    def forward(self, x: Tensor | Quantized, ctx: Any = None) -> Tensor:
        both = self.gate_up_proj(x)
        return self.down_proj(down_inputs(both, both.shape[-2], self.down_proj.inputs))

    def slots(self) -> dict[str, Slot]:
        hidden, width = self.down_proj.weight_NK.shape[::-1]
        both = ("gate_up_proj.weight_NK", "gate_up_proj.scale_N")
        up, down = self.gate_up_proj.inputs.rotated, self.down_proj.inputs.rotated
        return {
            "gate_proj.weight": Slot(*both, 0, hidden, width, up),
            "up_proj.weight": Slot(*both, hidden, hidden, width, up),
            "down_proj.weight": Slot("down_proj.weight_NK", "down_proj.scale_N", 0, width, hidden, down),
        }


class GroupedWeight(Int8Module):
    """One int8 matrix for each expert."""

    weight_names = ("weight_XNK", "scale_XN")
    weight_XNK: Tensor
    scale_XN: Tensor

    def __init__(self, n_experts: int, n_in: int, n_out: int, device: torch.device):
        super().__init__()
        self.hold((n_experts, n_out, n_in), device)

    def forward(self, x_SK: Tensor | Quantized, offsets: Tensor, inputs: Inputs, length: int) -> Tensor:
        def multiply(rows: Tensor | Quantized, mode: str, with_bias: bool) -> Tensor:
            return int8_grouped_linear(rows, self.weight_XNK, self.scale_XN, offsets, mode=mode)

        return inputs.product(x_SK, length, multiply)


class Int8Experts(nn.Module):
    """The MLPs of a mixture as two grouped products; stands for nn.mlp.Experts."""

    def __init__(self, n_experts: int, width: int, hidden: int, device: torch.device, up: Inputs, down: Inputs):
        super().__init__()
        self.gate_up_proj = GroupedWeight(n_experts, width, 2 * hidden, device)
        self.down_proj = GroupedWeight(n_experts, hidden, width, device)
        self.up, self.down = up, down

    def forward(self, x_BLD: Tensor, token_S: Tensor, offsets: Tensor) -> Tensor:
        length = x_BLD.shape[-2]
        x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
        rows: Tensor | Quantized
        if self.up.once(length) and not differentiated(x_TD):
            # once a token, and a quarter of the bytes to gather
            values, scale, dtype = quantize_rows(x_TD, rotated=self.up.rotated)
            rows = Quantized(values[token_S], scale[token_S], dtype)
        else:
            rows = x_TD[token_S]
        both_SF = self.gate_up_proj(rows, offsets, self.up, length)
        return self.down_proj(down_inputs(both_SF, length, self.down), offsets, self.down, length)

    def asks_host(self, n_rows: int) -> bool:
        """Many rows of one token a sequence meet floats expert by expert, as all do in plain torch."""
        return n_rows > triton.FEW_ROWS or triton_support.missing() is not None

    def slots(self) -> dict[str, Slot]:
        n_experts, width, hidden = self.down_proj.weight_XNK.shape
        both, down = (tuple(f"{name}.{kind}" for kind in GroupedWeight.weight_names)
                      for name in ("gate_up_proj", "down_proj"))  # fmt: skip
        found = {}
        for j in range(n_experts):
            found[f"{j}.gate_proj.weight"] = Slot(both[0], both[1], 2 * j * hidden, hidden, width, self.up.rotated)
            found[f"{j}.up_proj.weight"] = Slot(both[0], both[1], (2 * j + 1) * hidden, hidden, width, self.up.rotated)
            found[f"{j}.down_proj.weight"] = Slot(down[0], down[1], j * width, width, hidden, self.down.rotated)
        return found


class QuantizedNorm(nn.Module):
    """RMS norm whose rows are quantised as they are made, once for all layers that read them. Stands for RMSNorm."""

    def __init__(self, norm: RMSNorm, inputs: Inputs):
        super().__init__()
        self.weight, self.eps, self.inputs = norm.weight, norm.eps, inputs

    def forward(self, x_BLD: Tensor) -> Tensor | Quantized:
        return rms_norm(x_BLD, self.weight, self.eps, quantized=self.quantizes(x_BLD))[0]

    def added(self, x_BLD: Tensor, residual_BLD: Tensor) -> tuple[Tensor | Quantized, Tensor]:
        """The norm of total = residual + x, and total."""
        return rms_norm(x_BLD, self.weight, self.eps, residual_BLD, quantized=self.quantizes(x_BLD))

    def quantizes(self, x_BLD: Tensor) -> bool:
        return self.inputs.fused(x_BLD.shape[-2]) and not differentiated(x_BLD, self.weight)


class QuantizedLayerNorm(nn.Module):
    """An encoder's norm whose rows are quantised where the residual is added in the same pass. Stands for LayerNorm."""

    def __init__(self, norm: LayerNorm, inputs: Inputs):
        super().__init__()
        self.weight, self.bias, self.eps, self.inputs = norm.weight, norm.bias, norm.eps, inputs

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def added(self, x: Tensor, residual: Tensor) -> tuple[Tensor | Quantized, Tensor]:
        """The norm of total = residual + x, and total."""
        fused = self.inputs.fused(x.shape[-2]) and not differentiated(x, residual, self.weight, self.bias)
        return add_layer_norm(residual, x, self.weight, self.bias, self.eps, quantized=fused)


class QuantizedActivation(nn.Module):
    """An encoder's activation whose rows are quantised as they are made. Stands for Activation."""

    def __init__(self, activation: Activation, inputs: Inputs):
        super().__init__()
        self.floats, self.inputs = activation, inputs

    def forward(self, x: Tensor) -> Tensor | Quantized:
        if torch.is_grad_enabled() or not self.inputs.fused(x.shape[-2]):
            y: Tensor = self.floats(x)
            return y
        return activated_rows(x, self.floats.name)


def down_inputs(both: Tensor, length: int, inputs: Inputs) -> Tensor | Quantized:
    """What down_proj reads, of gate and up side by side: int8 rows where nothing else is to be made of them."""
    quantized = inputs.once(length) and not differentiated(both)
    return swiglu(both, quantized=quantized, rotated=quantized and inputs.rotated)


def differentiated(*tensors: Tensor) -> bool:
    """Quantised rows carry no gradients: where some are wanted, rows stay floats until the product."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
