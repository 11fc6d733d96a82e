"""The loss in chunks is the loss of all positions at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from longllava.data.packing import IGNORED
from longllava.train.loss import answer_loss

B, L, D, V = 2, 9, 6, 11


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden_BLD = torch.randn(B, L, D, requires_grad=True)
    weight_VD = torch.randn(V, D, requires_grad=True)
    labels_BL = torch.randint(0, V, (B, L))
    labels_BL[torch.rand(B, L) < 0.4] = IGNORED
    return hidden_BLD, weight_VD, labels_BL


@pytest.mark.parametrize("chunk", [1, 3, 4, 1000])
def test_chunked_loss_and_gradients_are_the_whole_ones(chunk: int) -> None:
    hidden_BLD, weight_VD, labels_BL = inputs()
    logits_of = lambda hidden: hidden @ weight_VD.T  # noqa: E731
    logits_BLV = logits_of(hidden_BLD)
    whole = F.cross_entropy(logits_BLV.view(-1, V), labels_BL.view(-1), ignore_index=IGNORED, reduction="sum")
    expected = torch.autograd.grad(whole, (hidden_BLD, weight_VD))
    loss = answer_loss(logits_of, hidden_BLD, labels_BL, chunk)
    torch.testing.assert_close(loss.total, whole)
    torch.testing.assert_close(torch.autograd.grad(loss.total, (hidden_BLD, weight_VD)), expected)
    learned_BL = labels_BL != IGNORED
    assert loss.n_labels == learned_BL.sum()
    assert loss.n_right == (logits_BLV.argmax(-1) == labels_BL)[learned_BL].sum()


def test_no_more_logits_than_a_chunk_exist_at_once() -> None:
    hidden_BLD, weight_VD, labels_BL = inputs()
    sizes = []

    def logits_of(hidden: torch.Tensor) -> torch.Tensor:
        sizes.append(len(hidden))
        return hidden @ weight_VD.T

    answer_loss(logits_of, hidden_BLD, labels_BL, chunk=4).total.backward()
    assert max(sizes) == 4
    assert sum(sizes) == 2 * (labels_BL != IGNORED).sum()  # once forward, once more in the backward pass


def test_nothing_to_learn_is_a_zero_with_gradients() -> None:
    hidden_BLD, weight_VD, labels_BL = inputs()
    loss = answer_loss(lambda hidden: hidden @ weight_VD.T, hidden_BLD, torch.full_like(labels_BL, IGNORED))
    assert loss.total == 0 and loss.n_labels == 0
    loss.total.backward()
    assert (hidden_BLD.grad == 0).all()


def test_loss_of_bfloat16_states_is_summed_in_fp32() -> None:
    hidden_BLD, weight_VD, labels_BL = inputs()
    low = hidden_BLD.detach().bfloat16()
    loss = answer_loss(lambda hidden: hidden @ weight_VD.bfloat16().T, low, labels_BL, chunk=2)
    assert loss.total.dtype == torch.float32
    logits = (low @ weight_VD.bfloat16().T).float()
    whole = F.cross_entropy(logits.view(-1, V), labels_BL.view(-1), ignore_index=IGNORED, reduction="sum")
    torch.testing.assert_close(loss.total, whole)
