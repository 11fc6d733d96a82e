"""Calls of the convolution of pixels: tests make their own sizes of it, benchmarks time (after checking) these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    name: str = ""
    batch: int = 2
    channels: int = 3
    height: int = 24
    width: int = 24
    outputs: int = 32
    kernel: int = 8
    stride: int = 4
    padding: int = 2
    dtype: torch.dtype = torch.float32
    relu: bool = False

    def __str__(self) -> str:
        return self.name

    def inputs(self, seed: int = 0, device: str = "cpu") -> tuple[Any, ...]:
        """pixels, mean, std, weight, bias, stride, padding, relu."""
        random = torch.Generator(device).manual_seed(seed)
        shape = (self.batch, self.channels, self.height, self.width)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=random, device=device)

        def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
            return (low + (high - low) * torch.rand(shape, generator=random, device=device)).to(self.dtype)

        mean, std = uniform(90, 130, self.channels), uniform(50, 80, self.channels)
        bound = (3 / (self.channels * self.kernel**2)) ** 0.5
        weight = uniform(-bound, bound, self.outputs, self.channels, self.kernel, self.kernel)
        return pixels, mean, std, weight, uniform(-1, 1, self.outputs), self.stride, self.padding, self.relu

    def products(self) -> int:
        """Of numbers."""
        rows, columns = (
            (size + 2 * self.padding - self.kernel) // self.stride + 1 for size in (self.height, self.width)
        )
        return self.batch * rows * columns * self.outputs * self.channels * self.kernel**2


# the first of nano's stem, 32 pictures at a time; CLIP's patches
BENCHMARKS = [
    Case("nano's stem", 32, 3, 96, 96, 48, 8, 4, 2, relu=True),
    Case("CLIP's patches", 4, 3, 336, 336, 1024, 14, 14, 0),
]
