"""The convolution by torch: the specification and the judge."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor


def why_not(*args: Any) -> str | None:
    return None


def run(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    y = F.conv2d(x, weight, bias, padding=1)
    if residual is not None:
        y = y + residual
    return y.relu() if relu else y
