"""The linear layer by torch: the specification, the judge, and the choice for more rows."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor


def why_not(*args: Any) -> str | None:
    return None


def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)
