"""Calls of the selective scan: ugly ones that tests check, real ones that benchmarks time (after checking)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from longllava.ops.sequences import poison_padding_, sample_seq_idx

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus", "state", "seq_idx")


@dataclass(frozen=True)
class Case:
    """One call. `packing` is a kind of sample_seq_idx."""

    name: str
    batch: int = 1
    length: int = 63
    channels: int = 40
    n_states: int = 16
    dtype: torch.dtype = torch.float32
    gate: bool = True
    delta_bias: bool = True
    softplus: bool = True
    skip: bool = True
    state: bool = True
    packing: str | None = None
    steps: float = -1.0  # mean of delta: softplus(-1) forgets within a few tokens, softplus(-6) hardly in a hundred
    layout: str = "split"  # u and z two halves of one tensor; or "whole", or "transposed" (last stride not 1)
    source: str = ""  # the model this call comes from

    def __str__(self) -> str:
        return self.name

    def inputs(self, seed: int = 0, device: str = "cpu") -> tuple[Any, ...]:
        """Arguments in NAMES' order, made where they will be used. NaN stands at padding."""
        random = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(*shape, generator=random, device=device).to(dtype)

        shape = (self.batch, self.length, self.channels)
        if self.layout == "split":
            u, z = normal(*shape[:2], 2 * self.channels, dtype=self.dtype).chunk(2, -1)
        else:
            u, z = normal(*shape, dtype=self.dtype), normal(*shape, dtype=self.dtype)
        delta = normal(*shape, dtype=self.dtype) + self.steps
        if not self.softplus:
            delta = delta.abs()
        # as a trained model has them: from slow to fast states, some 1 to N
        spread_E1 = 0.5 + torch.rand(self.channels, 1, generator=random, device=device)
        decay_EN = -torch.arange(1, self.n_states + 1, device=device) * spread_E1
        B, C = normal(*shape[:2], 2 * self.n_states, dtype=self.dtype).chunk(2, -1)
        D, bias = normal(self.channels), normal(self.channels) * 0.3
        state = normal(self.batch, self.channels, self.n_states)
        if self.layout == "transposed":
            u, delta, z, B = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (u, delta, z, B))
            decay_EN = decay_EN.t().contiguous().t()
        seq_idx = sample_seq_idx(self.packing, self.batch, self.length, torch.Generator().manual_seed(seed))
        if seq_idx is not None:
            seq_idx = seq_idx.to(device)
            for x in (u, delta, z, B, C):
                poison_padding_(x, seq_idx)
        return (
            u,
            delta,
            decay_EN,
            B,
            C,
            D if self.skip else None,
            z if self.gate else None,
            bias if self.delta_bias else None,
            self.softplus,
            state if self.state else None,
            seq_idx,
        )


PLAIN = Case("plain", batch=2)
CASES = (
    PLAIN,
    replace(PLAIN, name="empty", length=0),
    replace(PLAIN, name="no-rows", batch=0, length=5),
    replace(PLAIN, name="one-token", length=1),
    replace(PLAIN, name="two-tokens", length=2, n_states=4),
    replace(PLAIN, name="three-tokens", length=3, channels=1, n_states=1),
    replace(PLAIN, name="chunk-and-one", length=65, channels=8, n_states=17),
    replace(PLAIN, name="two-tiles", batch=1, length=33, channels=150, n_states=3),
    replace(PLAIN, name="many-states", batch=1, length=9, channels=5, n_states=200),
    replace(PLAIN, name="tiles-of-many-states", batch=1, length=3, channels=100, n_states=200),
    replace(PLAIN, name="small-steps", length=300, channels=24, steps=-6.0),
    replace(PLAIN, name="bare", gate=False, delta_bias=False, softplus=False, skip=False, state=False),
    replace(PLAIN, name="ungated-softplus", gate=False, delta_bias=False),
    replace(PLAIN, name="transposed", layout="transposed"),
    replace(PLAIN, name="bf16", dtype=torch.bfloat16, channels=24, length=40),
    replace(PLAIN, name="fp16", dtype=torch.float16, layout="whole"),
    replace(PLAIN, name="bf16-wild", dtype=torch.bfloat16, packing="wild"),
    replace(PLAIN, name="left", packing="left"),
    replace(PLAIN, name="middle", packing="middle", n_states=4),
    replace(PLAIN, name="right", packing="right", length=65),
    replace(PLAIN, name="packed", packing="packed", length=70),
    replace(PLAIN, name="wild", packing="wild", batch=3, length=70),
    replace(PLAIN, name="wild-one-token", packing="wild", batch=3, length=1),
)

# E = 1024, L = 2048 is the size this library quotes; nano and decode are what its own models do
BENCHMARKS = (
    Case("prefill", length=2048, channels=1024, state=False, source="the quoted size"),
    Case("prefill-bf16", length=2048, channels=1024, state=False, dtype=torch.bfloat16),
    Case("prefill-nano", length=2048, channels=512, dtype=torch.bfloat16, source="nano, one chunk of a prompt"),
    Case("prefill-9b", length=256, channels=8192, dtype=torch.bfloat16, source="LongLLaVA-9B, 256 tokens"),
    Case("packed-nano", length=2048, channels=512, dtype=torch.bfloat16, packing="packed", source="nano, training"),
    Case("decode-nano", length=1, channels=512, source="nano, one token"),
)

_9B = Case("9b", channels=8192, state=False, dtype=torch.bfloat16, source="LongLLaVA-9B")
GPU_BENCHMARKS = (
    replace(_9B, name="2,048", length=2048),
    replace(_9B, name="36,000", length=36_000, source="LongLLaVA-9B, 1,000 pictures of 36 tokens"),
    replace(_9B, name="36,864", length=36_864, source="a multiple of 2,048: mamba-ssm's fast path"),
    replace(_9B, name="147,000", length=147_000, source="LongLLaVA-9B, 1,000 pictures of 144 tokens and tags"),
    replace(_9B, name="36,864-packed", length=36_864, packing="packed", source="LongLLaVA-9B, training"),
    replace(_9B, name="8x4,096", batch=8, length=4096, source="LongLLaVA-9B, a batch"),
    replace(_9B, name="1,536-wide", length=36_000, channels=1536, source="a small Mamba: time must be cut"),
    replace(_9B, name="nano", length=36_000, channels=512, source="nano, 1,000 pictures"),
    replace(_9B, name="one-token", length=1, state=True, source="LongLLaVA-9B, decoding"),
    replace(_9B, name="one-token-of-64", batch=64, length=1, state=True, source="LongLLaVA-9B, decoding 64 rows"),
)
