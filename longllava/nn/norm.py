"""RMS norm (Zhang & Sennrich 2019, arXiv:1910.07467), computed in fp32 as Jamba does."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longllava.ops.fused import rms_norm, rms_norm_parts


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.device.type == "cpu":  # differentiated by torch itself
            if x.dtype == torch.float32:
                return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
            # the published order: normalise in fp32, round, then scale in the weights' dtype
            return self.weight * F.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(x.dtype)
        y, _ = rms_norm(x, self.weight, self.eps)
        assert isinstance(y, Tensor)
        return y

    def added(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of total = residual + x, and total, in one pass where there is a kernel."""
        y, total = rms_norm(x, self.weight, self.eps, residual)
        assert isinstance(y, Tensor)
        return y, total


def normed_parts(x: Tensor, norms: list[RMSNorm]) -> tuple[Tensor, ...]:
    """The parts of x's last axis, each by its norm; on a GPU in one launch where no gradients are wanted."""
    weights = tuple(norm.weight for norm in norms)
    assert len({norm.eps for norm in norms}) == 1
    if x.device.type == "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return tuple(norm(part) for norm, part in zip(norms, x.split([len(weight) for weight in weights], -1)))
    return rms_norm_parts(x, weights, norms[0].eps)
