"""nano's tokenizer: any text comes back, names are one token, specials are text."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longllava.config import PromptConfig
from longllava.data.worlds import tokenizer as world_tokenizer
from longllava.data.worlds import words
from longllava.data.worlds.render import COLOUR_NAMES, PLACES
from longllava.data.worlds.sheets import things
from longllava.data.worlds.tasks import TASKS, WorldTask
from longllava.inputs.tokenizer import Tokenizer

PROMPT = PromptConfig()
NAMES = [thing.name for thing in things()]
alphabet = st.characters() | st.sampled_from(" \n\r\t\0▁Ġs<>|")
texts = st.text(alphabet) | st.lists(
    st.sampled_from(
        [" ", "\n", "\n ", "<|endoftext|>", "<|pad|>", "<img>", "<|User|>\n", "cat", " cat", "green apple"]
    )
).map("".join)


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer(world_tokenizer.PATH.read_text("utf-8"), PROMPT)


def pieces(text: str) -> list[str]:
    """Tokens as the text they stand for, without the leading space."""
    ids, offsets = tokenizer().encode_with_offsets(text)
    return [text[start:end] for start, end in offsets]


def test_the_shipped_file_is_what_the_code_makes() -> None:
    assert world_tokenizer.build_tokenizer() == world_tokenizer.PATH.read_text("utf-8")


def test_special_tokens_in_text_are_text_for_any_user_of_the_file() -> None:
    """Also without this library's own guard (Tokenizer.as_text), as transformers reads the file."""
    for special in (PROMPT.pad_token, PROMPT.bos_token, PROMPT.eos_token):
        ids = tokenizer().backend.encode(f"a {special} b", add_special_tokens=False).ids
        assert min(ids) > 2 and tokenizer().decode(ids) == f"a {special} b"


def test_special_tokens_come_first() -> None:
    assert (tokenizer().pad_id, tokenizer().bos_id, tokenizer().eos_id) == (0, 1, 2)
    assert tokenizer().vocab_size == 1857


@settings(max_examples=300)
@given(texts)
def test_any_text_comes_back(text: str) -> None:
    ids = tokenizer().encode(text)
    assert tokenizer().decode(ids) == text
    assert not {0, 1, 2} & set(ids)


@given(texts)
def test_offsets_cover_the_text_in_order(text: str) -> None:
    ids, offsets = tokenizer().encode_with_offsets(text)
    assert len(ids) == len(offsets)
    starts = [start for start, _ in offsets]
    assert starts == sorted(starts)
    covered = {index for start, end in offsets for index in range(start, end)}
    assert all(text[index] in " \n" for index in set(range(len(text))) - covered)


@pytest.mark.parametrize("lead", ["", "a ", "Is it\n", "</img>\n"])
def test_a_name_is_one_token_and_the_same_one_everywhere(lead: str) -> None:
    before = tokenizer().encode(lead.rstrip(" ")) if lead else []
    for word in (
        *NAMES,
        *words.DIGITS,
        *COLOUR_NAMES,
        *PLACES,
        *words.COUNTS,
        *words.ORDINALS,
        *words.GROUPS,
    ):
        ids = tokenizer().encode(lead + word)
        assert ids[: len(before)] == before and ids[len(before) :] == tokenizer().encode(word), (lead, word)
        assert len(tokenizer().encode(word)) == 1, word


def test_no_two_names_share_a_token() -> None:
    assert len({tokenizer().encode(name)[0] for name in NAMES}) == len(NAMES)


def test_names_hold_against_the_words_around_them() -> None:
    assert pieces("two water buffalos, the black cat?")[:4] == ["two", "water buffalo", "s", ","]
    assert pieces("a white flower playing cards") == ["a", "white", "flower playing cards"]
    assert pieces("a cat in a black frame") == ["a", "cat", "in", "a", "black", "frame"]


def test_the_prompt_layout_is_single_tokens_that_do_not_merge_with_their_neighbours() -> None:
    for mark in (
        PROMPT.user,
        PROMPT.assistant,
        PROMPT.image_open,
        PROMPT.image_close,
        "\n",
        PROMPT.frame_join,
    ):
        assert len(tokenizer().encode(mark)) == 1, mark
    header = tokenizer().encode(PROMPT.assistant)
    for answer in ("7", "green apple", "a cat in a red frame"):
        assert tokenizer().encode(PROMPT.assistant + answer) == header + tokenizer().encode(answer)
    close_open = tokenizer().encode("</img><img>")
    assert tokenizer().encode("<img> cat 7 </img><img> dog </img>\nNumber of")[3:5] == close_open


@pytest.mark.parametrize("name", TASKS)
def test_the_worlds_own_text_needs_no_single_letters(name: str) -> None:
    task = WorldTask(name, split="test", seed=8)
    for index in range(60):
        for turn in task.sample(index).turns:
            short = {piece for piece in pieces(turn.text.replace("<image>", "")) if len(piece) == 1}
            assert short <= {*".,?:s\naA", *words.DIGITS}, turn.text
