"""A score is what the whole prompt gives; answers of any length are scored in parts, which changes but the memory."""

import pytest
import torch

from longllava.generation import scoring
from longllava.inputs.chat import Answer
from longllava.nn import Context
from tests.generation.test_session import MODEL, PICTURES
from tests.live_bytes import LiveBytes

ANSWER = "the red heart of what is this? " * 20


@torch.inference_mode()
def test_score_is_the_log_probability_of_each_token():
    question, answer = "what is this?", "red heart"
    pieces, sources = MODEL.pieces(question, PICTURES[:2], None, MODEL.fresh(64))
    score = MODEL.score(question, answer, PICTURES[:2])
    asked = MODEL.processor.encode_pieces(pieces)
    ids = MODEL.processor.encode_pieces([*pieces, Answer(answer)]).ids[len(asked.ids) : -1]
    images = MODEL.model.image_tokens(MODEL.model.encode(MODEL.processor.pixels(sources)))
    spans = torch.tensor([(0, span.start, span.length, span.image) for span in asked.spans])
    hidden, _ = MODEL.model(MODEL.model.embed(torch.tensor([asked.ids + ids]), spans, images), Context())
    expected = torch.log_softmax(MODEL.model.logits(hidden[0, len(asked.ids) - 1 : -1]), -1)[range(len(ids)), ids]
    assert score.log_probabilities == pytest.approx(expected.tolist(), abs=1e-4)
    assert score.log_probability == pytest.approx(float(expected.sum()), abs=1e-4)
    assert not score.exact
    assert MODEL.session(images=PICTURES[:2]).score(question, answer).log_probabilities == pytest.approx(
        score.log_probabilities, abs=1e-4
    )


def test_the_greedy_answer_scores_exact():
    album = MODEL.session(images=PICTURES)
    answers = {album.ask(question, max_new_tokens=1) for question in "abcdefgh"}
    letters = [answer for answer in answers if answer.isalnum()]
    assert letters
    for answer in letters:
        scores = [album.score(question, answer) for question in "abcdefgh"]
        assert [s.exact for s in scores] == [album.ask(q, max_new_tokens=1) == answer for q in "abcdefgh"]


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
