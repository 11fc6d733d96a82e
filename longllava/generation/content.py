"""What a session has read, as one value: other threads find what was there before an append or after it."""

from __future__ import annotations

from typing import NamedTuple

from longllava.inputs.chat import Piece
from longllava.nn import AttentionState, State

MAX_SEGMENTS = 8  # of keys and values; more are copied together, since each costs an attention call


class Content(NamedTuple):
    """waiting: pieces that are read when it is known what follows them."""

    state: State
    n_tokens: int
    n_images: int
    waiting: list[Piece]


def compact(state: State) -> State:
    """The state with not too many segments of keys and values (one came with each append)."""
    return [
        layer.merged() if isinstance(layer, AttentionState) and len(layer.prefix) > MAX_SEGMENTS else layer
        for layer in state
    ]
