"""Attention supervision: what a marked query's loss is, by hand."""

from __future__ import annotations

import torch

from longllava.nn import Context
from longllava.nn.attention import report_grounding

B, L, H, G, K = 2, 12, 4, 2, 8


def tensors() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    q_BLHK = torch.randn(B, L, H, K, generator=generator, dtype=torch.float64)
    k_BLGK = torch.randn(B, L, G, K, generator=generator, dtype=torch.float64)
    return q_BLHK.float().requires_grad_(), k_BLGK.float().requires_grad_()


def report(q_BLHK, k_BLGK, marks, seq_idx_BL=None) -> dict[str, torch.Tensor]:
    ctx = Context(seq_idx_BL, grounding_G4=torch.tensor(marks))
    report_grounding(ctx, q_BLHK, k_BLGK)
    return ctx.losses


def mass(q_BLHK, k_BLGK, row: int, query: int, head: int, keys: list[int], first: int = 0) -> torch.Tensor:
    """The share of one query's attention on `keys`, over the keys first .. query."""
    logits_S = k_BLGK[row, first : query + 1, head * G // H] @ q_BLHK[row, query, head] * K**-0.5
    return logits_S.softmax(0)[[key - first for key in keys]].sum()


def test_one_mark_is_minus_log_of_the_mass_on_its_span() -> None:
    q_BLHK, k_BLGK = tensors()
    losses = report(q_BLHK, k_BLGK, [[1, 9, 2, 5]])
    masses = torch.stack([mass(q_BLHK, k_BLGK, 1, 9, head, [2, 3, 4]) for head in range(4)])
    torch.testing.assert_close(losses["grounding"], -masses.log().mean())
    torch.testing.assert_close(losses["grounding_mass"], masses.mean().detach())


def test_masses_of_one_query_are_added_before_the_log() -> None:
    q_BLHK, k_BLGK = tensors()
    # query 9 has three marks, two of which overlap; query 7 has one; the other row has one
    marks = [[0, 9, 1, 3], [0, 7, 0, 2], [0, 9, 6, 8], [1, 5, 4, 5], [0, 9, 2, 4]]
    losses = report(q_BLHK, k_BLGK, marks)
    evidence = [(0, 9, [1, 2, 3, 6, 7]), (0, 7, [0, 1]), (1, 5, [4])]
    masses = torch.stack([mass(q_BLHK, k_BLGK, row, query, head, keys)
                          for row, query, keys in evidence for head in range(4)])  # fmt: skip
    torch.testing.assert_close(losses["grounding"], -masses.log().mean())
    expected = torch.autograd.grad(-masses.log().mean(), (q_BLHK, k_BLGK))
    torch.testing.assert_close(torch.autograd.grad(losses["grounding"], (q_BLHK, k_BLGK)), expected)


def test_attention_spread_over_all_evidence_costs_nothing() -> None:
    q_BLHK, k_BLGK = torch.zeros(B, L, H, K), torch.zeros(B, L, G, K)  # every key alike
    losses = report(q_BLHK, k_BLGK, [[0, 7, 0, 4], [0, 7, 4, 8]])  # both halves of what query 7 sees
    torch.testing.assert_close(losses["grounding"], torch.tensor(0.0))


def test_other_samples_and_later_keys_take_no_mass() -> None:
    q_BLHK, k_BLGK = tensors()
    seq_idx_BL = torch.tensor([[0] * 4 + [1] * 6 + [-1] * 2, [0] * 12], dtype=torch.int32)
    losses = report(q_BLHK, k_BLGK, [[0, 8, 5, 7], [0, 8, 7, 8]], seq_idx_BL)
    masses = torch.stack([mass(q_BLHK, k_BLGK, 0, 8, head, [5, 6, 7], first=4) for head in range(4)])
    torch.testing.assert_close(losses["grounding"], -masses.log().mean())
