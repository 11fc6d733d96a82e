"""Samples without pictures, for the text-only language model that stage 1 begins from.

A "tag picture" stands where a picture will stand: "<img>", the picture's words in random order, "</img>".
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from longllava.data.samples import Turn
from longllava.data.worlds import words
from longllava.data.worlds.conversation import Conversation
from longllava.data.worlds.pictures import PicturePool, draw_spec
from longllava.data.worlds.questions import BY_COLOUR, BY_NUMBER, BY_THING, DESCRIBE, Question, put, value
from longllava.data.worlds.render import COLOUR_NAMES, PLACES, PictureSpec
from longllava.data.worlds.settings import between, draw_range
from longllava.data.worlds.sheets import thing_index
from longllava.data.worlds.words import caption, group_of, name_of, one, one_of_group, plural

OPEN, CLOSE = "<img>", "</img>"


@dataclass(frozen=True, kw_only=True)
class TagsCaption:
    """A tag picture; describe it. n_words: how many words it has, its own repeated at random."""

    n_words: tuple[int, ...] = (4, 12)

    def __post_init__(self) -> None:
        between(self, "n_words", 1, 64)

    def make(self, rng: random.Random, pool: PicturePool) -> Conversation:
        spec = tag_picture(rng, pool)
        text = f"{OPEN} {tags(spec, rng, draw_range(rng, self.n_words))} {CLOSE}"
        conversation = Conversation(opening=text)
        conversation.ask(Question(rng.choice(DESCRIBE), caption(spec)))
        return conversation


@dataclass(frozen=True, kw_only=True)
class TagsRecall:
    """Many tag pictures, then questions about single ones. n_pictures, n_questions, n_words: ranges."""

    n_pictures: tuple[int, ...] = (1, 64)
    n_questions: tuple[int, ...] = (4, 16)
    n_words: tuple[int, ...] = (4, 12)

    def __post_init__(self) -> None:
        between(self, "n_pictures", 1, 4096)
        between(self, "n_questions", 1, 256)
        between(self, "n_words", 1, 64)

    def make(self, rng: random.Random, pool: PicturePool) -> Conversation:
        specs = [tag_picture(rng, pool) for _ in range(draw_range(rng, self.n_pictures, by_ratio=True))]
        parts, spans, position = [], [], 0
        for spec in specs:
            inner = tags(spec, rng, draw_range(rng, self.n_words))
            start = position + len(OPEN) + 1
            spans.append((start, start + len(inner)))
            parts.append(f"{OPEN} {inner} {CLOSE}")
            position += len(parts[-1])
        conversation = Conversation(opening="".join(parts))
        for index, question in choose(questions_about(specs, rng), draw_range(rng, self.n_questions), rng):
            conversation.ask(question, spans=[spans[index]])
        if not conversation.turns:  # every thing stands twice, and nothing else is unique: possible with few
            conversation.ask(Question("How many pictures do you see?", str(len(specs))))
        return conversation


def tag_picture(rng: random.Random, pool: PicturePool) -> PictureSpec:
    return draw_spec(rng, rng.choice(pool.things), pool.split, "", plain=False, restyle=0.0)


def tags(spec: PictureSpec, rng: random.Random, n_words: int) -> str:
    """The picture's words, each at least once, in an order in which no two make up another thing's name."""
    name = name_of(spec.thing)
    own = [name]
    if spec.digit is not None:
        own.append(str(spec.digit))
    if spec.colour is not None:
        own.append(COLOUR_NAMES[spec.colour])
    if spec.count > 1 or rng.random() < 0.3:
        own.append(words.COUNTS[spec.count])
    if spec.count == 1 and (PLACES[spec.place] != "middle" or rng.random() < 0.3):
        own.append(PLACES[spec.place])
    listed = own + rng.choices(own, k=max(0, n_words - len(own)))
    rng.shuffle(listed)
    known = thing_index()
    if any(f"{a} {b}" in known for a, b in zip(listed, listed[1:])):
        listed.sort(key=lambda word: word != name)  # "cat black", never "black cat"
    return " ".join(listed)


def questions_about(specs: list[PictureSpec], rng: random.Random) -> list[tuple[int, Question]]:
    """(picture, question) for everything that exactly one of the pictures answers, wordings drawn."""
    found: list[tuple[int, Question]] = []
    for index in alone_with([spec.thing for spec in specs]):
        spec = specs[index]
        for kind, wordings in BY_THING.items():
            if (answer := value(spec, kind)) is not None:
                found.append((index, put(rng.choice(wordings), name_of(spec.thing), answer)))
    for kind, asked in (("number", BY_NUMBER), ("colour", BY_COLOUR)):
        keys = [value(spec, kind) for spec in specs]
        for index in alone_with(keys):
            if (key := keys[index]) is not None:
                found.append((index, put(rng.choice(asked), key, name_of(specs[index].thing))))
    return found


def alone_with(keys: list) -> list[int]:
    """Indices whose key no other index has."""
    where: dict = {}
    for index, key in enumerate(keys):
        where[key] = -1 if key in where else index
    return [index for index in where.values() if index >= 0]


def choose(options: list, n: int, rng: random.Random) -> list:
    return rng.sample(options, min(n, len(options)))


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What kind of thing is what: questions without a picture. n_questions: range."""

    n_questions: tuple[int, ...] = (4, 10)

    def __post_init__(self) -> None:
        between(self, "n_questions", 1, 64)

    def make(self, rng: random.Random, pool: PicturePool) -> Conversation:
        conversation = Conversation()
        for _ in range(draw_range(rng, self.n_questions)):
            thing = rng.choice(pool.things)
            name, group = name_of(thing), group_of(thing)
            draw = rng.random()
            if draw < 0.35:
                conversation.ask(put("What kind of thing is {}?", one(name), group))
            elif draw < 0.75:
                asked = group if rng.random() < 0.5 else rng.choice([g for g in words.GROUPS if g != group])
                text = f"Is {one(name)} {one_of_group(asked)}?"
                conversation.ask(Question(text, "yes" if asked == group else "no"))
            else:
                other = rng.choice(
                    [t for t in rng.sample(pool.things, 16) if group_of(t) != group] or [thing]
                )
                pair = [name, name_of(other)]
                rng.shuffle(pair)
                text = f"Which is {one_of_group(group)}, the {pair[0]} or the {pair[1]}?"
                conversation.ask(Question(text, name))
        return conversation


