"""Calls of the causal convolution: ugly ones that tests check, real ones that benchmarks time (after checking)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from longllava.ops.sequences import poison_padding_, sample_seq_idx

NAMES = ("x", "weight", "bias", "state", "seq_idx", "activation")


@dataclass(frozen=True)
class Case:
    """One call; `packing` and `layout` as in the selective scan's cases."""

    name: str
    batch: int = 1
    length: int = 63
    channels: int = 40
    n_taps: int = 4
    dtype: torch.dtype = torch.float32
    bias: bool = True
    state: bool = True
    activation: str | None = "silu"
    packing: str | None = None
    layout: str = "split"
    source: str = ""

    def __str__(self) -> str:
        return self.name

    def inputs(self, seed: int = 0, device: str = "cpu") -> tuple[Any, ...]:
        """Arguments in NAMES' order, made where they will be used. NaN stands at padding."""
        random = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=random, device=device)

        x = normal(self.batch, self.length, 2 * self.channels).to(self.dtype)
        x = x[..., : self.channels]
        if self.layout == "transposed":
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        weight, bias = normal(self.channels, self.n_taps), normal(self.channels)
        state = normal(self.batch, self.n_taps - 1, self.channels).to(self.dtype)
        seq_idx = sample_seq_idx(self.packing, self.batch, self.length, torch.Generator().manual_seed(seed))
        if seq_idx is not None:
            seq_idx = seq_idx.to(device)
            poison_padding_(x, seq_idx)
        return (
            x,
            weight,
            bias if self.bias else None,
            state if self.state else None,
            seq_idx,
            self.activation,
        )


PLAIN = Case("plain", batch=2)
CASES = (
    PLAIN,
    replace(PLAIN, name="empty", length=0),
    replace(PLAIN, name="no-rows", batch=0, length=5),
    replace(PLAIN, name="one-token", length=1),
    replace(PLAIN, name="two-tokens", length=2, channels=1),
    replace(PLAIN, name="three-tokens", length=3, n_taps=8),
    replace(PLAIN, name="one-tap", length=65, channels=8, n_taps=1),
    replace(PLAIN, name="two-taps-two-tiles", batch=1, length=33, channels=150, n_taps=2),
    replace(PLAIN, name="bare", bias=False, state=False, activation=None),
    replace(PLAIN, name="transposed", layout="transposed"),
    replace(PLAIN, name="bf16", dtype=torch.bfloat16, channels=24),
    replace(PLAIN, name="fp16", dtype=torch.float16, length=5),
    replace(PLAIN, name="bf16-wild", dtype=torch.bfloat16, packing="wild"),
    replace(PLAIN, name="left", packing="left", length=70),
    replace(PLAIN, name="middle", packing="middle", length=100),
    replace(PLAIN, name="right", packing="right"),
    replace(PLAIN, name="packed", packing="packed", length=70),
    replace(PLAIN, name="wild", packing="wild", batch=3, length=70, n_taps=3),
    replace(PLAIN, name="wild-no-state", packing="wild", batch=3, length=40, state=False, activation=None),
    replace(PLAIN, name="wild-one-token", packing="wild", batch=3, length=1),
)

BENCHMARKS = (
    Case("prefill", length=2048, channels=1024, state=False, source="as the selective scan's"),
    Case("prefill-bf16", length=2048, channels=1024, state=False, dtype=torch.bfloat16),
    Case("prefill-nano", length=2048, channels=512, dtype=torch.bfloat16, source="nano, one chunk of a prompt"),
    Case("packed-nano", length=2048, channels=512, dtype=torch.bfloat16, packing="packed", source="nano, training"),
    Case("decode-nano", length=1, channels=512, source="nano, one token"),
)

_9B = Case("9b", channels=8192, state=False, dtype=torch.bfloat16, source="LongLLaVA-9B")
GPU_BENCHMARKS = (
    replace(_9B, name="2,048", length=2048),
    replace(_9B, name="36,000", length=36_000, source="LongLLaVA-9B, 1,000 pictures of 36 tokens"),
    replace(_9B, name="36,000-state", length=36_000, state=True),
    replace(_9B, name="36,864-packed", length=36_864, packing="packed", source="LongLLaVA-9B, training"),
    replace(_9B, name="nano", length=36_000, channels=512, source="nano, 1,000 pictures"),
    replace(_9B, name="one-token", length=1, state=True, source="LongLLaVA-9B, decoding"),
)
