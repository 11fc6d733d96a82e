"""A conversation as pieces: plain text, template text, and marks where pictures stand.

Plain text is what a person wrote and is never read as anything else. Template text is the library's own
(config.prompt) and may name special tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longllava.config import PromptConfig
from longllava.errors import InputError
from longllava.inputs.address import from_base64
from longllava.inputs.tokenizer import check_text

IMAGE_MARK = "<image>"
ROLES = ("user", "assistant")


@dataclass(frozen=True)
class Markup:
    """Template text."""

    text: str


@dataclass(frozen=True)
class Plain:
    """Text of a turn; `start` is where it begins in the turn's text (marks counted), for evidence spans."""

    text: str
    start: int = 0


@dataclass(frozen=True)
class Mark:
    """The slots of one image. `start`, `end`: where its mark stands in the turn's text.

    close: the tag after it, where it is not the usual one.
    """

    image: int
    start: int = 0
    end: int = 0
    close: str | None = None


@dataclass(frozen=True)
class Answer:
    """What the assistant said, closed by eos: what training learns. last: no turn follows."""

    text: str
    last: bool = False


Piece = Markup | Plain | Mark | Answer


@dataclass(frozen=True)
class Message:
    """One turn: who speaks, and its pieces in order."""

    role: str
    pieces: tuple[Piece, ...]


def split_marks(text: str, first_image: int) -> tuple[list[Piece], int]:
    """Text with <image> marks as pieces; images are numbered from `first_image`. Returns the next number."""
    pieces: list[Piece] = []
    position, image = 0, first_image
    while (found := text.find(IMAGE_MARK, position)) >= 0:
        pieces += [Plain(text[position:found], position), Mark(image, found, found + len(IMAGE_MARK))]
        position, image = found + len(IMAGE_MARK), image + 1
    pieces.append(Plain(text[position:], position))
    return [piece for piece in pieces if not (isinstance(piece, Plain) and not piece.text)], image


def messages_of_turns(turns: Sequence[Any], n_images: int) -> list[Message]:
    """Turns (role, text with <image> marks) as messages. Raises: InputError if marks and images disagree."""
    messages, image = [], 0
    for number, turn in enumerate(turns, 1):
        check_role(turn.role)
        if turn.role == "user":
            pieces, image = split_marks(turn.text, image)
        else:
            pieces = [Answer(turn.text, last=number == len(turns))]
        messages.append(Message(turn.role, tuple(pieces)))
    check_counts(image, n_images)
    return messages


def check_counts(n_marks: int, n_images: int) -> None:
    if n_marks != n_images:
        raise InputError(
            f"the text has {n_marks} {IMAGE_MARK} mark{'s' * (n_marks != 1)}, but the number of images given"
            f" is {n_images}; make them equal"
        )


def check_role(role: Any) -> None:
    if role not in ROLES:
        raise InputError(f"role: got {role!r}, allowed: {', '.join(ROLES)}")


def media_pieces(n_images: int, n_frames: int, prompt: PromptConfig, first: int = 0) -> list[Piece]:
    """Images one after the other, then a video: frames first + n_images, ..."""
    pieces: list[Piece] = [Mark(first + i) for i in range(n_images)]
    for i in range(n_frames):
        close = prompt.last_frame_close if i == n_frames - 1 else None
        pieces += [Markup(prompt.frame_join if i else prompt.video_open), Mark(first + n_images + i, close=close)]
    return [*pieces, Markup(prompt.video_close)] if n_frames else pieces


def string_pieces(text: str, n_images: int, n_frames: int, prompt: PromptConfig) -> list[Piece]:
    """A prompt string with its pictures: at the <image> marks, or before the text when it has none.

    A video always stands before the text. Pictures put before a text end with prompt.images_end, unless the text
    itself begins a line. Raises: InputError when marks and images disagree, or all is empty.
    """
    check_text(text, "prompt")
    if not text.strip() and not n_images and not n_frames:
        raise InputError("prompt: it is empty; write a question")
    pieces, n_marks = split_marks(text, 0)
    if n_marks == 0:
        line = line_before(text, prompt) if n_images and not n_frames else []
        return [*media_pieces(n_images, n_frames, prompt), *line, *pieces]
    check_counts(n_marks, n_images)
    return [*media_pieces(0, n_frames, prompt, first=n_images), *pieces]