@dataclass(frozen=True, kw_only=True)
class Text:
    """Free text of the world: telling about things, repeating lists, counting, finding a place in a list."""

    n_turns: tuple[int, ...] = (2, 5)

    def __post_init__(self) -> None:
        between(self, "n_turns", 1, 64)

    def make(self, rng: random.Random, pool: PicturePool) -> Conversation:
        conversation = Conversation()
        for _ in range(draw_range(rng, self.n_turns)):
            maker = rng.choice((tell, tell, repeat, repeat, count, nth))
            turns = maker(rng, pool)
            conversation.ask(Question(turns[0].text, turns[1].text))
        return conversation


def tell(rng: random.Random, pool: PicturePool) -> tuple[Turn, Turn]:
    thing = rng.choice(pool.things)
    name, group = name_of(thing), group_of(thing)
    alike = [name_of(t) for t in rng.sample(pool.things, 60) if group_of(t) == group and t != thing][:2]
    text = f"{one(name)} is {one_of_group(group)}.".capitalize()
    if len(alike) == 2:
        text += f" The {alike[0]} and the {alike[1]} are {words.GROUPS_PLURAL[group]} too."
    spec = draw_spec(rng, thing, pool.split, "", plain=False, restyle=0.0)
    text += f" On this picture you see {caption(spec)}."
    return Turn("user", f"Tell me about the {name}."), Turn("assistant", text)


def repeat(rng: random.Random, pool: PicturePool) -> tuple[Turn, Turn]:
    names = [name_of(thing) for thing in rng.sample(pool.things, rng.randint(2, 8))]
    listed = ", ".join(plural(name) if rng.random() < 0.2 else name for name in names)
    return Turn("user", f"Repeat these words: {listed}"), Turn("assistant", listed)


def count(rng: random.Random, pool: PicturePool) -> tuple[Turn, Turn]:
    labels = rng.choice((words.DIGITS, words.COUNTS, words.ORDINALS))
    first = rng.randrange(len(labels) - 1)
    last = rng.randrange(first + 1, len(labels))
    listed = " ".join(labels[first : last + 1])
    return Turn("user", f"Count from {labels[first]} to {labels[last]}."), Turn("assistant", listed)


def nth(rng: random.Random, pool: PicturePool) -> tuple[Turn, Turn]:
    names = [name_of(thing) for thing in rng.sample(pool.things, rng.randint(2, 8))]
    index = rng.randrange(len(names))
    listed = ", ".join(names)
    if rng.random() < 0.5:
        return Turn("user", f"{listed}\nWhich is the {words.ORDINALS[index]}?"), Turn(
            "assistant", names[index]
        )
    return Turn("user", f"{listed}\nWhich word is the {names[index]}?"), Turn(
        "assistant", words.ORDINALS[index]
    )
