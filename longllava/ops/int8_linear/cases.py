"""Calls of the int8 linear layer: ugly ones that tests check, real ones that benchmarks time (after checking)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longllava.ops.quantized import quantize


@dataclass(frozen=True)
class Case:
    """One call. experts: 0 is the plain form; else rows are dealt to experts unevenly, the second one gets none.

    outliers: every 16th input is so much larger than the others (Jamba's activations reach 4e6).
    """

    name: str
    rows: int = 33
    inputs: int = 80
    outputs: int = 40
    dtype: torch.dtype = torch.float32
    bias: bool = True
    mode: str = "dynamic"
    quantized: bool = False
    experts: int = 0
    outliers: float = 1.0
    source: str = ""

    def __str__(self) -> str:
        return self.name

    def inputs_of(self, device: str = "cpu") -> tuple[Any, ...]:
        """(x, weight, scale, bias, x_scale, offsets, mode, dtype), as backends take them."""
        generator = torch.Generator().manual_seed(0)

        def make(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        x_TK = make(self.rows, self.inputs)
        x_TK[:, ::16] *= self.outliers
        experts = (self.experts,) if self.experts else ()
        weight, scale = quantize(make(*experts, self.outputs, self.inputs) * max(1, self.inputs) ** -0.5)
        bias = make(*experts, self.outputs).to(self.dtype) if self.bias else None
        offsets = self.offsets() if self.experts else None
        x_TK, x_scale = x_TK.to(self.dtype), None
        if self.quantized:
            x_TK, x_scale = quantize(x_TK)
        tensors = [x_TK, weight, scale, bias, x_scale, offsets]
        return *(None if x is None else x.to(device) for x in tensors), self.mode, self.dtype

    def offsets(self) -> Tensor:
        weights = torch.arange(self.experts, 0, -1).double()
        if self.experts > 1:
            weights[1] = 0
        ends = (weights.cumsum(0) / weights.sum() * self.rows).round()
        return torch.cat([torch.zeros(1), ends]).int()


CASES = (
    Case("plain"),
    Case("one-row", rows=1),
    Case("no-rows", rows=0),
    Case("no-outputs", outputs=0),
    Case("no-inputs", inputs=0),
    Case("odd", rows=7, inputs=37, outputs=19),
    Case("one-of-each", rows=1, inputs=1, outputs=1),
    Case("two-tiles", rows=70, inputs=300, outputs=130, bias=False),
    Case("bf16", dtype=torch.bfloat16, inputs=192, outputs=100),
    Case("fp16", dtype=torch.float16, rows=5),
    Case("quantised", quantized=True, dtype=torch.bfloat16),
    Case("outliers-1e4", outliers=1e4),
    Case("outliers-4e6", outliers=4e6, dtype=torch.bfloat16),
    Case("weights", mode="weight_only"),
    Case("weights-one-row", mode="weight_only", rows=1, inputs=555, outputs=70),
    Case("weights-bf16", mode="weight_only", dtype=torch.bfloat16, rows=3, inputs=192, bias=False),
    Case("weights-bf16-odd", mode="weight_only", dtype=torch.bfloat16, rows=41, inputs=333, outputs=75),
    Case("weights-bf16-outliers", mode="weight_only", dtype=torch.bfloat16, rows=17, outliers=4e6),
    Case("weights-many-rows", mode="weight_only", rows=90),
    Case("experts", experts=4),
    Case("experts-odd", experts=5, rows=61, inputs=37, outputs=19, dtype=torch.bfloat16, bias=False),
    Case("experts-one-row", experts=3, rows=1, quantized=True),
    Case("experts-weights", experts=4, rows=9, mode="weight_only", inputs=300),
    Case("experts-weights-bf16", experts=4, rows=60, mode="weight_only", inputs=300, dtype=torch.bfloat16),
)

NANO, JAMBA = "configs/models/nano.yaml, in_proj and down_proj", "LongLLaVA-9B's config.json"
CLIP = "CLIP ViT-L/14 at 336, 64 pictures"
BENCHMARKS = (
    Case("nano-in", 8192, 192, 768, torch.bfloat16, False, source=NANO),
    Case("nano-down", 8192, 384, 192, torch.bfloat16, False, source=NANO),
    Case("9b-gate-up", 8192, 4096, 28672, torch.bfloat16, False, source=JAMBA),
    Case("9b-down", 8192, 14336, 4096, torch.bfloat16, False, source=JAMBA),
    Case("9b-in", 8192, 4096, 16384, torch.bfloat16, False, source=JAMBA),
    Case("9b-out", 8192, 8192, 4096, torch.bfloat16, False, source=JAMBA),
    Case("encoder-in", 36928, 1024, 3072, torch.bfloat16, False, source=CLIP),
    Case("encoder-down", 36928, 4096, 1024, torch.bfloat16, False, source=CLIP),
)
