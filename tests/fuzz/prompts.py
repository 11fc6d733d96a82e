"""Strings, parts and messages, with pictures or without: one number, one prompt."""

import functools
import random

from tests.fuzz.material import VALUES, outcome, picture
from tests.tiny import tiny_model

WORDS = ["<image>", "<imag", "e>", "</img>", "<img>", "<|endoftext|>", "<|startoftext|>", "<|User|>", "<vid>", "<t>",
         "a", "?", " what is", "\n", "\0", "\ud800", "\u202e", "é", "\u0301", "\U0001f642", "{{", "%s", "\\", "'",
         "{% raw %}"]  # fmt: skip


@functools.cache
def model():
    return tiny_model()


def checked_tokens(prompt, images, options):
    """A prompt's tokens: special ones only where the library puts them, one place for each picture."""
    video = options.pop("video", None)
    session = model().fresh(**options)
    pieces, sources = model().pieces(prompt, images, video, session)
    encoded = session.encode(pieces)
    tokenizer = model().tokenizer
    assert [span.image for span in encoded.spans] == list(range(len(sources)))
    inside = {at for span in encoded.spans for at in range(span.start, span.start + span.length)}
    n_bos = sum(piece.text.count("<|startoftext|>") for piece in pieces if type(piece).__name__ == "Markup")
    n_eos = sum(type(piece).__name__ == "Answer" for piece in pieces)
    found = [token for at, token in enumerate(encoded.ids) if at not in inside]
    assert (found.count(tokenizer.bos_id), found.count(tokenizer.eos_id)) == (n_bos, n_eos)
    assert tokenizer.pad_id not in found and max(encoded.ids) < tokenizer.vocab_size
    return encoded


def judge_prompt(number):
    """Strings, parts and messages, with pictures or without."""
    draw = random.Random(number)

    def text():
        return "".join(draw.choices(WORDS, k=draw.randrange(8)))

    def part():
        kinds = ("text", "image", "video", "audio", None)
        keys = ("text", "image", "path", "video", "url")
        sources = (text(), None, picture(), "none.png", 7)
        return draw.choice(
            ({"type": "text", "text": text()}, {"type": "image", "image": picture()},
             {"type": draw.choice(kinds), draw.choice(keys): draw.choice(sources)}, text(), None)
        )  # fmt: skip

    def message():
        content = draw.choice((text(), [part() for _ in range(draw.randrange(4))], None, 7))
        return draw.choice(
            ({"role": draw.choice(("user", "assistant")), "content": content}, {"role": "user", "content": text()},
             {"role": text()}, text(), None)
        )  # fmt: skip

    prompt = draw.choice((text(), text(), [message() for _ in range(draw.randrange(1, 4))], draw.choice(VALUES)))
    images = draw.choice((None, picture(), [picture()] * draw.randrange(4), draw.choice(VALUES)))
    options = {draw.choice(("tiles", "fps", "max_frames", "allow_hosts", "video")): draw.choice(VALUES)}
    options = options if draw.random() < 0.3 else {}
    if number % 16 == 0:
        answer = outcome(lambda: model().generate(prompt, images, max_new_tokens=2, **options))
        assert answer is None or isinstance(answer, str)
        return answer is not None
    return outcome(lambda: checked_tokens(prompt, images, options)) is not None
