"""A conversation that is read once: pictures and text, then questions as often as wanted.

A session is the model's state after some tokens, and the pieces that wait to be read. Text waits until it is
known what follows it, because neighbouring text is encoded as one string (inputs/processor.py): so a question
to a session is the same tokens as the whole prompt at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from longllava.errors import InputError
from longllava.generation import saving
from longllava.generation.batch import answer_many, numbered
from longllava.generation.content import Content, compact
from longllava.generation.decoding import is_static, static_tokens
from longllava.generation.keywords import Settings, check_keywords
from longllava.generation.prefill import Reader
from longllava.generation.sampling import Sampling, next_tokens
from longllava.generation.scoring import Score, score_ids
from longllava.generation.streaming import TextStream
from longllava.inputs.chat import (
    Answer,
    Mark,
    Markup,
    Message,
    Piece,
    Plain,
    check_text,
    line_before,
    media_pieces,
    string_pieces,
)
from longllava.inputs.processor import Encoded
from longllava.inputs.tiles import expand
from longllava.nn import Context, State, fork_state
from longllava.settings import check_count

if TYPE_CHECKING:
    from typing_extensions import Unpack

LONG_TEXT = 1024  # characters; text beyond this is read when it comes, and then ends where it ends


class Session:
    """Made by LongLLaVA.session. Asking leaves it as it is; append and ask(keep=True) make it longer.

    Threads may ask, fork and save while one of them makes it longer.
    """

    def __init__(self, reader: Reader):
        self.reader = reader
        self.model_was = self.model_is()
        self.content = Content(reader.empty_state(0), 0, 0, [reader.processor.user_open()])

    @property
    def state(self) -> State:
        """What each layer keeps of the tokens read, a batch of one; shared with forks, and never changed in place."""
        return self.content.state

    @property
    def n_tokens(self) -> int:
        """Tokens read, those of images too; what waits is not among them."""
        return self.content.n_tokens

    @property
    def n_images(self) -> int:
        """Images read; a video's frames and a picture's tiles count each."""
        return self.content.n_images

    @property
    def waiting(self) -> list[Piece]:
        """Text that is read when it is known what follows it."""
        return self.content.waiting

    def append(self, images: Any = None, text: str | None = None, video: Any = None) -> None:
        """Read more: images, a video, text, in this order, or images at the <image> marks of the text.

        An empty list of images is none. On any error the session is as it was.
        """
        if images is None and video is None and text is None:
            raise InputError("append: nothing to read; give images, a video or text")
        sources, n_images, n_frames = self.reader.media(images, video)
        prompt = self.reader.processor.prompt
        if text is None:
            pieces = media_pieces(n_images, n_frames, prompt)
        else:
            pieces = string_pieces(text, n_images, n_frames, prompt)  # which also looks at whether it is text
            pieces = [*self.line_before(text, sources), *pieces]
        pieces, sources = expand(pieces, sources, prompt)
        self.take(self.reader.processor.tagged(pieces), sources)

    def take(self, pieces: Sequence[Piece], sources: Sequence[Any]) -> None:
        """Read pieces as far as their tokens are certain; keep the rest waiting."""
        self.check_model()
        before = self.content
        state, n_tokens, n_images, waiting = before
        waiting = [*waiting, *pieces]
        last_certain = max((i for i, piece in enumerate(waiting) if isinstance(piece, (Mark, Answer))), default=-1)
        if sum(len(piece.text) for piece in waiting[last_certain + 1 :] if isinstance(piece, Plain)) > LONG_TEXT:
            last_certain = len(waiting) - 1
        if last_certain >= 0:
            encoded = self.encode(waiting[: last_certain + 1])
            _, state = self.reader.read(encoded, sources, self.room(len(encoded.ids)), n_tokens)
            state, n_tokens, n_images = compact(state), n_tokens + len(encoded.ids), n_images + len(sources)
        self.replace(before, Content(state, n_tokens, n_images, waiting[last_certain + 1 :]))

    def replace(self, before: Content, after: Content) -> None:
        """Raises: InputError when another thread has replaced `before` meanwhile: what it read would be lost."""
        if self.content is not before:
            raise InputError("session: another thread made it longer meanwhile, and so it stays; let one at a time"
                             " append, or ask with keep=True, or fork")  # fmt: skip
        self.content = after

    def model_is(self) -> tuple[str, object]:
        """Where the model is and in what dtype, and how its weights are int8."""
        reader, int8 = self.reader, self.reader.model.config.int8
        return f"{reader.device} in {reader.dtype}" + " with int8 weights" * (int8 is not None), int8

    def check_model(self) -> None:
        """Raises: InputError when the model has moved, or was quantised: what was read cannot go with it."""
        if (now := self.model_is()) != self.model_was:
            raise InputError(
                f"session: it was read by a model on {self.model_was[0]}, which is on {now[0]} now; read it again"
            )

    def fork(self) -> Session:
        """A session that goes on from here on its own; what was read is shared, not copied."""
        self.check_model()
        other = Session(self.reader)
        state, n_tokens, n_images, waiting = self.content
        other.content = Content(fork_state(state, 0), n_tokens, n_images, list(waiting))
        return other

    @overload
    def ask(self, question: str, *, stream: Literal[False] = False, images: Any = None, video: Any = None,
            keep: bool = False, **settings: Unpack[Settings]) -> str: ...  # fmt: skip
    @overload
    def ask(self, question: str, *, stream: Literal[True], images: Any = None, video: Any = None,
            keep: bool = False, **settings: Unpack[Settings]) -> Iterator[str]: ...  # fmt: skip
    def ask(self, question: str, *, stream: bool = False, images: Any = None, video: Any = None,
            keep: bool = False, **settings: Unpack[Settings]) -> str | Iterator[str]:  # fmt: skip
        """Answer a question about what was read (and about `images` or a `video` given with it).

        stream: return an iterator of pieces of the answer. keep: question and answer stay in the session.
        settings: max_new_tokens, temperature, top_p, top_k, seed, stop.
        """
        check_keywords(self.ask, settings, Settings)
        sampling = Sampling(**settings)
        turn = self.fork()  # a stream that is begun late must not read what was appended meanwhile
        pieces, sources = turn.question_pieces(question, images, video)
        if keep:
            answer = self.keeping(turn, pieces, sources, sampling)
            turn.encode([*turn.waiting, *pieces])  # faults of the prompt are raised at once
        else:
            answer = turn.respond([*turn.waiting, *pieces, self.reader.processor.assistant_open()], sources, sampling)
        return answer if stream else "".join(answer)

    def keeping(
        self, turn: Session, pieces: Sequence[Piece], sources: Sequence[Any], sampling: Sampling
    ) -> Iterator[str]:
        """The answer of `turn`, a fork made when the question was asked, which reads the pictures. When the answer is
        whole, this session goes on from there, or reads the turn again if it has read something else meanwhile."""
        start = turn.n_tokens, list(turn.waiting)
        processor = self.reader.processor
        turn.take(pieces, sources)
        text = ""
        for piece in turn.respond([*turn.waiting, processor.assistant_open()], (), sampling):
            text += piece
            yield piece
        answered = [*processor.turn(Message("assistant", (Answer(text),))), processor.user_open()]
        before = self.content
        if start == (before.n_tokens, before.waiting):
            turn.take(answered, ())
            self.replace(before, turn.content)
        else:
            self.take([*pieces, *answered], sources)

    def ask_many(self, questions: Sequence[str], *, batch_size: int = 32, **settings: Unpack[Settings]) -> list[str]:
        """Answer many questions on what was read, in batches; each as `ask` would (with the same seed).

        Raises: InputError naming the question, before any is answered.
        """
        check_keywords(self.ask_many, settings, Settings)
        sampling = Sampling(**settings)
        if isinstance(questions, (str, bytes, Mapping)) or not isinstance(questions, Iterable):
            raise InputError(f"questions: expected a list of strings, got {questions!r:.80}; use ask for one")
        batch_size = check_count("batch_size", batch_size)
        close = self.reader.processor.assistant_open()
        turn, questions = self.fork(), list(questions)
        rows: list[list[int]] = []
        for number, question in enumerate(questions, 1):
            with numbered("question", number, len(questions)):
                pieces, _ = turn.question_pieces(question, None, None)
                rows.append(turn.encode([*turn.waiting, *pieces, close]).ids)
        answers: list[str] = []
        for first in range(0, len(rows), batch_size):
            batch = rows[first : first + batch_size]
            answers += answer_many(self.reader, turn.state, turn.n_tokens, batch, sampling)
        return answers

    def score(self, question: str, answer: str, *, images: Any = None, video: Any = None) -> Score:
        """How likely `answer` is as the reply to `question`, teacher-forced; the session stays as it is."""
        turn = self.fork()
        pieces, sources = turn.question_pieces(question, images, video)
        processor = self.reader.processor
        return turn.score_pieces([*turn.waiting, *pieces, processor.assistant_open()], answer, sources)

    def score_pieces(self, pieces: Sequence[Piece], answer: str, sources: Sequence[Any]) -> Score:
        """`score` of an answer to `pieces`, as `respond` takes them. Raises: InputError."""
        check_text(answer, "answer")
        encoded = self.encode([*pieces, Answer(answer, last=True)])
        asked = self.encode(pieces)
        ids = encoded.ids[len(asked.ids) : -1]
        if not ids:
            raise InputError("answer: it is empty; there is nothing to score")
        hidden_1D, state = self.reader.read(asked, sources, self.room(len(encoded.ids)), self.n_tokens)
        return score_ids(self.reader, hidden_1D, state, self.n_tokens + len(asked.ids), ids)

    def respond(self, pieces: Sequence[Piece], sources: Sequence[Any], sampling: Sampling) -> Iterator[str]:
        """The answer to `pieces`, which end where it begins. Faults of the prompt are raised at once.

        Nothing may be appended before the answer is whole: others than its owner call this on a fork.
        """
        return self.answer(self.encode(pieces), sources, sampling)

    def answer(self, encoded: Encoded, sources: Sequence[Any], sampling: Sampling) -> Iterator[str]:
        """Pieces of text after `encoded`, which is read when the first is asked for. Raises: InputError."""
        # a static decoder has room of its own
        room = self.room(len(encoded.ids) + (0 if is_static(self.reader) else sampling.max_new_tokens))
        hidden_1D, state = self.reader.read(encoded, sources, room, self.n_tokens)
        text = TextStream(self.reader.processor.tokenizer, sampling.stop_strings())
        for token in self.tokens(hidden_1D, state, self.n_tokens + len(encoded.ids), sampling):
            if piece := text.push(token):
                yield piece
            if text.done:
                return
        if piece := text.finish():
            yield piece

    def tokens(self, hidden_1D: Tensor, state: State, start: int, sampling: Sampling) -> Iterator[int]:
        """Decode: the same model code at length 1."""
        model = self.reader.model
        generators = [sampling.generator()]
        token = -1
        if is_static(self.reader):
            for (token,) in static_tokens(self.reader, hidden_1D, state, torch.tensor([start]), sampling, generators):
                if token == self.reader.processor.tokenizer.eos_id:
                    return
                yield token
            return
        for number in range(sampling.max_new_tokens):
            with torch.inference_mode():  # inside the loop: between two tokens the caller's code runs
                if number:
                    x_11D = model.embed(torch.tensor([[token]], device=self.reader.device))
                    hidden_11D, state = model(x_11D, Context(start=start + number - 1), state)
                    hidden_1D = hidden_11D[:, -1]
                token = int(next_tokens(self.reader.logits(hidden_1D), sampling, generators))
            if token == self.reader.processor.tokenizer.eos_id:
                return
            yield token

    def question_pieces(self, question: str, images: Any, video: Any) -> tuple[list[Piece], list[Any]]:
        """A user's turn up to its end, without what waits, and its images in order. Raises: InputError."""
        sources, n_images, n_frames = self.reader.media(images, video)
        processor = self.reader.processor
        pieces = string_pieces(question, n_images, n_frames, processor.prompt)
        pieces, sources = expand(pieces, sources, processor.prompt)
        line = self.line_before(question, sources)
        return [*line, *processor.tagged(pieces), processor.user_end()], sources

    def line_before(self, text: str, sources: Sequence[Any]) -> list[Piece]:
        """What parts a text from the picture that was read last, when it brings none of its own."""
        prompt = self.reader.processor.prompt
        closed = [Markup(prompt.image_close)]
        tiled = [*closed, Markup(prompt.tiles_end)] if prompt.tiles_end else closed
        return line_before(text, prompt) if not sources and self.waiting in (closed, tiled) else []

    def encode(self, pieces: Sequence[Piece]) -> Encoded:
        """Their tokens, with room for those of images. Raises: InputError."""
        return self.reader.processor.encode_pieces(pieces, self.reader.tokens_per_image)

    def room(self, n_tokens: int) -> State:
        """A fork of the state that has room for exactly `n_tokens` more. Raises: InputError for too many."""
        if not self.n_tokens:
            return self.reader.empty_state(n_tokens)
        self.reader.check_room(n_tokens)
        return fork_state(self.state, n_tokens)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, whole or not at all, for load_session. Raises: InputError, CheckpointError."""
        self.check_model()
        return saving.save(self, path)
