"""Calls of the 3 x 3 convolution: tests make their own sizes of it, benchmarks time (after checking) the real ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    name: str = ""
    batch: int = 2
    inputs_outputs: tuple[int, int] = (32, 32)
    height: int = 8
    width: int = 8
    dtype: torch.dtype = torch.float32
    relu: bool = False

    def __str__(self) -> str:
        return self.name

    def inputs(self, seed: int = 0, device: str = "cpu") -> tuple[Any, ...]:
        """x, weight, bias, residual, relu; pictures in channels_last."""
        random = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=random, device=device)

        (n_inputs, n_outputs), size = self.inputs_outputs, (self.height, self.width)
        x, residual = normal(self.batch, n_inputs, *size), normal(self.batch, n_outputs, *size)
        weight, bias = normal(n_outputs, n_inputs, 3, 3) * (9 * n_inputs) ** -0.5, normal(n_outputs)
        x, residual = (t.to(self.dtype, memory_format=torch.channels_last) for t in (x, residual))
        return x, weight.to(self.dtype), bias.to(self.dtype), residual, self.relu

    def products(self) -> int:
        """Of numbers, without Winograd's transforms."""
        n_inputs, n_outputs = self.inputs_outputs
        return 9 * self.batch * self.height * self.width * n_inputs * n_outputs


# nano's stem on the 32 pictures that it encodes at a time: five such residual convolutions
BENCHMARKS = [
    Case("stem, 24 x 24", 32, (48, 48), 24, 24, relu=True),
    Case("stem, 12 x 12", 32, (128, 128), 12, 12, relu=True),
]
