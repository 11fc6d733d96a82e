"""Samples: the same for the same numbers, their evidence at its place; text and single pictures are true."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter

import pytest

from longllava.data.samples import IMAGE_MARK, Evidence, Sample, Turn, problem
from longllava.data.worlds import questions, words
from longllava.data.worlds.render import COLOUR_NAMES, PLACES, PictureSpec
from longllava.data.worlds.sheets import thing_index, things
from longllava.data.worlds.tasks import TASKS, WorldTask
from longllava.data.worlds.text_tasks import tags
from longllava.errors import ConfigError
from tests.data.world_samples import POOL, asked, key_of, samples, specs_of


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", TASKS)
def test_samples_can_be_trained_on_and_evidence_points_at_the_key(name: str, split: str) -> None:
    for sample in samples(name, split=split):
        assert problem(sample) is None, sample
        for item in sample.evidence:
            turn = sample.turns[item.turn]
            key = turn.text[item.start : item.end]
            assert turn.role == "user" and key and key == key.strip() and IMAGE_MARK not in key
            before, after = turn.text[item.start - 1 : item.start], turn.text[item.end : item.end + 1]
            assert before in {" ", "\n"} and not after.isalnum()
            if item.image is not None:
                spec = specs_of(sample)[item.image]
                ordinal = words.ORDINALS[item.image] if item.image < len(words.ORDINALS) else ""
                name_said = words.name_of(spec.thing)
                truths = {name_said, words.one(name_said), ordinal, str(spec.digit)}
                if spec.colour is not None:
                    truths.add(COLOUR_NAMES[spec.colour])
                assert key in truths
            else:
                at, start, end = item.key
                span = sample.turns[at].text[start:end]
                assert key in span and "<img>" not in span
                assert sample.turns[at].text[start - 6 : start] == "<img> "


def test_samples_are_the_same_in_another_process() -> None:
    program = (
        "import hashlib\n"
        "from longllava.data.worlds.tasks import TASKS, WorldTask\n"
        "print(hashlib.sha256(repr([WorldTask(n, seed=5).sample(i) for n in TASKS for i in (3, 1, 10**10)]"
        ").encode()).hexdigest())"
    )
    out = subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": "77"},
                         capture_output=True, text=True, check=True)  # fmt: skip
    here = [WorldTask(n, seed=5, pool=POOL["train"]).sample(i) for n in TASKS for i in (3, 1, 10**10)]
    assert out.stdout.strip() == hashlib.sha256(repr(here).encode()).hexdigest()


@pytest.mark.parametrize("name", TASKS)
def test_seeds_indices_and_splits_give_other_samples(name: str) -> None:
    bodies = {
        repr(s.turns) + repr(s.images)
        for seed in (0, 1)
        for split in POOL
        for s in samples(name, 20, split, seed)
    }
    assert len(bodies) > 70


@pytest.mark.parametrize(
    "name", ["caption", "single", "needle", "same", "order", "count", "retrieval", "subimage"]
)
def test_pictures_are_of_the_split(name: str) -> None:
    for split, parity in (("train", 0), ("test", 1)):
        for sample in samples(name, 10, split):
            assert all(spec is None or spec.seed % 2 == parity for spec in specs_of(sample))


def test_the_answers_of_recall_stand_in_the_tags() -> None:
    for sample in samples("tags-recall", 40, n_pictures=[8, 24]):
        text = sample.turns[0].text
        for number, item in enumerate(sample.evidence):
            answer = sample.turns[item.turn + 1].text
            span = text[item.key[1] : item.key[2]]
            one_or_middle = answer in ("one", "middle")  # said or not: they are what is usual
            assert item.turn == 2 * number and (answer in span or one_or_middle)
            key = sample.turns[item.turn].text[item.start : item.end]
            if key in thing_index() and not any(
                f" {key}" in name or f"{key} " in name for name in thing_index()
            ):
                others = text.replace(span, "").rpartition("\n")[0]
                assert f" {key} " not in others


def test_tags_never_make_up_another_name() -> None:
    import random

    rng = random.Random(0)
    for name, colour in (("cat", "black"), ("apple", "green"), ("car", "blue")):
        spec = PictureSpec(thing_index()[name], "noto", 3, COLOUR_NAMES.index(colour))
        for _ in range(50):
            text = tags(spec, rng, 8)
            assert f"{colour} {name}" not in text and {name, colour, "3"} <= set(text.split())


def test_captions_say_what_is_there() -> None:
    heart = thing_index()["water buffalo"]
    assert (
        words.caption(PictureSpec(heart, "noto", 7, 4)) == "a water buffalo with the number 7 in a blue frame"
    )
    assert words.caption(PictureSpec(heart, "noto", None, 1, 2)) == "two water buffalos in an orange frame"
    assert (
        words.caption(PictureSpec(thing_index()["owl"], "noto", 0, None, 1, PLACES.index("top left")))
        == "an owl at the top left with the number 0"
    )
    assert [words.one(n) for n in ("hourglass", "euro", "8ball", "unicorn face", "one piece swimsuit")] == [
        "an hourglass", "a euro", "an 8ball", "a unicorn face", "a one piece swimsuit"]  # fmt: skip
    assert (words.plural("scissors"), words.plural("cat")) == ("scissors", "cats")
    for sample in samples("caption", 30):
        assert sample.turns[1].text == words.caption(specs_of(sample)[0])


def test_single_picture_answers_are_true_and_half_of_them_no() -> None:
    answers: Counter = Counter()
    for sample in samples("single", 800):
        spec = specs_of(sample)[0]
        texts = [question for question, _ in asked(sample)]
        assert len(set(texts)) == len(texts)
        for question, answer in asked(sample):
            kind = next((k for k, wordings in questions.ALONE.items() if question in wordings), None)
            if kind is not None:
                assert answer == questions.value(spec, kind)
            elif question in questions.DESCRIBE:
                assert answer == words.caption(spec)
            else:
                keys = [
                    k
                    for w in (*questions.IS_IT, *questions.IS_NUMBER, *questions.IS_COLOUR)
                    if (k := key_of(w, question))
                ]
                group = words.one_of_group(words.group_of(spec.thing))
                colour = None if spec.colour is None else COLOUR_NAMES[spec.colour]
                truths = {words.one(words.name_of(spec.thing)), group, str(spec.digit), colour}
                assert answer == ("yes" if truths & set(keys) else "no"), (question, answer, spec)
                answers[answer] += 1
    assert 0.44 < answers["no"] / answers.total() < 0.56


def test_facts_are_true() -> None:
    for sample in samples("facts", 60):
        for question, answer in asked(sample):
            if answer in ("yes", "no"):
                thing = max((t for t in things() if question.startswith(f"Is {words.one(t.name)} ")),
                            key=lambda t: len(t.name))  # fmt: skip
                assert question.endswith(f" {words.one_of_group(thing.group)}?") == (answer == "yes")
            elif question.startswith("Which"):
                group = next(
                    g for g in words.GROUPS if question.startswith(f"Which is {words.one_of_group(g)},")
                )
                assert words.group_of(thing_index()[answer]) == group
            else:
                assert any(words.one(t.name) == question[22:-1] and t.group == answer for t in things())


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("needel", {}, "task: got 'needel', allowed: tags-caption, "),
        ("needle", {"n_image": [1, 2]}, "task needle: unknown key 'n_image'; did you mean 'n_images'"),
        ("needle", {"n_images": [9, 2]}, r"task needle: n_images: got \[9, 2\], expected \[low, high\]"),
        ("needle", {"n_images": 4}, "task needle: n_images: expected a list, got 4"),
        ("needle", {"siblings": 2}, "task needle: siblings: got 2.0"),
        ("count", {"n_images": [2, 7]}, r"task count: n_images: got \[2, 7\]"),
        ("caption", {"n_images": [1, 1]}, "task caption: unknown key 'n_images'"),
    ],
)
def test_settings_that_cannot_be(name: str, settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WorldTask(name, settings=settings)


def test_what_cannot_be_trained_on_is_said() -> None:
    user, answer = Turn("user", IMAGE_MARK), Turn("assistant", "a cat")
    assert problem(Sample("", (user, answer), ("a",), (Evidence(0, 0, 1, 0),))) is None
    assert problem(Sample("", ())) == "no turns"
    assert problem(Sample("", (user, answer))) == "1 <image> marks, 0 images"
    assert problem(Sample("", (answer, user))) == "turn 1 is the assistant's, expected the user's"
    assert problem(Sample("", (user, answer, user), ("a", "b"))) == "the last question has no answer"
    assert problem(Sample("", (user, Turn("assistant", " ")), ("a",))) == "turn 2: the answer is empty"
    assert problem(Sample("", (user, Turn("assistant", IMAGE_MARK)), ("a",))) == "an answer holds <image>"
