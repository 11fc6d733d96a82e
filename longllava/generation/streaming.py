"""Tokens to text, piece by piece. Text handed out is final: no split characters, no part of a stop string."""

from __future__ import annotations

from longllava.inputs.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # what a decoder makes of bytes that are not (yet) UTF-8
CHARACTER = 4  # bytes of a character at most, each of which may be a token
WAITING = 256  # tokens that end no character; of more none will be one, and each would have all of them decoded again


class TextStream:
    """Feed token ids, get text that can no longer change. `done` once a stop string has come.

    All pieces joined are the answer, by construction: the answer that is not streamed is made the same way.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()):
        self.tokenizer = tokenizer
        self.stop = stop
        self.specials = frozenset(tokenizer.special_ids.values())
        self.ids: list[int] = []  # without special tokens, which make no text
        self.begin = 0  # ids[begin:read] are decoded again as context: a first token loses its leading space
        self.read = 0
        self.waiting = ""  # decoded, but perhaps the beginning of a stop string
        self.done = False

    def push(self, token: int) -> str:
        """Text that is certain after this token, often empty."""
        if token in self.specials:
            return ""
        self.ids.append(token)
        before = self.tokenizer.decode(self.ids[self.begin : self.read])
        now = self.tokenizer.decode(self.ids[self.begin :])
        end = len(self.ids)
        if len(now) <= len(before) or now.endswith(REPLACEMENT):
            if end - self.read <= WAITING:
                return ""
            end -= CHARACTER
            now = self.tokenizer.decode(self.ids[self.begin : end])
        self.begin, self.read = self.read, end
        return self.release(now[len(before) :])

    def finish(self) -> str:
        """The rest, when no more tokens come."""
        if self.done:
            return ""
        before = self.tokenizer.decode(self.ids[self.begin : self.read])
        now = self.tokenizer.decode(self.ids[self.begin :])
        text = self.release(now[len(before) :])
        text += "" if self.done else self.waiting
        self.waiting = ""
        return text

    def release(self, text: str) -> str:
        """Hold back what may become a stop string; cut at one."""
        text = self.waiting + text
        cuts = [at for at in (text.find(word) for word in self.stop) if at >= 0]
        if cuts:
            self.done, self.waiting = True, ""
            return text[: min(cuts)]
        lengths = ((word, n) for word in self.stop for n in range(1, min(len(word), len(text) + 1)))
        held = max((n for word, n in lengths if text.endswith(word[:n])), default=0)
        self.waiting = text[len(text) - held :]
        return text[: len(text) - held]
