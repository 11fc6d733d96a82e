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
    layout: str = "split"  # u and z two halves of one tensor; or "whole", or "transposed" (last stride not 1)
    source: str = ""  # the model this call comes from

    def __str__(self) -> str:
        return self.name

    def inputs(self, seed: int = 0) -> tuple[Any, ...]:
        """Arguments in NAMES' order. NaN stands at padding."""
        random = torch.Generator().manual_seed(seed)

        def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(*shape, generator=random).to(dtype)

        shape = (self.batch, self.length, self.channels)
        if self.layout == "split":
            u, z = normal(*shape[:2], 2 * self.channels, dtype=self.dtype).chunk(2, -1)
        else:
            u, z = normal(*shape, dtype=self.dtype), normal(*shape, dtype=self.dtype)
        delta = normal(*shape, dtype=self.dtype) - 1
        if not self.softplus:
            delta = delta.abs()
        # as a trained model has them: from slow to fast states, some 1 to N
        decay_EN = -torch.arange(1, self.n_states + 1) * (0.5 + torch.rand(self.channels, 1, generator=random))
        B, C = normal(*shape[:2], 2 * self.n_states, dtype=self.dtype).chunk(2, -1)
        D, bias = normal(self.channels), normal(self.channels) * 0.3
        state = normal(self.batch, self.channels, self.n_states)
        if self.layout == "transposed":
            u, delta, z, B = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (u, delta, z, B))
            decay_EN = decay_EN.t().contiguous().t()
        seq_idx = sample_seq_idx(self.packing, self.batch, self.length, random)
        if seq_idx is not None:
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
