"""The encoder's passes in plain torch: the specification and the judge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longllava.ops.quantized import quantize

IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": torch.ops.aten.gelu_,
    "gelu_tanh": lambda x: torch.ops.aten.gelu_(x, approximate="tanh"),
    "quick_gelu": lambda x: x.mul_(torch.sigmoid(1.702 * x)),
}


def why_not_layer_norm(*args: Any) -> str | None:
    return None


def why_not_activation(*args: Any) -> str | None:
    return None


def why_not_linear(*args: Any) -> str | None:
    return None


def add_layer_norm(
    x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, eps: float, quantized: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The norm or its int8 values, the scale of these, the sum."""
    total = x + delta
    y = F.layer_norm(total, weight.shape, weight, bias, eps)
    return (*(quantize(y.detach()) if quantized else (y, None)), total)


def activate_(x: Tensor, activation: str) -> Tensor:
    return IN_PLACE[activation](x)


def linear_activated(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return IN_PLACE[activation](F.linear(x, weight, bias))


def activated_rows(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return quantize(IN_PLACE[activation](x))
