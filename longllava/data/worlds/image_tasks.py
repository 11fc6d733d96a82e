"""Samples about one picture (stages 1 and 2)."""

from __future__ import annotations

import random
from dataclasses import dataclass

from longllava.data.worlds.conversation import Conversation
from longllava.data.worlds.pictures import PicturePool
from longllava.data.worlds.questions import Question, alone, describe, yes_or_no
from longllava.data.worlds.render import PictureSpec
from longllava.data.worlds.settings import between, draw_range
from longllava.data.worlds.words import group_of

# How often each kind is asked; what a thing is, and its number and colour, carry the later stages.
KINDS = {
    "thing": 4,
    "number": 3,
    "colour": 3,
    "copies": 1,
    "place": 1,
    "kind": 1,
    "describe": 2,
    "yes or no": 3,
}
YES_OR_NO = ("thing", "thing", "number", "colour", "kind")
SIBLINGS = 0.3  # share of wrong suggestions that are of the right kind


@dataclass(frozen=True, kw_only=True)
class Caption:
    """One picture; describe it."""

    def make(self, rng: random.Random, pool: PicturePool) -> Conversation:
        index = pool.draw(rng)
        conversation = Conversation([pool.reference(index)])
        conversation.ask(describe(pool.spec(index), rng))
        return conversation


@dataclass(frozen=True, kw_only=True)
class Single:
    """One picture, several questions of all kinds. n_questions: range."""

    n_questions: tuple[int, ...] = (3, 6)

    def __post_init__(self) -> None:
        between(self, "n_questions", 1, 64)

    def make(self, rng: random.Random, pool: PicturePool) -> Conversation:
        index = pool.draw(rng)
        spec = pool.spec(index)
        conversation = Conversation([pool.reference(index)])
        wanted = 2 * draw_range(rng, self.n_questions)
        asked: set[str] = set()
        while len(conversation.turns) < wanted:
            kind = rng.choices(tuple(KINDS), tuple(KINDS.values()))[0]
            question = ask_one(spec, kind, rng, pool)
            if question is not None and (question.text not in asked or len(asked) > 24):
                asked.add(question.text)
                conversation.ask(question)
        return conversation


def ask_one(spec: PictureSpec, kind: str, rng: random.Random, pool: PicturePool) -> Question | None:
    if kind == "describe":
        return describe(spec, rng)
    if kind != "yes or no":
        return alone(spec, kind, rng)
    asked, truth = rng.choice(YES_OR_NO), rng.random() < 0.5
    for _ in range(24):  # until the two differ; a sibling of the same kind may take a few draws
        other = pool.spec(pool.draw(rng))
        siblings = group_of(other.thing) == group_of(spec.thing)
        if asked != "thing" or truth or siblings or rng.random() > SIBLINGS:
            question = yes_or_no(spec, truth, other, asked, rng)
            if question is not None or truth:
                return question
    return None
