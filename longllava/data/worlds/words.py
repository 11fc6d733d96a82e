"""The words of the picture world: names, articles, plurals, number words, and how a picture is captioned."""

from __future__ import annotations

from longllava.data.worlds.render import COLOUR_NAMES, PLACES, PictureSpec
from longllava.data.worlds.sheets import things

COUNTS = ("zero", "one", "two", "three", "four", "five", "six")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
DIGITS = tuple("0123456789")
GROUPS_PLURAL = {
    "animal": "animals", "food": "foods", "place": "places", "game": "games", "object": "objects",
    "plant": "plants", "vehicle": "vehicles", "weather": "weather", "clothing": "clothing", "tool": "tools",
    "instrument": "instruments",
}  # fmt: skip
GROUPS = tuple(GROUPS_PLURAL)
SOUNDS_LIKE_CONSONANT = ("unicorn", "euro", "one ")
SOUNDS_LIKE_VOWEL = ("hourglass", "8", "x ray")


def name_of(thing: int) -> str:
    return things()[thing].name


def group_of(thing: int) -> str:
    return things()[thing].group


def article(noun: str) -> str:
    """ "a" or "an", by the sound of the noun's first letter."""
    if noun.startswith(SOUNDS_LIKE_CONSONANT):
        return "a"
    return "an" if noun.startswith((*"aeiou", *SOUNDS_LIKE_VOWEL)) else "a"


def one(noun: str) -> str:
    return f"{article(noun)} {noun}"


def one_of_group(group: str) -> str:
    """ "an animal"; kinds without a singular stay bare: "weather"."""
    return group if GROUPS_PLURAL[group] == group else one(group)


def plural(noun: str) -> str:
    """The noun and "s"; nouns that end in s stay, so that a name is one token in both numbers."""
    return noun if noun.endswith("s") else f"{noun}s"


def shown(spec: PictureSpec) -> str:
    """ "a water buffalo", or "two water buffalos"."""
    name = name_of(spec.thing)
    return one(name) if spec.count == 1 else f"{COUNTS[spec.count]} {plural(name)}"


def caption(spec: PictureSpec) -> str:
    """ "a water buffalo at the top left with the number 7 in a blue frame"; only what is on the picture."""
    words = [shown(spec)]
    if spec.count == 1 and PLACES[spec.place] != "middle":
        words.append(f"at the {PLACES[spec.place]}")
    if spec.digit is not None:
        words.append(f"with the number {spec.digit}")
    if spec.colour is not None:
        words.append(f"in {one(COLOUR_NAMES[spec.colour])} frame")
    return " ".join(words)
