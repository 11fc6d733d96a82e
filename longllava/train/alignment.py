"""Training aid: image tokens are drawn to the word embeddings of their caption.

Every token of a picture is compared with every word embedding: the caption's words should be the nearest to
it, and among the batch's tokens those of the pictures that show a thing the nearest to its name (both
directions, as in CLIP, arXiv 2103.00020). A frozen language model's next-token loss reaches the bridge through
all its layers and says this only faintly at first; here it is said directly. A word counts by how rare it is
among the batch's captions (the log of one over its share), so that a name weighs more than a colour; words
that stand in more than half of the captions tell nothing and are left out. A setting, off by default, named in
the model card where it was on.
Shapes: N images, M tokens an image, D width, S spans, P labelled positions, V vocabulary, B rows, L tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longllava.data.packing import IGNORED

SHARPNESS = 20.0  # of cosines; a caption of five words reaches cos 0.45 with each of them
COMMON = 0.5


def alignment_loss(
    images_NMD: Tensor, spans_S4: Tensor, labels_BL: Tensor, seq_idx_BL: Tensor, words_VD: Tensor
) -> Tensor | None:
    """Mean over samples of one picture of -log p(word | token), over its caption's words by rarity, plus the
    mean over words of -log p(token of a picture that shows it | word).

    None when no sample has just one picture and a telling word.
    """
    row_S, start_S, image_S = spans_S4[:, 0], spans_S4[:, 1], spans_S4[:, 3]
    n_samples = int(seq_idx_BL.max()) + 1
    sample_S = row_S * n_samples + seq_idx_BL[row_S, start_S]
    single_S = torch.bincount(sample_S, minlength=labels_BL.shape[0] * n_samples)[sample_S] == 1
    sample_S, image_S = sample_S[single_S], image_S[single_S]

    row_P, at_P = (labels_BL != IGNORED).nonzero(as_tuple=True)
    sample_P = row_P * n_samples + seq_idx_BL[row_P, at_P]
    said = torch.zeros(labels_BL.shape[0] * n_samples, len(words_VD), device=labels_BL.device)
    said[sample_P, labels_BL[row_P, at_P]] = 1.0
    said_SV = said[sample_S]
    share_V = said_SV.mean(0)
    said_SV = said_SV * torch.where(share_V <= COMMON, -share_V.clamp(min=1e-6).log(), 0.0)
    told_S = said_SV.sum(-1) > 0
    if not told_S.any():
        return None
    said_SV, tokens_SMD = said_SV[told_S], images_NMD[image_S[told_S]].float()
    score_SMV = F.normalize(tokens_SMD, dim=-1) @ F.normalize(words_VD.float(), dim=-1).T * SHARPNESS
    log_p_SV = torch.log_softmax(score_SMV, dim=-1).mean(1)
    loss = -((log_p_SV * said_SV).sum(-1) / said_SV.sum(-1)).mean()
    words = said_SV.any(0)
    score_SMW, shows_SW = score_SMV[..., words], said_SV[:, words] > 0
    right_W = score_SMW.masked_fill(~shows_SW[:, None], -torch.inf).logsumexp((0, 1))
    return loss + (score_SMW.logsumexp((0, 1)) - right_W).mean()
