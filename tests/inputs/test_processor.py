"""The layout of a conversation, token by token."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longllava.config import BridgeConfig, PromptConfig
from longllava.errors import InputError
from longllava.inputs.chat import Answer, Mark, Markup, Plain, messages_of_dicts, string_pieces
from longllava.inputs.processor import Processor, Span
from tests.tiny import tiny_config, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PROCESSOR = Processor(tiny_config(), TOKENIZER)


@dataclass
class Turn:
    role: str
    text: str


TALK = [
    Turn("user", "<image>\n<image>what is this?"),
    Turn("assistant", "a red heart"),
    Turn("user", "the red heart of a?"),
    Turn("assistant", "s"),
]


def names(ids):
    return [TOKENIZER.backend.id_to_token(number) for number in ids]


def test_layout_of_two_turns():
    encoded = PROCESSOR.encode_chat(TALK, 2)
    user = ["▁", *"<|Us", "e", "r", *"|>", "\n"]
    assistant = ["▁", *"<|Assistant|>", "\n"]
    image = ["<img>", *["<|pad|>"] * 4, "</img>"]
    assert names(encoded.ids) == [
        "<|startoftext|>", *user, *image, "▁", "\n", *image, "▁what", "▁is", "▁this", "?", "\n",
        "<|startoftext|>", *assistant, "a", "▁red▁heart", "<|endoftext|>",
        "<|startoftext|>", *user, "t", "h", "e", "▁red▁heart", "▁of", "▁a", "?", "\n",
        "<|startoftext|>", *assistant, "s", "<|endoftext|>",
    ]  # fmt: skip
    trained = [name for name, flag in zip(names(encoded.ids), encoded.trainable) if flag]
    assert trained == ["a", "▁red▁heart", "<|endoftext|>", "s", "<|endoftext|>"]
    assert encoded.spans == [Span(12, 4, 0), Span(20, 4, 1)]


def test_generation_prompt_is_a_prefix_of_the_answered_one():
    asked = PROCESSOR.encode_chat(TALK[:1], 2, add_generation_prompt=True)
    answered = PROCESSOR.encode_chat(TALK[:2], 2)
    assert answered.ids[: len(asked.ids)] == asked.ids
    assert answered.trainable.index(True) == len(asked.ids)


def test_offsets_find_the_tokens_of_words():
    encoded = PROCESSOR.encode_chat(TALK, 2)
    for turn, word in ((0, "this"), (1, "red heart"), (2, "red heart"), (0, "<image>\n<image>")):
        first = TALK[turn].text.index(word)
        start, end = encoded.turn_tokens[turn].range_of(first, first + len(word))
        assert encoded.turn_tokens[turn].start <= start < end <= encoded.turn_tokens[turn].end
        if "image" not in word:
            assert TOKENIZER.decode(encoded.ids[start:end]) == word
        else:
            assert (start, end) == (12, 24)
    with pytest.raises(InputError, match="no token covers"):
        encoded.turn_tokens[2].range_of(900, 901)


@given(st.integers(0, 5), st.integers(0, 5))
def test_marks_must_equal_images(n_marks, n_images):
    turns = [Turn("user", "a <image>" * n_marks)]
    if n_marks == n_images:
        assert len(PROCESSOR.encode_chat(turns, n_images).spans) == n_images
    else:
        with pytest.raises(InputError, match=f"{n_marks} <image> marks?, .* {n_images};"):
            PROCESSOR.encode_chat(turns, n_images)


def test_answers_are_not_searched_for_marks():
    encoded = PROCESSOR.encode_chat([Turn("user", "a"), Turn("assistant", "<image>")], 0)
    assert not encoded.spans


def test_tokens_per_image_may_be_asked_for():
    assert PROCESSOR.encode_chat([Turn("user", "<image>")], 1, tokens_per_image=16).spans[0].length == 16
    with pytest.raises(InputError, match=r"tokens_per_image: got 5, allowed with pooling '2d': \[16, 4, 1\]"):
        PROCESSOR.encode_chat([Turn("user", "<image>")], 1, tokens_per_image=5)


@pytest.mark.parametrize("pool", ["2d", "1d"])
@pytest.mark.parametrize("asked", [4.0, True, "4", 0, 17])
def test_tokens_per_image_is_a_count(pool, asked):
    processor = Processor(tiny_config(bridge=BridgeConfig(pool=pool, tokens_per_image=4, hidden=32)), TOKENIZER)
    with pytest.raises(InputError, match="tokens_per_image: got"):
        processor.encode_chat([Turn("user", "<image>")], 1, tokens_per_image=asked)


def test_text_only_models_refuse_images():
    with pytest.raises(InputError, match="reads text only"):
        Processor(tiny_config(encoder=None, bridge=None), TOKENIZER).encode_chat([Turn("user", "<image>")], 1)


def test_strings_place_images_at_marks_or_first():
    prompt = PromptConfig()
    assert string_pieces("a <image> b", 1, 0, prompt) == [Plain("a "), Mark(0, 2, 9), Plain(" b", 9)]
    assert string_pieces("ab", 2, 0, prompt) == [Mark(0), Mark(1), Markup("\n"), Plain("ab")]
    assert string_pieces("\nab", 2, 0, prompt) == [Mark(0), Mark(1), Plain("\nab")]
    assert string_pieces("ab", 0, 2, prompt) == [
        Markup("<vid>"), Mark(0), Markup("<t>"), Mark(1), Markup("</vid>"), Plain("ab"),
    ]  # fmt: skip
    with pytest.raises(InputError, match="2 <image> marks, but the number of images given is 1"):
        string_pieces("<image><image>", 1, 0, prompt)
    with pytest.raises(InputError, match="prompt: it is empty"):
        string_pieces("  \n", 0, 0, prompt)


def parse(messages, images=()):
    return messages_of_dicts(messages, images, PromptConfig(), list, lambda source: [source] * 2)


def test_messages_with_parts():
    content = [{"type": "image", "path": "a.png"}, {"type": "text", "text": "<image>?"}, {"type": "image"}]
    messages, sources = parse([{"role": "user", "content": content}], ["b.png"])
    assert messages[0].pieces == (Mark(0), Markup("\n"), Plain("<image>?"), Mark(1))
    assert sources == ["a.png", "b.png"]
    encoded = PROCESSOR.encode_messages(messages)
    assert len(encoded.spans) == 2 and TOKENIZER.decode(encoded.ids).count("<image>") == 1


def test_messages_with_a_video_number_frames_after_images():
    content = [{"type": "image", "path": "a"}, {"type": "video", "path": "v"}, {"type": "text", "text": "?"}]
    messages, sources = parse([{"role": "user", "content": content}])
    assert sources == ["a", "v", "v"]
    assert [piece.image for piece in messages[0].pieces if isinstance(piece, Mark)] == [0, 1, 2]


def test_sources_of_parts_by_any_of_their_names():
    parts = [{"type": "image", "image": None, "url": "https://a.org/a.png"},
             {"type": "image", "base64": "aGVh\r\ncnQ=\n"}, {"type": "video", "url": "v.mp4"}]  # fmt: skip
    _, sources = parse([{"role": "user", "content": parts}])
    assert sources == ["https://a.org/a.png", b"heart", "v.mp4", "v.mp4"]


def test_a_conversation_may_end_with_its_answer():
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    messages, _ = messages_of_dicts([*talk, *talk], [], PromptConfig(), list, list, answered=True)
    assert [message.pieces for message in messages[1::2]] == [(Answer("b"),), (Answer("b", last=True),)]


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([], "at least one user message"),
        ({"role": "user", "content": "a"}, "expected a list"),
        ([{"role": "system", "content": "a"}], "role: got 'system', allowed: user, assistant"),
        ([{"role": "user"}], "message 1: expected a dictionary .* got a dictionary of \\['role'\\]"),
        ([{"role": "user", "content": 3}], "a string or a list of parts, got int"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "message 1: a part of type 'audio'; allowed"),
        ([{"role": "user", "content": [{"type": "image"}]}], "neither 'image' nor 'path'"),
        (
            [{"role": "user", "content": [{"type": "video", "file": "a.gif"}, {"type": "text", "text": "a"}]}],
            "message 1: a video part has neither 'video' nor 'path'",
        ),
        ([{"role": "user", "content": [{"type": "image", "base64": "a b"}]}], "base64: got 'a b', which is not"),
        ([{"role": "user", "content": [{"type": "image", "base64": 5}]}], "base64: got 5, which is not"),
        ([{"role": "user", "content": " "}], "the last message is empty"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "message 2: role 'user'"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "the last one is the assistant's",
        ),
        ([{"role": "user", "content": "a\ud800"}], "message 1: text: .* lone surrogate"),
    ],
)
def test_bad_messages_get_a_sentence(messages, sentence):
    with pytest.raises(InputError, match=sentence):
        parse(messages)


def test_images_without_a_part_are_an_error():
    with pytest.raises(InputError, match="1 of 1 images have no image part"):
        parse([{"role": "user", "content": "a"}], ["a.png"])
