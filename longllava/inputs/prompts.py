"""A prompt, string or messages, as pieces of the model's layout, with its pictures in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from longllava.errors import InputError
from longllava.inputs.chat import Message, Piece, messages_of_dicts, string_pieces
from longllava.inputs.media import listed
from longllava.inputs.processor import Processor
from longllava.inputs.tiles import expand

Prompt = str | Sequence[Mapping[str, Any]]
Media = Callable[[Any, Any], tuple[list[Any], int, int]]  # (images, video) -> sources, number of images, of frames


def prompt_turns(
    prompt: Prompt, images: Any, video: Any, processor: Processor, media: Media, *, answered: bool = False
) -> tuple[list[Piece], list[Any]]:
    """All turns of a prompt with their template, and the sources of its pictures as the marks number them.

    A string is a user's turn. answered: messages may end with the assistant's. Raises: InputError.
    """
    if isinstance(prompt, str):
        sources, n_images, n_frames = media(images, video)
        pieces = string_pieces(prompt, n_images, n_frames, processor.prompt)
        messages = [Message("user", tuple(pieces))]
    elif isinstance(prompt, (list, tuple)):
        if video is not None:
            raise InputError('messages: give the video as a part {"type": "video", "video": path}')
        messages, sources = messages_of_dicts(
            list(prompt), listed(images), processor.prompt, lambda sources: media(sources, None)[0],
            lambda source: media(None, source)[0], answered=answered,
        )  # fmt: skip
    else:
        raise InputError(f"prompt: expected a string or a list of messages, got {type(prompt).__name__}")
    turns: list[Piece] = []
    opened: list[Any] = []
    for message in messages:
        inside, more = expand(message.pieces, sources, processor.prompt, first=len(opened))
        turns += processor.turn(Message(message.role, tuple(inside)))
        opened += more
    return turns, opened
