"""What the curriculum asks: the world's tasks on held-out pictures, each with the stage that teaches it.

Every sample is of the test split: combinations of thing, digit and frame, and renderings, that training never
saw. Samples follow from the seed alone, so all models answer the same questions and may be compared in pairs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from longllava.data.samples import Sample
from longllava.data.worlds import questions
from longllava.data.worlds.pictures import PicturePool, PoolSettings, parse_reference
from longllava.data.worlds.render import COLOUR_NAMES, PLACES
from longllava.data.worlds.sheets import STYLES
from longllava.data.worlds.tasks import WorldTask
from longllava.data.worlds.words import COUNTS, name_of
from longllava.errors import ConfigError

STAGES = ("foundation", "stage1", "stage2", "stage3")

# Which wordings tell which kind of question, for tasks that ask several kinds.
YES_OR_NO = (*questions.IS_IT, *questions.IS_NUMBER, *questions.IS_COLOUR)
ONE_OF_MANY = {
    **questions.BY_THING,
    "thing by number": questions.BY_NUMBER,
    "thing by colour": questions.BY_COLOUR,
}
KINDS: dict[str, Mapping[str, Sequence[str]]] = {
    "single": {**questions.ALONE, "yes or no": YES_OR_NO, "describe": questions.DESCRIBE},
    "same": questions.SAME,
    "needle": ONE_OF_MANY,
    "subimage": ONE_OF_MANY,
    "tags-recall": ONE_OF_MANY,
}


@dataclass(frozen=True)
class Task:
    """A row of the table. stage: the one that teaches it. world: the world's task and its settings.

    share: questions asked of it, in units of the number asked for. by_word: judged are the words of a caption
    that tell something (thing, number, colour, copies, place), each for itself, not the whole answer.
    """

    name: str
    about: str
    stage: str
    world: str
    settings: dict[str, Any] = field(default_factory=dict)
    share: float = 1.0
    by_word: bool = False


TASKS = (
    Task("recall", "text: what the words of a picture say", "foundation", "tags-recall", {"n_pictures": [1, 32]}),
    Task("facts", "text: what kind of thing is what", "foundation", "facts"),
    Task("words", "a picture described, telling words", "stage1", "caption", by_word=True),
    Task("caption", "a picture described, all of it right", "stage1", "caption"),
    # three times the questions: stage 3 is held to two points here
    Task("single", "questions about one picture", "stage2", "single", share=3.0),
    Task("same", "the same thing, number or frame on two?", "stage3", "same"),
    Task("order", "which of two comes first, or last?", "stage3", "order"),
    Task("count", "how many pictures show a thing?", "stage3", "count"),
    Task("retrieval", "in which picture, what on the third?", "stage3", "retrieval"),
    Task("subimage", "a large picture in tiles", "stage3", "subimage"),
    Task("needle@4", "one of 4 pictures", "stage3", "needle", {"n_images": [4, 4], "n_questions": [4, 8]}),
    Task("needle@16", "one of 16 pictures", "stage3", "needle", {"n_images": [16, 16], "n_questions": [8, 16]}),
    Task("needle@64", "one of 64 pictures", "stage3", "needle", {"n_images": [64, 64], "n_questions": [16, 32]}),
)


def tasks_named(names: Sequence[str]) -> list[Task]:
    """Tasks by name. Raises: ConfigError naming those there are."""
    known = {task.name: task for task in TASKS}
    for name in names:
        if name not in known:
            raise ConfigError(f"no task {name!r}; have {', '.join(known)}")
    return [known[name] for name in names]


def draw_samples(task: Task, n_questions: int, seed: int = 0, styles: Sequence[str] = STYLES) -> list[Sample]:
    """Samples of the test split until they hold n_questions * task.share questions; the last stays whole."""
    source = WorldTask(task.world, split="test", seed=seed, settings=task.settings, pool=pool(tuple(styles)))
    samples: list[Sample] = []
    n_asked = 0
    while n_asked < n_questions * task.share:
        samples.append(source.sample(len(samples)))
        n_asked += len(samples[-1].turns) // 2
    return samples


@cache
def pool(styles: tuple[str, ...]) -> PicturePool:
    return PicturePool("test", settings=PoolSettings(styles=styles))


def kind_of(task: Task, turn: str) -> str:
    """The kind of a question; "other" where its task has one kind only. turn: the user's, pictures included."""
    asked = turn.rpartition("\n")[2]
    return next((kind for kind, pattern in patterns(task.world) if pattern.fullmatch(asked)), "other")


def telling_words(sample: Sample) -> list[tuple[str, int, int]]:
    """(kind, start, end) of what the caption of a sample's picture says, in the characters of its answer."""
    spec, text = parse_reference(sample.images[0]), sample.turns[1].text
    name = name_of(spec.thing)
    said = [("thing", name, text.index(name))]
    if spec.count > 1:
        said.append(("copies", COUNTS[spec.count], 0))
    elif (start := text.rfind(f"at the {PLACES[spec.place]}")) >= 0:
        said.append(("place", PLACES[spec.place], start + len("at the ")))
    if spec.digit is not None:
        said.append(("number", str(spec.digit), text.rindex(f"number {spec.digit}") + len("number ")))
    if spec.colour is not None:
        said.append(("colour", COLOUR_NAMES[spec.colour], text.rindex(f"{COLOUR_NAMES[spec.colour]} frame")))
    return [(kind, start, start + len(word)) for kind, word, start in said]


@cache
def patterns(world: str) -> tuple[tuple[str, re.Pattern[str]], ...]:
    return tuple(
        (kind, re.compile("|".join(re.escape(wording).replace(r"\{\}", ".+") for wording in wordings)))
        for kind, wordings in KINDS.get(world, {}).items()
    )
