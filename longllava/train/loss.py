"""Next-token loss where something is learned, without ever holding all positions' logits.

40,960 positions x 65,536 words in fp32 are 10.7 GB. Only labelled positions get logits, a chunk at a time,
and the backward pass makes each chunk's logits again.
Shapes: B rows, L tokens, D width, P labelled positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longllava.data.packing import IGNORED

CHUNK = 2048  # positions; 512 MiB of fp32 logits at 65,536 words


@dataclass
class AnswerLoss:
    """total: sum of -log p over labelled positions, fp32. n_right: how many had the highest logit.

    of_group, n_of_group: sums and numbers of labels by group, empty without groups.
    """

    total: Tensor
    n_right: Tensor
    n_labels: int
    of_group: Tensor
    n_of_group: Tensor


def answer_loss(
    logits_of: Callable[[Tensor], Tensor], hidden_BLD: Tensor, labels_BL: Tensor, chunk: int = CHUNK,
    groups_BL: Tensor | None = None, n_groups: int = 0,
) -> AnswerLoss:  # fmt: skip
    """Cross-entropy of labels_BL (-100 = none), summed. logits_of: (P, D) -> (P, vocabulary).

    groups_BL: int64, below n_groups; whose sums are given too.

    With no labels the total is a zero that still has a gradient: every process takes part in backward.
    """
    learned_BL = labels_BL != IGNORED
    hidden_PD, labels_P = hidden_BLD[learned_BL], labels_BL[learned_BL]
    total = hidden_PD.float().sum() * 0 if len(labels_P) == 0 else hidden_PD.new_zeros((), dtype=torch.float32)
    n_right = torch.zeros((), dtype=torch.int64, device=labels_BL.device)
    groups_P = None if groups_BL is None else groups_BL[learned_BL]
    of_group = torch.zeros(n_groups, device=labels_BL.device)

    def chunk_loss(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = logits_of(hidden).float()
        right = (logits.detach().argmax(-1) == labels).sum()
        losses = F.cross_entropy(logits, labels, reduction="none")
        return losses.sum(), right, losses.detach()

    for at in range(0, len(labels_P), chunk):
        inputs = hidden_PD[at : at + chunk], labels_P[at : at + chunk]
        loss, right, losses = checkpoint(chunk_loss, *inputs, use_reentrant=False, preserve_rng_state=False)
        total = total + loss
        n_right = n_right + right
        if groups_P is not None:
            of_group.index_add_(0, groups_P[at : at + chunk], losses)
    n_of_group = torch.zeros(0) if groups_P is None else torch.bincount(groups_P, minlength=n_groups)
    return AnswerLoss(total, n_right, len(labels_P), of_group, n_of_group)