def outline(value: Any) -> str:
    """A value in an error: what a dictionary has, the type of others. A picture's repr is an address in memory."""
    return f"a dictionary of {list(value)!r:.80}" if isinstance(value, Mapping) else type(value).__name__


def line_before(text: str, prompt: PromptConfig) -> list[Piece]:
    """What stands between a picture and a text that was not written around it."""
    return [Markup(prompt.images_end)] if prompt.images_end and text and not text.startswith("\n") else []


def messages_of_dicts(
    messages: Sequence[Mapping[str, Any]],
    images: Sequence[Any],
    prompt: PromptConfig,
    open_images: Callable[[list[Any]], Sequence[Any]],
    open_video: Callable[[Any], Sequence[Any]],
    *,
    answered: bool = False,
) -> tuple[list[Message], list[Any]]:
    """Messages as dictionaries {"role", "content"} -> messages, and all images in order.

    content is a string, or a list of parts: {"type": "text", "text"}, {"type": "image", "image" | "path" | "url" |
    "base64"} and {"type": "video", "video" | "path" | "url"}. An image part without a source takes the next one of
    `images`. Text is never searched for marks. open_images: what to keep of the pictures' sources, called once with
    all; open_video: a video's -> its frames. answered: the last message may be the assistant's.
    """
    if isinstance(messages, Mapping) or not messages:
        raise InputError("messages: expected a list with at least one user message")
    given, sources, result = list(images), list[Any](), list[Message]()
    pictures: list[int] = []  # of the sources, which are not frames
    for number, message in enumerate(messages, 1):
        where = f"message {number}"
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise InputError(f"{where}: expected a dictionary with 'role' and 'content', got {outline(message)}")
        check_role(message["role"])
        if message["role"] != ROLES[(number - 1) % 2]:
            raise InputError(f"{where}: role {message['role']!r}; user and assistant take turns, user first")
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, Sequence):
            raise InputError(f"{where}: content is a string or a list of parts, got {type(content).__name__}")
        pieces: list[Piece] = []
        for part in parts:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind == "text":
                text: Any = part.get("text")
                check_text(text, f"{where}: text")
                line = line_before(text, prompt) if pieces and isinstance(pieces[-1], Mark) else []
                pieces += [*line, Plain(text)]
            elif kind == "image" and message["role"] == "user":
                if (source := source_of(part, kind)) is None and not given:
                    raise InputError(f"{where}: an image part has neither 'image' nor 'path', and no image is left")
                pieces.append(Mark(len(sources)))
                pictures.append(len(sources))
                sources.append(given.pop(0) if source is None else source)
            elif kind == "video" and message["role"] == "user":
                if (source := source_of(part, kind)) is None:
                    raise InputError(f"{where}: a video part has neither 'video' nor 'path'")
                frames = open_video(source)
                pieces += media_pieces(0, len(frames), prompt, first=len(sources))
                sources += frames
            else:
                raise InputError(f"{where}: a part {f'of type {kind!r:.40}' if kind else f'that is {outline(part)}'};"
                                 " allowed: text; image and video in a user's message")  # fmt: skip
        if message["role"] == "assistant":
            text = "".join(piece.text for piece in pieces if isinstance(piece, Plain))
            pieces = [Answer(text, last=number == len(messages))]
        result.append(Message(message["role"], tuple(pieces)))
    if given:
        raise InputError(f"messages: {len(given)} of {len(images)} images have no image part; add parts or drop them")
    if result[-1].role != "user" and not answered:
        raise InputError("messages: the last one is the assistant's; end with a user's message")
    if not any(not isinstance(piece, Plain) or piece.text.strip() for piece in result[-1].pieces):
        raise InputError("prompt: the last message is empty; write a question")
    for place, source in zip(pictures, open_images([sources[place] for place in pictures]), strict=True):
        sources[place] = source
    return result, sources


def source_of(part: Mapping[str, Any], kind: str) -> Any:
    """What a part names: a picture or video, its path or address, or a file's bytes in base64."""
    if part.get("base64") is None:
        return next((part[key] for key in (kind, "path", "url") if part.get(key) is not None), None)
    try:
        return from_base64(part["base64"])
    except (ValueError, AttributeError):
        raise InputError(f"base64: got {part['base64']!r:.80}, which is not the base64 text of a file") from None
