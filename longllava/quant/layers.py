"""Layers with int8 weights. Each stands where a layer of floats stood, and knows where that one's weights went.

N outputs, K inputs, B batch, L tokens of this call, T = B * L, X experts, S rows sorted by expert, F hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longllava.nn.norm import RMSNorm
from longllava.ops.fused import rms_norm, swiglu
from longllava.ops.int8_linear import int8_grouped_linear, int8_linear, quantize_rows
from longllava.ops.quantized import Quantized

NEVER = 2**31  # dynamic_from of a layer whose inputs stay floats


class Slot(NamedTuple):
    """Where the weight of a layer of floats lies: these rows of all rows of an int8 weight, and of its scales."""

    weight: str
    scale: str
    start: int
    n_rows: int
    width: int


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

    dynamic_from: L from which floats are quantised; below it the weights alone are int8. A row's result does not
    depend on the rows beside it.
    """

    weight_names = ("weight_NK", "scale_N")
    weight_NK: Tensor
    scale_N: Tensor

    def __init__(self, n_in: int, n_out: int, bias: nn.Parameter | None, device: torch.device, dynamic_from: int):
        super().__init__()
        self.hold((n_out, n_in), device)
        self.bias = bias
        self.dynamic_from = dynamic_from

    def forward(self, x: Tensor | Quantized) -> Tensor:
        dynamic = isinstance(x, Quantized) or x.shape[-2] >= self.dynamic_from
        return int8_linear(x, self.weight_NK, self.scale_N, self.bias, mode="dynamic" if dynamic else "weight_only")

    def slots(self) -> dict[str, Slot]:
        return {"weight": Slot(*self.weight_names, 0, *self.weight_NK.shape)}

    def extra_repr(self) -> str:
        n_out, n_in = self.weight_NK.shape
        return f"{n_in} -> {n_out}, bias={self.bias is not None}, dynamic_from={self.dynamic_from}"


class Int8SwiGLU(nn.Module):
    """SwiGLU whose gate and up projections are one product, and whose hidden rows are quantised as they are made."""

    def __init__(self, width: int, hidden: int, device: torch.device, dynamic_from: int, down_dynamic_from: int):
        super().__init__()
        self.gate_up_proj = Int8Linear(width, 2 * hidden, None, device, dynamic_from)
        self.down_proj = Int8Linear(hidden, width, None, device, down_dynamic_from)

    def forward(self, x: Tensor | Quantized, ctx: Any = None) -> Tensor:
        both = self.gate_up_proj(x)
        dynamic = both.shape[-2] >= self.down_proj.dynamic_from and not differentiated(both)
        return self.down_proj(swiglu(both, quantized=dynamic))

    def slots(self) -> dict[str, Slot]:
        hidden, width = self.down_proj.weight_NK.shape[::-1]
        both = ("gate_up_proj.weight_NK", "gate_up_proj.scale_N")
        return {
            "gate_proj.weight": Slot(*both, 0, hidden, width),
            "up_proj.weight": Slot(*both, hidden, hidden, width),
            "down_proj.weight": Slot("down_proj.weight_NK", "down_proj.scale_N", 0, width, hidden),
        }


class GroupedWeight(Int8Module):
    """One int8 matrix for each expert."""

    weight_names = ("weight_XNK", "scale_XN")
    weight_XNK: Tensor
    scale_XN: Tensor

    def __init__(self, n_experts: int, n_in: int, n_out: int, device: torch.device):
        super().__init__()
        self.hold((n_experts, n_out, n_in), device)

    def forward(self, x_SK: Tensor | Quantized, offsets: Tensor, mode: str) -> Tensor:
        return int8_grouped_linear(x_SK, self.weight_XNK, self.scale_XN, offsets, mode=mode)


class Int8Experts(nn.Module):
    """The MLPs of a mixture as two grouped products; stands for nn.mlp.Experts. Nothing waits for the host on a GPU."""

    asks_no_host = True

    asks_no_host = True

    def __init__(self, n_experts: int, width: int, hidden: int, device: torch.device, dynamic_from: int,
                 down_dynamic_from: int):  # fmt: skip
        super().__init__()
        self.gate_up_proj = GroupedWeight(n_experts, width, 2 * hidden, device)
        self.down_proj = GroupedWeight(n_experts, hidden, width, device)
        self.dynamic_from, self.down_dynamic_from = dynamic_from, down_dynamic_from

    def forward(self, x_BLD: Tensor, token_S: Tensor, offsets: Tensor) -> Tensor:
        length = x_BLD.shape[-2]
        x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
        modes = [
            "dynamic" if length >= least else "weight_only" for least in (self.dynamic_from, self.down_dynamic_from)
        ]
        rows: Tensor | Quantized
        if modes[0] == "dynamic" and not differentiated(x_TD):
            values, scale, dtype = quantize_rows(x_TD)  # once a token, and a quarter of the bytes to gather
            rows = Quantized(values[token_S], scale[token_S], dtype)
        else:
            rows = x_TD[token_S]
        both_SF = self.gate_up_proj(rows, offsets, modes[0])
        hidden_SF = swiglu(both_SF, quantized=modes[1] == "dynamic" and not differentiated(both_SF))
        return self.down_proj(hidden_SF, offsets, modes[1])

    def slots(self) -> dict[str, Slot]:
        n_experts, width, hidden = self.down_proj.weight_XNK.shape
        both, down = (tuple(f"{name}.{kind}" for kind in GroupedWeight.weight_names)
                      for name in ("gate_up_proj", "down_proj"))  # fmt: skip
        found = {}
        for j in range(n_experts):
            found[f"{j}.gate_proj.weight"] = Slot(both[0], both[1], 2 * j * hidden, hidden, width)
            found[f"{j}.up_proj.weight"] = Slot(both[0], both[1], (2 * j + 1) * hidden, hidden, width)
            found[f"{j}.down_proj.weight"] = Slot(down[0], down[1], j * width, width, hidden)
        return found


class QuantizedNorm(nn.Module):
    """RMS norm whose rows are quantised as they are made, once for all layers that read them. Stands for RMSNorm."""

    def __init__(self, norm: RMSNorm, dynamic_from: int):
        super().__init__()
        self.weight, self.eps, self.dynamic_from = norm.weight, norm.eps, dynamic_from

    def forward(self, x_BLD: Tensor) -> Tensor | Quantized:
        return rms_norm(x_BLD, self.weight, self.eps, quantized=self.quantizes(x_BLD))[0]

    def added(self, x_BLD: Tensor, residual_BLD: Tensor) -> tuple[Tensor | Quantized, Tensor]:
        """The norm of total = residual + x, and total."""
        return rms_norm(x_BLD, self.weight, self.eps, residual_BLD, quantized=self.quantizes(x_BLD))

    def quantizes(self, x_BLD: Tensor) -> bool:
        return x_BLD.shape[-2] >= self.dynamic_from and not differentiated(x_BLD, self.weight)


def differentiated(*tensors: Tensor) -> bool:
    """Quantised rows carry no gradients: where some are wanted, rows stay floats until the product."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
