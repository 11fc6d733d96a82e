"""Text survives the tokenizer, and nothing a person types becomes a special token."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longllava.checkpoints import find_folder
from longllava.config import PromptConfig
from longllava.errors import CheckpointError, InputError
from longllava.inputs.tokenizer import Tokenizer
from tests.tiny import SPECIALS, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@given(TEXT)
def test_decode_undoes_encode(text):
    ids, offsets = TOKENIZER.encode_with_offsets(text)
    assert TOKENIZER.decode(ids) == text.removeprefix(" ")  # Metaspace: a first space is the word's own
    assert len(offsets) == len(ids) and all(0 <= a <= b <= len(text) for a, b in offsets)


@given(st.lists(st.sampled_from([*SPECIALS, "a", " ", "red", "<|", "|>"]), max_size=6).map("".join))
def test_typed_specials_stay_text(text):
    ids = TOKENIZER.encode(text)
    assert not set(ids) & set(TOKENIZER.special_ids.values())
    assert TOKENIZER.decode(ids) == text.removeprefix(" ")


def test_template_specials_become_ids():
    parts = TOKENIZER.split_specials("<|startoftext|>ask<img><img>")
    assert parts == [TOKENIZER.bos_id, "ask", TOKENIZER.special_ids["<img>"], TOKENIZER.special_ids["<img>"]]


def test_ids_are_the_named_ones():
    assert (TOKENIZER.pad_id, TOKENIZER.bos_id, TOKENIZER.eos_id) == (0, 1, 2)
    assert TOKENIZER.encode("what is this?") == [
        TOKENIZER.backend.token_to_id(t) for t in ("▁what", "▁is", "▁this", "?")
    ]


@pytest.mark.parametrize("text", ["a\ud800b", "\udfff"])
def test_lone_surrogates_are_refused(text):
    with pytest.raises(InputError, match="lone surrogate"):
        TOKENIZER.encode(text)


def test_saved_and_read_again_is_the_same(tmp_path):
    TOKENIZER.save(tmp_path)
    again = Tokenizer.from_folder(tmp_path, PromptConfig())
    assert again.encode("a red heart<img>") == TOKENIZER.encode("a red heart<img>")


def test_missing_torn_and_unfit_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json or tokenizer\.model; a model folder holds one"):
        Tokenizer.from_folder(tmp_path, PromptConfig())
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: cannot be read"):
        Tokenizer.from_folder(tmp_path, PromptConfig())
    with pytest.raises(CheckpointError, match="no special token '<end>'"):
        Tokenizer(TOKENIZER.backend.to_str(), PromptConfig(eos_token="<end>"))


def test_twice_the_text_takes_twice_the_time():
    """Text without a space, and of words; time of this process, the least of three. Squared, it would be four times."""
    tokenizer = Tokenizer.from_folder(find_folder("nano"), PromptConfig())

    def seconds(text):
        started = time.process_time()
        assert tokenizer.encode(text)
        return time.process_time() - started

    for text in ("a" * 200_000, "a red panda, " * 20_000):
        pairs = [(seconds(text), seconds(2 * text)) for _ in range(3)]
        once, twice = (min(times) for times in zip(*pairs, strict=True))
        assert twice < 2.5 * once + 0.05
