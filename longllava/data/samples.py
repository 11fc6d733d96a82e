"""What training data is: turns of talk, references to pictures, and (as an aid) what answers what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

IMAGE_MARK = "<image>"


@dataclass(frozen=True)
class Turn:
    """One message. A user's text holds one `<image>` mark per picture, where the picture stands."""

    role: Literal["user", "assistant"]
    text: str


@dataclass(frozen=True)
class Evidence:
    """Characters start..end of turn `turn` are answered by picture `image`, or by the text span `key`.

    A training aid only (attention supervision). Exactly one of image (index into Sample.images) and key
    (turn, start, end) is given.
    """

    turn: int
    start: int
    end: int
    image: int | None = None
    key: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Sample:
    """One conversation. images: references in the order of their marks: a path, or "world:..."."""

    id: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...] = ()
    evidence: tuple[Evidence, ...] = ()


def problem(sample: Sample) -> str | None:
    """Why a sample cannot be trained on, in a few words; None when it can."""
    if not sample.turns:
        return "no turns"
    for index, turn in enumerate(sample.turns):
        expected = "user" if index % 2 == 0 else "assistant"
        if turn.role != expected:
            return f"turn {index + 1} is the {turn.role}'s, expected the {expected}'s"
        if turn.role == "assistant" and not turn.text.strip():
            return f"turn {index + 1}: the answer is empty"
    if len(sample.turns) % 2:
        return "the last question has no answer"
    marks = sum(turn.text.count(IMAGE_MARK) for turn in sample.turns if turn.role == "user")
    if marks != len(sample.images):
        return f"{marks} {IMAGE_MARK} marks, {len(sample.images)} images"
    if any(IMAGE_MARK in turn.text for turn in sample.turns if turn.role == "assistant"):
        return f"an answer holds {IMAGE_MARK}"
    return None
