"""The encoder's passes in plain torch: the specification and the judge."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def why_not(*args: Any) -> str | None:
    return None


def add_layer_norm(x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + delta
    return F.layer_norm(total, weight.shape, weight, bias, eps), total


def quick_gelu_(x: Tensor) -> Tensor:
    return x.mul_(torch.sigmoid(1.702 * x))
