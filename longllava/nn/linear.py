"""Linear layers of the backbone: torch's, which multiply a handful of rows on a GPU by a kernel of their own."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from longllava.ops.few_rows import few_rows_linear


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":
            return F.linear(x, self.weight, self.bias)
        return few_rows_linear(x, self.weight, self.bias)
