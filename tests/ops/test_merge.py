"""Attention in parts: keys and values in segments, merged, are the whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longllava.ops.attention import BACKENDS, attention, merge
from longllava.ops.attention.cases import CASES, Case
from tests.ops.test_attention import error


@settings(max_examples=25)
@given(data=st.data())
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_merged_segments_are_the_whole(backend, data):
    """Keys cut in pieces, each attended alone: the shared prefix not causally, the tail causally."""
    if reason := backend.why_not(*CASES[-1].inputs()):
        pytest.skip(reason)
    n_queries = data.draw(st.integers(1, 40))
    cuts = sorted(data.draw(st.lists(st.integers(0, 150), min_size=1, max_size=3)))
    case = Case(
        name="merge", batch=2, n_queries=n_queries, n_keys=cuts[-1] + n_queries, n_heads=4, n_groups=2, head_dim=20,
        packing=data.draw(st.sampled_from([None, "left", "packed", "wild"])),
    )  # fmt: skip
    q, k, v = case.inputs()
    seq_idx_q, seq_idx_k = case.seq_idx()
    whole = attention(q, k, v, seq_idx_q=seq_idx_q, seq_idx_k=seq_idx_k, return_lse=True, backend=backend.name)
    pieces = []
    for start, end in zip([0, *cuts], [*cuts, case.n_keys]):
        pieces.append(
            attention(
                q,
                k[:, start:end],
                v[:, start:end],
                causal=end == case.n_keys,
                seq_idx_q=seq_idx_q,
                seq_idx_k=None if seq_idx_k is None else seq_idx_k[:, start:end],
                return_lse=True,
                backend=backend.name,
            )
        )
    for name, got, truth in zip(("y", "lse"), merge(pieces), whole):
        assert error(got.double(), truth.double()) < 1e-5, name


def test_merge_has_gradients():
    case = Case(name="merge", n_queries=5, n_keys=9, n_heads=4, n_groups=2, head_dim=8)
    q, k, v = (x.requires_grad_() for x in case.inputs())
    tail = attention(q, k[:, 3:], v[:, 3:], return_lse=True)
    y, _ = merge([attention(q, k[:, :3], v[:, :3], causal=False, return_lse=True), tail])
    whole = attention(q, k, v)
    truth = torch.autograd.grad(whole.sum(), (q, k, v))
    for got, wanted in zip(torch.autograd.grad(y.sum(), (q, k, v)), truth):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
