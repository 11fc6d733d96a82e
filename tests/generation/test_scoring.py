"""Answers of any length are scored in parts, which changes nothing but the memory."""

import pytest

from longllava.generation import scoring
from tests.generation.test_session import MODEL
from tests.live_bytes import LiveBytes

ANSWER = "the red heart of what is this? " * 20


def test_a_long_answer_in_parts_scores_as_it_does_at_once(monkeypatch):
    whole = MODEL.score("a", ANSWER)
    monkeypatch.setattr(scoring, "POSITIONS", 3)
    for chunk_tokens in (1, 7, len(whole.log_probabilities) - 1, len(whole.log_probabilities)):
        parts = MODEL.score("a", ANSWER, chunk_tokens=chunk_tokens)
        assert parts.log_probabilities == pytest.approx(whole.log_probabilities, abs=1e-4)
    answer = MODEL.generate("a", max_new_tokens=6)
    assert [MODEL.score("a", text, chunk_tokens=2).exact for text in (answer, ANSWER)] == [True, False]


def test_memory_does_not_grow_with_the_answer(monkeypatch):
    """But for what attention keeps of each token, and a number a token in the end."""
    monkeypatch.setattr(scoring, "POSITIONS", 8)

    def peak(times):
        with LiveBytes() as live:
            MODEL.score("a", ANSWER * times, chunk_tokens=16)
        return live.peak

    peak(1)
    kept = sum(layer.buffer.keys_BSGK.shape[2:].numel() for layer in MODEL.session().state if hasattr(layer, "buffer"))
    n_tokens = len(MODEL.score("a", ANSWER).log_probabilities)
    assert peak(4) - peak(1) < 1.5 * 3 * n_tokens * (2 * 4 * kept + 8)
