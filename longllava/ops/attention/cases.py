"""One table of attention calls for parity tests, gradients and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longllava.ops.attention.reference import visible
from longllava.ops.sequences import sample_seq_idx


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call. `packing` is a kind of sample_seq_idx, for the keys; the queries have that of the last keys."""

    name: str
    n_queries: int
    n_keys: int
    n_heads: int
    n_groups: int
    head_dim: int
    batch: int = 1
    causal: bool = True
    packing: str | None = None
    dtype: torch.dtype = torch.float32
    directions: tuple[bool, ...] = (False, True)  # what a benchmark times: forward, backward

    def __str__(self) -> str:
        return f"{self.name}-{str(self.dtype).removeprefix('torch.')}"

    def seq_idx(self, device: str = "cpu") -> tuple[Tensor | None, Tensor | None]:
        """seq_idx of the queries (B, L) and of the keys (B, S)."""
        keys_BS = sample_seq_idx(self.packing, self.batch, self.n_keys, torch.Generator().manual_seed(0))
        if keys_BS is None:
            return None, None
        return keys_BS[:, self.n_keys - self.n_queries :].to(device), keys_BS.to(device)

    def inputs(self, seed: int = 0, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, standard normal, made where they will be used."""
        random = torch.Generator(device).manual_seed(seed)
        shapes = ((self.n_queries, self.n_heads), (self.n_keys, self.n_groups), (self.n_keys, self.n_groups))
        q, k, v = (
            torch.randn(self.batch, length, heads, self.head_dim, generator=random, device=device).to(self.dtype)
            for length, heads in shapes
        )
        return q, k, v

    def multiplications(self) -> int:
        """Of the forward pass: one score and one weighted value a visible pair. Backward takes 2.5 times as many."""
        seq_idx_q, seq_idx_k = self.seq_idx()
        if seq_idx_k is None:  # without a table of pairs, which a long prompt has no room for
            pairs = self.n_queries * self.n_keys
            if self.causal:
                pairs -= self.n_queries * (self.n_queries - 1) // 2
            return 2 * self.batch * self.n_heads * self.head_dim * pairs
        seen = visible(self.n_queries, self.n_keys, self.causal, seq_idx_q, seq_idx_k, torch.device("cpu"))
        return 2 * self.n_heads * self.head_dim * int(seen.sum()) * (self.batch if seen.shape[0] == 1 else 1)


def _small() -> tuple[Case, ...]:
    """Lengths around the sizes of vectors, tiles and blocks, with every group size and kind of packing."""
    groups, head_dims = ((1, 1), (2, 1), (4, 1), (4, 4), (6, 2)), (8, 20, 64, 128)
    packings = (None, "packed", "left", "right", "middle", "wild")
    shapes = [(n, n + extra) for n in (0, 1, 2, 3, 63, 65, 130) for extra in (0, 1, 37, 200)]
    cases = []
    for i, (n_queries, n_keys) in enumerate(shapes):
        n_heads, n_groups = groups[i % len(groups)]
        for dtype in (torch.float32, torch.bfloat16):
            cases.append(
                Case(
                    name=f"{n_queries}of{n_keys}",
                    n_queries=n_queries,
                    n_keys=n_keys,
                    n_heads=n_heads,
                    n_groups=n_groups,
                    head_dim=head_dims[(i + i // 4) % len(head_dims)],
                    batch=2,
                    causal=i % 7 != 3,
                    packing=packings[(i + i // 6) % len(packings)],
                    dtype=dtype,
                )
            )
    return tuple(cases)


CASES = (
    *_small(),
    # keys split over tasks: decode, a short question, and its merge
    Case(name="split-decode", n_queries=1, n_keys=5000, n_heads=4, n_groups=2, head_dim=64),
    Case(name="split-decode", n_queries=1, n_keys=5000, n_heads=4, n_groups=2, head_dim=64, dtype=torch.bfloat16),
    Case(
        name="split-question", batch=2, n_queries=20, n_keys=3100, n_heads=4, n_groups=2, head_dim=64, packing="middle"
    ),
    # one query whose heads alone are more than a tile's least rows
    Case(name="heads", n_queries=1, n_keys=10, n_heads=49, n_groups=1, head_dim=16),
    # so many keys that tiles and blocks are larger: 520 rows a group, keys that end within a block
    Case(name="long", n_queries=130, n_keys=8261, n_heads=4, n_groups=1, head_dim=20, dtype=torch.bfloat16),
    Case(name="long", n_queries=130, n_keys=8261, n_heads=4, n_groups=1, head_dim=8, packing="middle"),
    # more than one chunk of keys in the backward pass
    Case(name="wild", batch=2, n_queries=300, n_keys=420, n_heads=4, n_groups=2, head_dim=64, packing="wild"),
    Case(name="chunks", n_queries=700, n_keys=1200, n_heads=2, n_groups=1, head_dim=64),
    Case(name="packed", n_queries=1100, n_keys=1100, n_heads=2, n_groups=2, head_dim=64, packing="middle"),
)

# What the library spends its time on. nano: 36 tokens a picture, 1,000 pictures; 9b: LongLLaVA-9B's layers.
BENCHMARKS = (
    Case(
        name="nano-last-chunk",
        n_queries=2048,
        n_keys=38_000,
        n_heads=4,
        n_groups=2,
        head_dim=64,
        dtype=torch.bfloat16,
        directions=(False,),
    ),
    Case(
        name="nano-decode",
        n_queries=1,
        n_keys=40_000,
        n_heads=4,
        n_groups=2,
        head_dim=64,
        dtype=torch.bfloat16,
        directions=(False,),
    ),
    Case(name="nano-training", n_queries=4096, n_keys=4096, n_heads=4, n_groups=2, head_dim=64, packing="packed"),
    Case(name="one-long-sample", n_queries=2048, n_keys=2048, n_heads=4, n_groups=2, head_dim=64),
    Case(
        name="9b-chunk",
        n_queries=1024,
        n_keys=8192,
        n_heads=32,
        n_groups=8,
        head_dim=128,
        dtype=torch.bfloat16,
        directions=(False,),
    ),
)

_9B = Case(name="9b", n_queries=8192, n_keys=36_000, n_heads=32, n_groups=8, head_dim=128, dtype=torch.bfloat16,
           directions=(False,))  # fmt: skip
GPU_BENCHMARKS = (
    replace(_9B, name="8,192 of 8,192", n_keys=8192, directions=(False, True)),
    replace(_9B, name="8,192 of 36,000"),
    replace(_9B, name="8,192 of 144,000", n_keys=144_000),
    replace(_9B, name="1 of 100,000", n_queries=1, n_keys=100_000),
    replace(_9B, name="nano, 2,048 of 36,000", n_queries=2048, n_heads=4, n_groups=2, head_dim=64),
)
