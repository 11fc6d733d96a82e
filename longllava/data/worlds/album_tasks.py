"""Samples about several pictures (stage 3). A thing that is asked for stands once in its album."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from longllava.data.samples import IMAGE_MARK
from longllava.data.worlds.conversation import Conversation
from longllava.data.worlds.pictures import PicturePool, grid_reference
from longllava.data.worlds.questions import (
    BY_COLOUR,
    BY_NUMBER,
    BY_ORDINAL,
    BY_THING,
    FIRST_OF_TWO,
    HOW_MANY_PICTURES,
    LAST_OF_TWO,
    SAME,
    WHICH_PICTURE,
    Question,
    put,
    value,
)
from longllava.data.worlds.render import PictureSpec
from longllava.data.worlds.settings import between, draw_range
from longllava.data.worlds.text_tasks import alone_with
from longllava.data.worlds.words import COUNTS, ORDINALS, group_of, name_of, one
from longllava.errors import ConfigError

# How often each kind of needle is asked for.
NEEDLES = {"number": 8, "colour": 8, "place": 2, "copies": 1}


@dataclass(frozen=True, kw_only=True)
class Needle:
    """A haystack of pictures, then questions about things that stand in it once.

    n_images, n_questions: ranges. siblings: share of the pictures whose things are of one kind (all animals),
    so that needles must be told from their like. by_value: share of needles asked for by their number or colour,
    where one picture alone has it.
    """

    n_images: tuple[int, ...] = (4, 16)
    n_questions: tuple[int, ...] = (8, 32)
    siblings: float = 0.3
    by_value: float = 0.2

    def __post_init__(self) -> None:
        between(self, "n_images", 1, 4096)
        between(self, "n_questions", 1, 256)
        for name in ("siblings", "by_value"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, must be a share between 0 and 1")

    def make(self, rng: random.Random, pool: PicturePool) -> Conversation:
        indices = album(rng, pool, draw_range(rng, self.n_images, by_ratio=True), self.siblings)
        conversation = Conversation([pool.reference(index) for index in indices])
        specs = [pool.spec(index) for index in indices]
        ask_needles(conversation, specs, draw_range(rng, self.n_questions), rng, by_value_share=self.by_value)
        return conversation


def album(rng: random.Random, pool: PicturePool, n: int, siblings: float) -> list[int]:
    """n pictures of the pool, at least one of whose things stands once."""
    family = of_group(pool)[group_of(rng.choice(pool.things))]
    while True:
        chosen = [rng.choice(family if rng.random() < siblings else pool.things) for _ in range(n)]
        if alone_with(chosen):
            return [pool.draw(rng, thing) for thing in chosen]
        siblings = 0.0


def of_group(pool: PicturePool) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for thing in pool.things:
        groups.setdefault(group_of(thing), []).append(thing)
    return groups


def ask_needles(
    conversation: Conversation, specs: Sequence[PictureSpec], n: int, rng: random.Random, first: int = 0,
    by_value_share: float = 0.2,
) -> None:  # fmt: skip
    """n questions (fewer if there is less to ask), evidence at the key; specs[i] is image first + i."""
    unique = alone_with([spec.thing for spec in specs])
    by_value = [
        (index, kind, wordings)
        for kind, wordings in (("number", BY_NUMBER), ("colour", BY_COLOUR))
        for index in alone_with([value(spec, kind) for spec in specs])
        if value(specs[index], kind) is not None
    ]
    asked: set[tuple[int, str]] = set()
    for _ in range(4 * n):
        if len(conversation.turns) >= 2 * n:
            break
        if by_value and rng.random() < by_value_share:
            index, kind, wordings = rng.choice(by_value)
            question = put(rng.choice(wordings), value(specs[index], kind) or "", name_of(specs[index].thing))
            kind = f"by {kind}"
        else:
            index = rng.choice(unique)
            kind = rng.choices(tuple(NEEDLES), tuple(NEEDLES.values()))[0]
            answer = value(specs[index], kind)
            if answer is None:
                continue
            question = put(rng.choice(BY_THING[kind]), name_of(specs[index].thing), answer)
        if (index, kind) not in asked:
            asked.add((index, kind))
            conversation.ask(question, images=[first + index])
    if not conversation.turns:  # one picture without number and frame, of several copies: it can be counted
        index = unique[0]
        conversation.ask(put(BY_THING["copies"][0], name_of(specs[index].thing), COUNTS[specs[index].count]),
                         images=[first + index])  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Same:
    """Two pictures: the same thing, number, colour of frame?

    Half of the answers about the thing are yes, and half of those about either number or colour, whichever is drawn for
    it; the other one agrees by chance. In all 38 % are yes.
    """

    def make(self, rng: random.Random, pool: PicturePool) -> Conversation:
        first = pool.draw(rng)
        second = pool.draw(rng, pool.spec(first).thing if rng.random() < 0.5 else None)
        wanted = rng.choice(("number", "colour"))
        agree = rng.random() < 0.5
        for _ in range(64):
            values = [value(pool.spec(index), wanted) for index in (first, second)]
            if None not in values and (values[0] == values[1]) == agree and first != second:
                break
            if pool.spec(first).digit is None or pool.spec(first).colour is None:
                first = pool.draw(rng, pool.spec(first).thing)
            second = pool.draw(rng, pool.spec(second).thing)
        specs = [pool.spec(first), pool.spec(second)]
        conversation = Conversation([pool.reference(first), pool.reference(second)])
        for kind in rng.sample(tuple(SAME), len(SAME)):
            one_value, other = (value(spec, kind) for spec in specs)
            if one_value is not None and other is not None:
                conversation.ask(Question(rng.choice(SAME[kind]), "yes" if one_value == other else "no"))
        return conversation


@dataclass(frozen=True, kw_only=True)
class Order:
    """Which of two things comes first, or last? n_images, n_questions: ranges."""

    n_images: tuple[int, ...] = (2, 6)
    n_questions: tuple[int, ...] = (2, 6)

    def __post_init__(self) -> None:
        between(self, "n_images", 2, 64)
        between(self, "n_questions", 1, 64)

    def make(self, rng: random.Random, pool: PicturePool) -> Conversation:
        chosen = rng.sample(pool.things, draw_range(rng, self.n_images))
        conversation = Conversation([pool.reference(pool.draw(rng, thing)) for thing in chosen])
        for _ in range(draw_range(rng, self.n_questions)):
            pair = rng.sample(range(len(chosen)), 2)
            names = [name_of(chosen[index]) for index in pair]
            first = rng.random() < 0.6
            text, keys = put_two(rng.choice(FIRST_OF_TWO if first else LAST_OF_TWO), *names)
            answer = names[pair.index(min(pair) if first else max(pair))]
            conversation.ask_about(keys, text, answer, images=[[index] for index in pair])
        return conversation


def put_two(wording: str, one_key: str, other: str) -> tuple[str, list[tuple[int, int]]]:
    """A wording with its two {} filled, and where the keys stand."""
    before, between_keys, after = wording.split("{}")
    start = len(before) + len(one_key) + len(between_keys)
    text = f"{before}{one_key}{between_keys}{other}{after}"
    return text, [(len(before), len(before) + len(one_key)), (start, start + len(other))]


@dataclass(frozen=True, kw_only=True)
class Count:
    """How many pictures show a thing? n_images: range, at most 6. Zero is asked now and then."""

    n_images: tuple[int, ...] = (2, 6)
    n_questions: tuple[int, ...] = (1, 3)

    def __post_init__(self) -> None:
        between(self, "n_images", 1, len(COUNTS) - 1)
        between(self, "n_questions", 1, 8)

    def make(self, rng: random.Random, pool: PicturePool) -> Conversation:
        n = draw_range(rng, self.n_images)
        kinds = rng.sample(pool.things, 3)
        shown = [kinds[0]] * rng.randint(1, n)
        shown += rng.choices(kinds[1:], k=n - len(shown))
        rng.shuffle(shown)
        conversation = Conversation([pool.reference(pool.draw(rng, thing)) for thing in shown])
        asked = rng.sample(sorted(set(shown)), min(len(set(shown)), draw_range(rng, self.n_questions)))
        if rng.random() < 0.2:
            asked[-1] = rng.choice([thing for thing in rng.sample(pool.things, 8) if thing not in shown])
        for thing in asked:
            where = [index for index, other in enumerate(shown) if other == thing]
            question = put(rng.choice(HOW_MANY_PICTURES), one(name_of(thing)), COUNTS[len(where)])
            conversation.ask(question, images=where)
        return conversation


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """In which picture is a thing, and what is on the third? n_images: range, at most 8."""

    n_images: tuple[int, ...] = (2, 8)
    n_questions: tuple[int, ...] = (2, 6)

    def __post_init__(self) -> None:
        between(self, "n_images", 1, len(ORDINALS))
        between(self, "n_questions", 1, 16)

    def make(self, rng: random.Random, pool: PicturePool) -> Conversation:
        chosen = rng.sample(pool.things, draw_range(rng, self.n_images))
        conversation = Conversation([pool.reference(pool.draw(rng, thing)) for thing in chosen])
        options = [(index, back) for index in range(len(chosen)) for back in (False, True)]
        n_questions = min(len(options), draw_range(rng, self.n_questions))
        for index, back in rng.sample(options, n_questions):
            name, ordinal = name_of(chosen[index]), ORDINALS[index]
            question = put(rng.choice(BY_ORDINAL), ordinal, name) if back else put(
                rng.choice(WHICH_PICTURE), name, ordinal)  # fmt: skip
            conversation.ask(question, images=[index])
        return conversation


@dataclass(frozen=True, kw_only=True)
class SubImage:
    """A large picture cut into tiles: the whole scaled to one image first, then its tiles row by row."""

    n_rows: tuple[int, ...] = (1, 3)
    n_columns: tuple[int, ...] = (2, 3)
    n_questions: tuple[int, ...] = (3, 8)

    def __post_init__(self) -> None:
        between(self, "n_rows", 1, 16)
        between(self, "n_columns", 1, 16)
        between(self, "n_questions", 1, 64)

    def make(self, rng: random.Random, pool: PicturePool) -> Conversation:
        n_rows, n_columns = draw_range(rng, self.n_rows), draw_range(rng, self.n_columns)
        indices = album(rng, pool, n_rows * n_columns, 0.0)
        tiles = tuple(pool.reference(index) for index in indices)
        row = IMAGE_MARK * n_columns
        opening = "\n".join([IMAGE_MARK] + [row] * n_rows)
        conversation = Conversation((grid_reference(n_columns, tiles), *tiles), opening)
        specs = [pool.spec(index) for index in indices]
        ask_needles(conversation, specs, draw_range(rng, self.n_questions), rng, first=1)
        return conversation
