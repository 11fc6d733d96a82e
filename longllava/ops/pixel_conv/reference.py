"""The convolution of pixels by torch: the specification and the judge."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor


def why_not(*args: Any) -> str | None:
    return None


def run(
    pixels: Tensor, mean: Tensor, std: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int, relu: bool
) -> Tensor:
    x = (pixels.to(weight.dtype) - mean[:, None, None]) / std[:, None, None]
    y = F.conv2d(x, weight, bias, stride, padding)
    return y.relu() if relu else y
