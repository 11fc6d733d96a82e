"""Conversations to token ids with room for image tokens; images to pixels.

Layout (LLaVA, LongLLaVA): bos, user string, text and images, user_end, bos, assistant string, answer, eos.
Text between two ids or images is encoded as one string, as the published models saw it; an answer's ids never
merge with what stands before them, so that training and generation see the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from longllava.config import ModelConfig, pooled_counts
from longllava.errors import InputError
from longllava.inputs.chat import Answer, Mark, Markup, Message, Piece, Plain, messages_of_turns
from longllava.inputs.tokenizer import Tokenizer
from longllava.settings import whole_number

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Span:
    """Image tokens stand at ids[start : start + length]; `image` numbers the images of the sample."""

    start: int
    length: int
    image: int


@dataclass
class TurnTokens:
    """Tokens start .. end of a turn, template included; token start + i covers the characters offsets[i].

    Tokens of the template have empty offsets, (0, 0); all tokens of an image have those of its mark.
    """

    start: int
    end: int
    offsets: list[tuple[int, int]]

    def range_of(self, first: int, last: int) -> tuple[int, int]:
        """Tokens [start, end) that overlap the characters first .. last. Raises: InputError if none does."""
        hits = [i for i, (a, b) in enumerate(self.offsets) if a < last and b > first]
        if not hits:
            raise InputError(f"no token covers the characters {first} to {last} of the turn")
        return self.start + hits[0], self.start + hits[-1] + 1


@dataclass
class Encoded:
    """ids hold the pad id where image tokens go; trainable marks the answers' tokens and their ends.

    targets: position -> the id learned there, where it is not the one that is read (prompt.between_turns).
    """

    ids: list[int] = field(default_factory=list)
    trainable: list[bool] = field(default_factory=list)
    targets: dict[int, int] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)
    turn_tokens: list[TurnTokens] = field(default_factory=list)


class Processor:
    """What turns a model's inputs into tensors, by its config and tokenizer."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer):
        self.config = config
        self.prompt = config.prompt
        self.tokenizer = tokenizer

    def tokens_per_image(self, asked: int | None = None) -> int:
        """`asked`, or the config's. Raises: InputError when the encoder's grid cannot be pooled to it."""
        bridge, encoder = self.config.bridge, self.config.encoder
        if bridge is None or encoder is None:
            raise InputError(f"model {self.config.name!r} reads text only; it has no encoder for images")
        if asked is None:
            return bridge.tokens_per_image
        n_tokens = encoder.grid() ** 2
        allowed = pooled_counts(encoder.grid()) if bridge.pool == "2d" else [n_tokens]
        count = whole_number(asked)
        if count is None or bridge.pool != "1d" and count not in allowed or not 0 < count <= n_tokens:
            raise InputError(f"tokens_per_image: got {asked!r}, allowed with pooling {bridge.pool!r}: {allowed}")
        return count

    def user_open(self) -> Markup:
        return Markup(self.prompt.bos_token + self.prompt.user)

    def user_end(self) -> Markup:
        return Markup(self.prompt.user_end)

    def assistant_open(self) -> Markup:
        return Markup(self.prompt.bos_token + self.prompt.assistant)

    def encode_chat(
        self,
        turns: Sequence[Any],
        n_images: int,
        *,
        tokens_per_image: int | None = None,
        add_generation_prompt: bool = False,
    ) -> Encoded:
        """Encode turns (objects with .role "user" or "assistant" and .text, <image> marks in the user's).

        add_generation_prompt: end with the assistant string, where an answer begins.
        Raises: InputError when marks and images disagree, a role is unknown, or text is not Unicode.
        """
        messages = messages_of_turns(turns, n_images)
        return self.encode_messages(messages, tokens_per_image, add_generation_prompt)

    def encode_messages(
        self,
        messages: Sequence[Message],
        tokens_per_image: int | None = None,
        add_generation_prompt: bool = False,
    ) -> Encoded:
        """As encode_chat, for messages in pieces."""
        writer = Writer(self, tokens_per_image)
        for message in messages:
            writer.begin_turn()
            writer.add(*self.turn(message))
        if add_generation_prompt:
            writer.add(self.assistant_open())
        return writer.finish()

    def encode_pieces(self, pieces: Sequence[Piece], tokens_per_image: int | None = None) -> Encoded:
        """Pieces in order, nothing added."""
        writer = Writer(self, tokens_per_image)
        writer.begin_turn()
        writer.add(*pieces)
        return writer.finish()

    def turn(self, message: Message) -> list[Piece]:
        """A whole turn with its template."""
        if message.role == "user":
            return [self.user_open(), *self.tagged(message.pieces), self.user_end()]
        return [self.assistant_open(), *message.pieces]

    def tagged(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Pieces with the tags that stand around each image."""
        result: list[Piece] = []
        for piece in pieces:
            if not isinstance(piece, Mark):
                result.append(piece)
                continue
            close = self.prompt.image_close if piece.close is None else piece.close
            result += [Markup(self.prompt.image_open), piece, Markup(close)]  # empty ones too: Session looks for it
        return result

    def pixels(self, images: Sequence[Any], open_reference: Callable[[str], Any] | None = None) -> Tensor:
        """Images (paths, PIL, arrays, bytes; references by `open_reference`) -> uint8 (N, 3, S, S)."""
        import torch

        from longllava.inputs.image import named, square_pixels

        encoder = self.config.encoder
        if encoder is None:
            raise InputError(f"model {self.config.name!r} reads text only; it has no encoder for images")
        pixels_N3SS = torch.empty(len(images), 3, encoder.image_size, encoder.image_size, dtype=torch.uint8)
        for i, image in enumerate(images):
            with named(i, len(images), image):
                pixels_N3SS[i] = square_pixels(image, encoder.image_size, encoder.mean, open_reference)
        return pixels_N3SS


class Writer:
    """Collects pieces into an Encoded; neighbouring text becomes one string before it is encoded."""

    def __init__(self, processor: Processor, tokens_per_image: int | None):
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.wanted = tokens_per_image
        self.encoded = Encoded()
        self.text = ""
        self.sources: list[tuple[int, int, int]] = []  # (start, end in self.text, start in the turn's text)
        self.split: dict[str, list[str | int]] = {}  # markup in parts: a thousand pictures have the same two tags

    def begin_turn(self) -> None:
        """Each turn begins with bos, so no text joins over its start."""
        self.flush()
        start = len(self.encoded.ids)
        self.encoded.turn_tokens.append(TurnTokens(start, start, []))

    def add(self, *pieces: Piece) -> None:
        for piece in pieces:
            if isinstance(piece, Plain):
                self.sources.append((len(self.text), len(self.text) + len(piece.text), piece.start))
                self.text += piece.text
            elif isinstance(piece, Markup):
                self.markup(piece.text)
            elif isinstance(piece, Answer):
                self.answer(piece)
            else:
                self.flush()
                length = self.processor.tokens_per_image(self.wanted)
                self.encoded.spans.append(Span(len(self.encoded.ids), length, piece.image))
                self.put([self.tokenizer.pad_id] * length, [(piece.start, piece.end)] * length)

    def markup(self, text: str) -> None:
        if text not in self.split:
            self.split[text] = self.tokenizer.split_specials(text)
        for part in self.split[text]:
            if isinstance(part, int):
                self.flush()
                self.put([part], [(0, 0)])
            else:
                self.text += part

    def answer(self, answer: Answer) -> None:
        """Its tokens and its end: eos, or, between turns, the text that a prompt has there; eos is learned anyway."""
        header = self.text
        ids, offsets = self.continued(header, answer.text)
        self.flush()
        self.put(ids, offsets, trainable=True)
        between = None if answer.last else self.processor.prompt.between_turns
        if between is None:
            self.put([self.tokenizer.eos_id], [(0, 0)], trainable=True)
            return
        ids, _ = self.continued(header + answer.text, between)
        self.encoded.targets[len(self.encoded.ids)] = self.tokenizer.eos_id
        self.put(ids[:1], [(0, 0)], trainable=True)
        self.put(ids[1:], [(0, 0)] * (len(ids) - 1))

    def continued(self, before: str, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Encode text together with what stands before it, where that leaves the ids of what stands before as they are.

        That is what the published models were trained on, and what generation continues from.
        """
        if before:
            before_ids = self.tokenizer.encode(before)
            ids, offsets = self.tokenizer.encode_with_offsets(before + text)
            if ids[: len(before_ids)] == before_ids:
                return ids[len(before_ids) :], [
                    (a - len(before), b - len(before)) for a, b in offsets[len(before_ids) :]
                ]
        return self.tokenizer.encode_with_offsets(text) if text else ([], [])

    def flush(self) -> None:
        text, self.text = self.text, ""
        sources, self.sources = self.sources, []
        if not text:
            return
        ids, offsets = self.tokenizer.encode_with_offsets(text)
        self.put(ids, in_turn(offsets, sources) if sources else [(0, 0)] * len(ids))

    def put(self, ids: list[int], offsets: list[tuple[int, int]], trainable: bool = False) -> None:
        self.encoded.ids += ids
        self.encoded.trainable += [trainable] * len(ids)
        self.encoded.turn_tokens[-1].offsets += offsets
        self.encoded.turn_tokens[-1].end += len(ids)

    def finish(self) -> Encoded:
        self.flush()
        return self.encoded


def in_turn(offsets: list[tuple[int, int]], sources: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
    """Token offsets in a joined string -> in the turn's text; (0, 0) where a token covers only template."""
    result, number = [], 0
    for a, b in offsets:
        while number < len(sources) - 1 and sources[number][1] <= a:
            number += 1
        start, end, at = sources[number]
        a, b = max(a, start), min(b, end)
        result.append((a - start + at, b - start + at) if a < b else (0, 0))
    return result
