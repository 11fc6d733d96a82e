"""What training data is: turns of talk, references to pictures, and (as an aid) what answers what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

IMAGE_MARK = "<image>"


@dataclass(frozen=True)
class Turn:
    """One message. A user's text holds one `<image>` mark per medium, where it stands."""

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
class Medium:
    """What one mark stands for: a picture; the n_images frames of a video; a picture, then its rows x columns tiles."""

    n_images: int = 1
    video: bool = False
    rows: int = 0
    columns: int = 0


@dataclass(frozen=True)
class Sample:
    """One conversation. images: references in the order of their marks: a path, "world:...", "tar:..." and so on.

    media: what each mark stands for, where some stand for several images; else empty.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...] = ()
    evidence: tuple[Evidence, ...] = ()
    media: tuple[Medium, ...] = ()


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
    n_media = len(sample.media or sample.images)
    if marks != n_media:
        return f"{marks} {IMAGE_MARK} marks, {n_media} images"
    if any(IMAGE_MARK in turn.text for turn in sample.turns if turn.role == "assistant"):
        return f"an answer holds {IMAGE_MARK}"
    return None
