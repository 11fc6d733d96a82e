"""RMS norm (Zhang & Sennrich 2019, arXiv:1910.07467), computed in fp32 as Jamba does."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longllava.ops.fused import rms_norm, rms_norm_parts


class RMSNorm(nn.Module):
    """feeds_products: whether linear layers alone read it. Under autocast it is then in the dtype that they take, which
    saves each of them a copy; else, as the scan's B and C and attention's queries and keys, in fp32."""

    def __init__(self, width: int, eps: float, feeds_products: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.feeds_products = eps, feeds_products

    def forward(self, x: Tensor) -> Tensor:
        y, _ = rms_norm(x, self.weight, self.eps, dtype=self.dtype_of(x))
        assert isinstance(y, Tensor)
        return y

    def added(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of total = residual + x, and total, in one pass where there is a kernel."""
        y, total = rms_norm(x, self.weight, self.eps, residual, dtype=self.dtype_of(x))
        assert isinstance(y, Tensor)
        return y, total

    def dtype_of(self, x: Tensor) -> torch.dtype | None:
        """Of the norm of x; None: what x and weight promote to."""
        kind = x.device.type
        return torch.get_autocast_dtype(kind) if self.feeds_products and torch.is_autocast_enabled(kind) else None


def normed_parts(x: Tensor, norms: list[RMSNorm]) -> tuple[Tensor, ...]:
    """The parts of x's last axis, each by its norm; on a GPU in one launch where no gradients are wanted."""
    weights = tuple(norm.weight for norm in norms)
    assert len({norm.eps for norm in norms}) == 1
    if x.device.type == "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return tuple(norm(part) for norm, part in zip(norms, x.split([len(weight) for weight in weights], -1)))
    return rms_norm_parts(x, weights, norms[0].eps)
