"""The alignment aid: pictures are drawn to their caption's telling words, and to nothing else."""

from __future__ import annotations

import math

import torch

from longllava.train.alignment import alignment_loss

COMMON_WORD, NAMES, COLOURS = 1, (10, 11, 12, 13), (20, 21, 20, 21)


def batch(n: int = 4):
    """One row of n samples, each a picture of 2 tokens and a caption of a common word, a name and a colour."""
    spans = torch.tensor([[0, 5 * i, 2, i] for i in range(n)])
    labels = torch.full((1, 5 * n), -100)
    for i in range(n):
        labels[0, 5 * i + 2 : 5 * i + 5] = torch.tensor([COMMON_WORD, NAMES[i], COLOURS[i]])
    seq_idx = torch.arange(n, dtype=torch.int32).repeat_interleave(5)[None]
    return spans, labels, seq_idx


def test_training_on_it_brings_pictures_to_their_words():
    torch.manual_seed(0)
    words = torch.randn(30, 16)
    images = torch.randn(4, 2, 16, requires_grad=True)
    spans, labels, seq_idx = batch()
    optimizer = torch.optim.Adam([images], lr=0.05)
    for _ in range(200):
        loss = alignment_loss(images, spans, labels, seq_idx, words)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    cosine = torch.nn.functional.cosine_similarity(images.detach().mean(1)[:, None], words[None], dim=-1)
    for i in range(4):
        nearest = set(cosine[i].topk(2).indices.tolist())
        assert nearest == {NAMES[i], COLOURS[i]}
        assert cosine[i, NAMES[i]] > cosine[i, COLOURS[i]]  # the rarer word weighs more


def test_the_loss_is_what_its_words_say():
    """Against loops over tokens and words."""
    torch.manual_seed(1)
    words, images = torch.randn(30, 16), torch.randn(4, 2, 16)
    spans, labels, seq_idx = batch()
    score = 20 * torch.nn.functional.cosine_similarity(images[:, :, None], words, dim=-1)  # picture, token, word
    weights = {**{name: math.log(4) for name in NAMES}, 20: math.log(2), 21: math.log(2)}
    by_picture = 0.0
    for i in range(4):
        said = (NAMES[i], COLOURS[i])
        log_p = {w: (score[i, :, w] - score[i].logsumexp(-1)).mean() for w in said}
        by_picture -= sum(weights[w] * log_p[w] for w in said) / sum(weights[w] for w in said) / 4
    by_word = 0.0
    for w in weights:
        shows = [i for i in range(4) if w in (NAMES[i], COLOURS[i])]
        by_word -= (score[shows, :, w].logsumexp((0, 1)) - score[:, :, w].logsumexp((0, 1))) / len(weights)
    loss = alignment_loss(images, spans, labels, seq_idx, words)
    torch.testing.assert_close(loss, by_picture + by_word)


def test_samples_of_several_pictures_and_batches_without_captions_are_left_out():
    spans, labels, seq_idx = batch()
    words, images = torch.randn(30, 16), torch.randn(4, 2, 16)
    assert alignment_loss(images, spans, torch.full_like(labels, -100), seq_idx, words) is None
    together = torch.zeros_like(seq_idx)
    assert alignment_loss(images, spans, labels, together, words) is None


def test_samples_in_other_rows_with_the_same_number_are_not_mixed_up():
    words, images = torch.randn(30, 16), torch.randn(4, 2, 16)
    spans, labels, seq_idx = batch()
    one_row = alignment_loss(images, spans, labels, seq_idx, words)
    rows = torch.stack([labels[0, :10], labels[0, 10:]])
    split_spans = torch.tensor([[i // 2, 5 * (i % 2), 2, i] for i in range(4)])
    split = torch.tensor([[0] * 5 + [1] * 5] * 2, dtype=torch.int32)
    torch.testing.assert_close(alignment_loss(images, split_spans, rows, split, words), one_row)
