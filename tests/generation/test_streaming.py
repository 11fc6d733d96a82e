"""Pieces never change afterwards, and joined they are the answer."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longllava.generation.streaming import TextStream
from tests.tiny import SPECIALS, tiny_model, tiny_pictures, tiny_tokenizer, vocabulary

TOKENIZER = tiny_tokenizer()
MODEL, PICTURES = tiny_model(), tiny_pictures(2)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def stream(ids, stop=()):
    text = TextStream(TOKENIZER, stop)
    pieces = []
    for token in ids:
        pieces.append(text.push(token))
        if text.done:
            break
    return [*pieces, text.finish()]


@given(TEXT)
def test_pieces_joined_are_the_decoded_text(text):
    ids = TOKENIZER.encode(text)
    assert "".join(stream(ids)) == TOKENIZER.decode(ids)


@given(TEXT)
def test_no_piece_holds_half_a_character(text):
    text = text.replace("\ufffd", "")
    assert not any("\ufffd" in piece for piece in stream(TOKENIZER.encode(text)))


@given(st.lists(st.integers(0, len(vocabulary()) - 1), max_size=25))
def test_any_tokens_stream(ids):
    """Also bytes that are no text, and specials in the middle."""
    joined = "".join(stream(ids))
    if "\ufffd" not in joined:
        assert joined == TOKENIZER.decode(ids)


def test_a_character_of_four_bytes_comes_whole():
    assert [piece for piece in stream(TOKENIZER.encode("a\U0001f600b")) if piece] == ["a", "\U0001f600", "b"]


@pytest.mark.parametrize("token", ["<0xFF>", SPECIALS[0]])
def test_tokens_without_an_end_of_a_character_are_not_decoded_again_and_again(token, monkeypatch):
    """Bytes that are no text, or special tokens: what is decoded at each of them does not grow with the answer."""
    number, lengths, decode = TOKENIZER.backend.token_to_id(token), [], TOKENIZER.decode
    monkeypatch.setattr(TOKENIZER, "decode", lambda ids: lengths.append(len(ids)) or decode(ids))
    joined = "".join(stream([*TOKENIZER.encode("a"), *[number] * 2000, *TOKENIZER.encode("b")]))
    expected = "a b" if token == SPECIALS[0] else "a" + "\ufffd" * 2000 + " b"
    assert joined == expected and max(lengths) < 600


def test_a_torn_character_at_the_end_is_marked():
    ids = TOKENIZER.encode("a€")
    assert "".join(stream(ids[:-1])).startswith("a\ufffd")


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("abcabd", ["abd"], "abc"),
        ("aab", ["ab"], "a"),
        ("abc", ["abx"], "abc"),
        ("abc", ["c", "b"], "a"),
        ("what is this?", ["is"], "what "),
        ("abc", ["abcd"], "abc"),
        ("a\nb", ["\n"], "a"),
    ],
)
def test_stop_strings_cut_and_never_show(text, stop, expected):
    pieces = stream(TOKENIZER.encode(text), tuple(stop))
    assert "".join(pieces) == expected


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_stopping_is_cutting_the_whole_text(text, stop):
    cut = min((text.find(word) for word in stop if word in text), default=len(text))
    got = "".join(stream(TOKENIZER.encode(text), tuple(stop)))
    # two stop strings can end in different pieces: the first to be complete wins
    assert got == text[:cut] or (len(stop) > 1 and text.startswith(got) and len(got) >= cut)


@settings(max_examples=10)
@given(st.integers(0, 30), st.sampled_from([0.0, 1.0]))
def test_streamed_answers_are_the_whole_ones(seed, temperature):
    drawn = {"temperature": temperature, "seed": seed, "max_new_tokens": 10}
    pieces = list(MODEL.generate("a", PICTURES, stream=True, **drawn))
    assert "".join(pieces) == MODEL.generate("a", PICTURES, **drawn)
    assert all(pieces)


def test_special_tokens_do_not_show():
    ids = [
        *TOKENIZER.encode("a"),
        *(TOKENIZER.special_ids[name] for name in SPECIALS),
        *TOKENIZER.encode("b"),
    ]
    assert "".join(stream(ids)) == "a b"


def test_stop_ends_generation():
    whole = MODEL.generate("a", PICTURES, max_new_tokens=20)
    stop = whole[len(whole) // 2]
    assert MODEL.generate("a", PICTURES, max_new_tokens=20, stop=stop) == whole[: whole.index(stop)]


def test_a_long_stop_string_is_compared_as_far_as_there_is_text():
    """All beginnings of one of a million characters were made at each token: 500 GB of copies."""
    ends = []

    class Word(str):
        def __getitem__(self, part):
            ends.append(part.stop)
            return super().__getitem__(part)

    text = TextStream(TOKENIZER, (Word("aab" * 1000),))
    pieces = [text.push(token) for token in TOKENIZER.encode("caab")]
    assert "".join([*pieces, text.finish()]).strip() == "caab"
    assert max(ends) < 10
