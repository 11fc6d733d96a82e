"""Building a sample turn by turn; evidence in the question's characters becomes the turn's."""

from __future__ import annotations

from collections.abc import Sequence

from longllava.data.samples import IMAGE_MARK, Evidence, Sample, Turn
from longllava.data.worlds.questions import Question


class Conversation:
    """Pictures (or a text) first, then questions and answers.

    opening: what stands before the first question, in the same turn. Each question may name the pictures
    (indices) or the spans (start, end) of the opening that answer its key.
    """

    def __init__(self, images: Sequence[str] = (), opening: str | None = None) -> None:
        self.images = tuple(images)
        self.opening = IMAGE_MARK * len(images) if opening is None else opening
        self.turns: list[Turn] = []
        self.evidence: list[Evidence] = []

    def ask(
        self, question: Question, images: Sequence[int] = (), spans: Sequence[tuple[int, int]] = ()
    ) -> None:
        self.ask_about([(question.start, question.end)], question.text, question.answer, [images], [spans])

    def ask_about(
        self, keys: Sequence[tuple[int, int]], text: str, answer: str,
        images: Sequence[Sequence[int]] = (), spans: Sequence[Sequence[tuple[int, int]]] = (),
    ) -> None:  # fmt: skip
        """As `ask`, for a question with several keys, each with its own pictures or spans."""
        turn = len(self.turns)
        before = f"{self.opening}\n" if turn == 0 and self.opening else ""
        for (start, end), indices in zip(keys, images):
            for index in indices:
                self.evidence.append(Evidence(turn, len(before) + start, len(before) + end, image=index))
        for (start, end), places in zip(keys, spans):
            for first, last in places:
                self.evidence.append(
                    Evidence(turn, len(before) + start, len(before) + end, key=(0, first, last))
                )
        self.turns += [Turn("user", before + text), Turn("assistant", answer)]

    def sample(self, name: str) -> Sample:
        return Sample(name, tuple(self.turns), self.images, tuple(self.evidence))
