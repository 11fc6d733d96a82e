"""What is asked about pictures, in 2-4 wordings each; the first wording is the one that evaluations use.

Each wording about one picture among many names what identifies it (the key: a thing, a digit, a colour or an
ordinal) once, late in the sentence, so that attention supervision has a token to act on.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from longllava.data.worlds.render import COLOUR_NAMES, PLACES, PictureSpec
from longllava.data.worlds.words import COUNTS, caption, group_of, name_of, one, one_of_group

# Asked by the thing, which one picture alone shows.
BY_THING: dict[str, tuple[str, ...]] = {
    "number": (
        "What number is on the picture with the {}?",
        "Which number goes with the {}?",
        "Number of the {}?",
    ),
    "colour": (
        "What colour is the frame of the picture with the {}?",
        "Which colour is the frame around the {}?",
        "Colour of the {}?",
    ),
    "place": ("Where on its picture is the {}?", "Which place has the {}?", "Place of the {}?"),
    "copies": (
        "How many things are on the picture with the {}?",
        "Which count goes with the {}?",
        "Count of the {}?",
    ),
}
# Asked by a number or colour, where one picture alone has it; the answer is the thing.
BY_NUMBER = ("What is on the picture with the number {}?", "Which thing goes with the number {}?")
BY_COLOUR = ("What is on the picture with the frame in {}?", "Which thing goes with the frame in {}?")
BY_ORDINAL = ("What is on the {} picture?", "Which thing does the {} picture show?")
WHICH_PICTURE = (
    "In which picture is the {}?",
    "Which picture shows the {}?",
    "Find the picture with the {}.",
)
HOW_MANY_PICTURES = ("How many pictures show {}?", "On how many pictures is there {}?")
FIRST_OF_TWO = ("Which comes first, the {} or the {}?", "Which of the two is seen first, the {} or the {}?")
LAST_OF_TWO = ("Which comes last, the {} or the {}?", "Which of the two is seen last, the {} or the {}?")
SAME = {
    "thing": ("Do the two pictures show the same thing?", "Is it the same thing on both pictures?"),
    "number": ("Do the two pictures have the same number?", "Is it the same number on both pictures?"),
    "colour": (
        "Do the two pictures have frames of the same colour?",
        "Is it the same frame on both pictures?",
    ),
}
# About the only picture.
ALONE = {
    "thing": ("What is on the picture?", "What is this?", "Which thing does the picture show?"),
    "number": ("What number is on the picture?", "Which number is shown?", "What number do you see?"),
    "colour": (
        "What colour is the frame?",
        "Which colour has the frame?",
        "What is the colour of the frame?",
    ),
    "copies": ("How many things are on the picture?", "How many are shown?", "How many do you see?"),
    "place": ("Where is it on the picture?", "Where is the thing?", "Which place has the thing?"),
    "kind": ("What kind of thing is it?", "Which kind of thing is this?", "What kind of thing is shown?"),
}
DESCRIBE = ("Describe the picture.", "What do you see on the picture?", "Write a caption.")
IS_IT = ("Is it {}?", "Is this {}?", "Does the picture show {}?")
IS_NUMBER = ("Is the number {}?", "Is {} the number on the picture?")
IS_COLOUR = ("Is the frame {}?", "Is it framed in {}?")


@dataclass(frozen=True)
class Question:
    """A question and its answer; text[start:end] is the key that names the picture asked about."""

    text: str
    answer: str
    start: int = 0
    end: int = 0


def put(wording: str, key: str, answer: str) -> Question:
    """`wording` with its one {} filled."""
    start = wording.index("{}")
    return Question(f"{wording[:start]}{key}{wording[start + 2 :]}", answer, start, start + len(key))


def value(spec: PictureSpec, kind: str) -> str | None:
    """The answer to a kind of question about a picture; None where the picture does not have it."""
    if kind == "thing":
        return name_of(spec.thing)
    if kind == "number":
        return None if spec.digit is None else str(spec.digit)
    if kind == "colour":
        return None if spec.colour is None else COLOUR_NAMES[spec.colour]
    if kind == "copies":
        return COUNTS[spec.count]
    if kind == "place":
        return PLACES[spec.place] if spec.count == 1 else None
    return group_of(spec.thing)


def by_thing(spec: PictureSpec, kind: str) -> Question | None:
    """A question about the picture that alone shows its thing; None where it has no answer."""
    answer = value(spec, kind)
    return None if answer is None else put(BY_THING[kind][0], name_of(spec.thing), answer)


def alone(spec: PictureSpec, kind: str, rng: random.Random) -> Question | None:
    wording, answer = rng.choice(ALONE[kind]), value(spec, kind)
    return None if answer is None else Question(wording, answer)


def describe(spec: PictureSpec, rng: random.Random) -> Question:
    return Question(rng.choice(DESCRIBE), caption(spec))


def yes_or_no(
    spec: PictureSpec, truth: bool, other: PictureSpec, kind: str, rng: random.Random
) -> Question | None:
    """ "Is it a cat?" about `spec`, or, when not `truth`, what `other` shows. None where both agree."""
    own, asked = value(spec, kind), value(spec if truth else other, kind)
    if own is None or asked is None or (own == asked) != truth:
        return None
    if kind == "thing":
        wording, asked = rng.choice(IS_IT), one(asked)
    elif kind == "kind":
        wording, asked = rng.choice(IS_IT), one_of_group(asked)
    else:
        wording = rng.choice(IS_NUMBER if kind == "number" else IS_COLOUR)
    return put(wording, asked, "yes" if truth else "no")
