"""Linear layers and convolutions of the models: torch's own, and others where those are slow.

On a GPU a handful of rows is multiplied by a kernel of our own. On a CPU without instructions for products of bf16,
torch's bf16 linear reaches 13 GFLOP/s where its fp32 one reaches 75 (two Zen 3 cores): there the products are made in
fp32, in which hardware with such instructions sums them too. On one with such instructions, torch keeps code for every
number of rows that it has met, some 0.6 MB a product: rows come in few numbers.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longllava.ops.dispatch import constant_when_traced
from longllava.ops.few_rows import few_rows_linear
from longllava.ops.vision import activate_, linear_activated

MANY = 16  # rows from which widening the weights pays; below, reading them takes all the time


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return few_rows_linear(x, self.weight, self.bias)
        if better_in_fp32(x, self.weight) and x.numel() >= MANY * self.in_features:
            return F.linear(x.float(), self.weight.float(), widened(self.bias)).to(x.dtype)
        return product(x, self.weight, self.bias)

    def activated(self, x: Tensor, activation: str) -> Tensor:
        """The activation of this layer's output, in one pass where there is a kernel. Without gradients."""
        if x.device.type != "cpu":
            return linear_activated(x, self.weight, self.bias, activation)
        return activate_(self(x), activation)


class Conv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        if better_in_fp32(x, self.weight):
            return self._conv_forward(x.float(), self.weight.float(), widened(self.bias)).to(x.dtype)
        return super().forward(x)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b; on a CPU products of 16 bits get more rows, of zeros, so that only few numbers of rows are met.

    generate() of 1 to 600 words left nano's process with 1.4 GB, now with 0.5 (torch 2.13, AMX). Not where gradients
    are wanted, which would keep those rows; a stage's rows are of one length. Nor where torch.compile looks on,
    which would trace the layer anew for each number of rows.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    rows = x.shape[:-1].numel()
    more = rounded_up(rows) - rows
    if more == 0 or x.device.type != "cpu" or product_dtype(x).itemsize > 2:
        return F.linear(x, weight, bias)
    y = F.linear(F.pad(x.reshape(rows, -1), (0, 0, 0, more)), weight, bias)
    return y[:rows].view(*x.shape[:-1], -1)


def rounded_up(rows: int) -> int:
    """To four binary digits, by at most 63: an eighth more at most, and 80 numbers up to 2,048."""
    step = 1 << min(6, max(0, rows.bit_length() - 4))
    return -(-rows // step) * step


def product_dtype(x: Tensor) -> torch.dtype:
    """In which a CPU multiplies x: under autocast not its own."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def widened(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()


def better_in_fp32(x: Tensor, weight: Tensor) -> bool:
    """Whether this device multiplies these two faster as fp32. Not where gradients are wanted, which would
    keep them so."""
    if x.device.type != "cpu" or x.dtype != weight.dtype or torch.is_grad_enabled():
        return False
    return not has_products(x.dtype)


@constant_when_traced
def has_products(dtype: torch.dtype) -> bool:
    """Whether torch has instructions for products of this dtype on this CPU; True where it cannot say."""
    return _has_products(dtype)


@functools.cache
def _has_products(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return True
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True
