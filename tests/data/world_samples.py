"""Samples of the picture world's tasks, and what they ask."""

from __future__ import annotations

from longllava.data.samples import Sample
from longllava.data.worlds import questions
from longllava.data.worlds.pictures import GRID, PREFIX, PicturePool, parse_reference
from longllava.data.worlds.render import PictureSpec
from longllava.data.worlds.tasks import WorldTask

POOL = {split: PicturePool(split) for split in ("train", "test")}
BY_THING = [(kind, wording) for kind, wordings in questions.BY_THING.items() for wording in wordings]
BY_VALUE = [("number", w) for w in questions.BY_NUMBER] + [("colour", w) for w in questions.BY_COLOUR]


def samples(name: str, n: int = 60, split: str = "train", seed: int = 0, **settings) -> list[Sample]:
    task = WorldTask(name, split=split, seed=seed, settings=settings, pool=POOL[split])
    return [task.sample(index) for index in range(n)]


def specs_of(sample: Sample) -> list[PictureSpec | None]:
    return [None if image.startswith(PREFIX + GRID) else parse_reference(image) for image in sample.images]


def key_of(wording: str, text: str) -> str | None:
    """What fills the one {} of a wording in a text, or None."""
    before, after = wording.split("{}")
    if text.startswith(before) and text.endswith(after) and len(text) > len(before) + len(after):
        return text[len(before) : len(text) - len(after)]
    return None


def asked(sample: Sample) -> list[tuple[str, str]]:
    """(question, answer) pairs, without what stands before the first question."""
    return [
        (question.text.rpartition("\n")[2], answer.text)
        for question, answer in zip(sample.turns[::2], sample.turns[1::2])
    ]
