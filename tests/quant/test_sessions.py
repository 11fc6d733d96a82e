"""An int8 model reads in pieces what it reads at once, and answers in a batch what it answers alone.

Scales belong to a token, so the products add no difference of their own: what is left is fp32's order of summation
elsewhere, and where that tips a value over a rounding, one step of one value.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longllava import LongLLaVA
from longllava.errors import InputError
from longllava.nn import Context
from longllava.quant import Int8Config, quantize_
from tests.kernels import needs_kernels
from tests.tiny import tiny_model, tiny_pictures

LENGTH = 48
MODELS = {
    (n_experts, two_terms): quantize_(
        tiny_model(n_experts).model, Int8Config(two_terms=("down_proj", "out_proj") if two_terms else ())
    )
    for n_experts in (1, 4)
    for two_terms in (False, True)
}


def read(model, x_BLD, cuts, int8_cache=False):
    session = LongLLaVA(model, tiny_model(1).tokenizer, kv_dtype="int8" if int8_cache else None).fresh()
    state = session.reader.empty_state(LENGTH, len(x_BLD))
    found = []
    with torch.inference_mode():
        for begin, end in zip([0, *cuts], [*cuts, LENGTH], strict=True):
            hidden_BLD, state = model(x_BLD[:, begin:end], Context(start=begin), state)
            found.append(hidden_BLD)
    return torch.cat(found, 1)


def nearly_equal(got, expected) -> bool:
    """Equal to rounding but for one token in ten, and there by no more than a step of one value makes."""
    difference_BL = (got - expected).abs().amax(-1)
    return (difference_BL < 1e-5).float().mean() >= 0.9 and difference_BL.max() < 2e-2


@given(
    kind=st.sampled_from(sorted(MODELS)), pieces=st.lists(st.integers(2, 20), min_size=1, max_size=8),
    int8_cache=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=25)
def test_pieces_are_the_whole(kind, pieces, int8_cache, seed):
    cuts = [cut for cut in torch.tensor(pieces).cumsum(0).tolist() if cut <= LENGTH - 2]
    x_BLD = torch.randn(1, LENGTH, 32, generator=torch.Generator().manual_seed(seed))
    model = MODELS[kind]
    assert nearly_equal(read(model, x_BLD, cuts, int8_cache), read(model, x_BLD, [], int8_cache))


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_rows_of_a_batch_are_each_alone(kind):
    x_BLD = torch.randn(5, LENGTH, 32)
    together = read(MODELS[kind], x_BLD, [20])
    for row in range(5):
        assert nearly_equal(together[row : row + 1], read(MODELS[kind], x_BLD[row : row + 1], [20]))


@needs_kernels  # whose bits do not depend on where a sequence is cut
def test_one_token_more_than_a_chunk_is_read_with_float_inputs():
    """Not the whole's bits, then: a piece of one token is decoding. Its difference is that of int8 inputs."""
    x_BLD = torch.randn(1, LENGTH, 32)
    whole, cut = (read(MODELS[1, False], x_BLD, cuts) for cuts in ([], [LENGTH - 1]))
    assert torch.equal(whole[:, :-1], cut[:, :-1])
    assert 1e-4 < (whole - cut)[:, -1].abs().max() < 0.3


def test_answers_in_batches_and_chunks():
    talker = LongLLaVA(MODELS[4, False], tiny_model(4).tokenizer)
    questions = ["what is this?", "a red heart", "of the", "is this the red heart of the red heart?"]
    alone = [talker.generate(q, max_new_tokens=6) for q in questions]
    assert talker.generate_batch(questions, max_new_tokens=6, batch_size=3) == alone
    pictures = tiny_pictures(4)
    album = talker.session(images=pictures)
    assert album.ask_many(questions, max_new_tokens=6) == [album.ask(q, max_new_tokens=6) for q in questions]
    for chunk_tokens in (5, 1000):
        one = talker.session(images=pictures, chunk_tokens=chunk_tokens)
        assert one.score("what is this?", "a red heart").log_probabilities == pytest.approx(
            album.score("what is this?", "a red heart").log_probabilities, abs=2e-2
        )


def test_sessions_of_int8_models_are_saved_and_kept_apart(tmp_path):
    talker = LongLLaVA(MODELS[4, False], tiny_model(4).tokenizer)
    session = talker.session(images=tiny_pictures(2))
    again = talker.load_session(session.save(tmp_path / "a.session"))
    assert again.score("what is this?", "a heart") == session.score("what is this?", "a heart")
    with pytest.raises(ValueError, match="made by another model"):
        tiny_model(4).load_session(tmp_path / "a.session")


def test_a_session_does_not_outlive_its_floats(tmp_path):
    """Quantised in place, the model would go on with what the other one had read, and a file would say it was its."""
    talker = tiny_model(1)
    session = talker.session(images=tiny_pictures(2))
    quantize_(talker.model)
    for use in (lambda: session.ask("what is this?"), lambda: session.save(tmp_path / "a"), session.fork):
        with pytest.raises(InputError, match="on cpu in torch.float32, which is on .* with int8 weights now; read"):
            use()
    assert talker.session(images=tiny_pictures(2)).ask("what is this?", max_new_tokens=2)


def test_a_session_outlives_how_the_scans_rows_became_int8(tmp_path):
    """Which kernel finds a row's largest value changes no bit, and folders do not keep it."""
    made = tiny_model(1)
    quantize_(made.model, Int8Config(scan_epilogue=True))
    made.save_pretrained(tmp_path / "model")
    album = made.session(images=tiny_pictures(2))
    album.save(tmp_path / "album")
    loaded = LongLLaVA.from_pretrained(tmp_path / "model", device="cpu", dtype="float32")
    assert not loaded.model.config.int8.scan_epilogue
    score = loaded.load_session(tmp_path / "album").score("what is this?", "a red heart")
    assert score == album.score("what is this?", "a red heart")
