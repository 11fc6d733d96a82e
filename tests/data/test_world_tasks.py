"""Samples: the same for the same numbers, true to the pictures, each needle alone in its haystack."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections import Counter

import pytest

from longllava.data.samples import IMAGE_MARK, Evidence, Sample, Turn, problem
from longllava.data.worlds import questions, words
from longllava.data.worlds.pictures import GRID, PREFIX, PicturePool, parse_grid, parse_reference
from longllava.data.worlds.render import COLOUR_NAMES, PLACES, PictureSpec
from longllava.data.worlds.sheets import thing_index, things
from longllava.data.worlds.tasks import TASKS, WorldTask
from longllava.data.worlds.text_tasks import tags
from longllava.errors import ConfigError

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


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0.0, 0.0), (0.2, 0.1, 0.3), (1.0, 1.0, 1.0)])
def test_the_share_of_needles_asked_by_a_value_is_kept(share: float, low: float, high: float) -> None:
    drawn = samples("needle", 80, n_images=[4, 8], n_questions=[2, 3], by_value=share)
    asked = [turn.text for sample in drawn for turn in sample.turns if turn.role == "user"]
    # with a thing's share of 1, a sample where no value stands alone asks nothing else than its fallback
    asked = [text.split("\n")[-1] for text in asked]
    values = (*words.DIGITS, *COLOUR_NAMES)
    by_value = [any(key_of(wording, text) in values for _, wording in BY_VALUE) for text in asked]
    counting = [any(key_of(wording, text) for kind, wording in BY_THING if kind == "copies") for text in asked]
    told = [value for value, count in zip(by_value, counting, strict=True) if value or not count]
    assert low <= sum(told) / len(told) <= high


@pytest.mark.parametrize(
    "name", ["caption", "single", "needle", "same", "order", "count", "retrieval", "subimage"]
)
def test_pictures_are_of_the_split(name: str) -> None:
    for split, parity in (("train", 0), ("test", 1)):
        for sample in samples(name, 10, split):
            assert all(spec is None or spec.seed % 2 == parity for spec in specs_of(sample))


def check_needle(sample: Sample, question: str, answer: str, index: int, specs: list[PictureSpec]) -> None:
    """The question is about specs[index], which alone has its key, and the answer is right."""
    for kind, wording in BY_THING:
        if (key := key_of(wording, question)) is not None and key in thing_index():
            assert [words.name_of(spec.thing) for spec in specs].count(key) == 1
            assert specs[index].thing == thing_index()[key] and answer == questions.value(specs[index], kind)
            return
    for kind, wording in BY_VALUE:
        if (key := key_of(wording, question)) is not None:
            assert [questions.value(spec, kind) for spec in specs].count(key) == 1
            assert questions.value(specs[index], kind) == key and answer == words.name_of(specs[index].thing)
            return
    raise AssertionError(f"no wording fits {question!r}")


@pytest.mark.parametrize("n_images", [(1, 1), (4, 16), (200, 256), (1000, 1000)])
def test_a_needle_stands_once_in_its_haystack(n_images: tuple[int, int]) -> None:
    n = 200 if n_images[1] <= 16 else 6
    for sample in samples("needle", n, n_images=n_images):
        assert n_images[0] <= len(sample.images) <= n_images[1]
        specs = specs_of(sample)
        pairs = asked(sample)
        assert len(sample.evidence) == len(pairs) == len({question for question, _ in pairs})
        for number, (question, answer) in enumerate(pairs):
            item = sample.evidence[number]
            assert item.turn == 2 * number
            check_needle(sample, question, answer, item.image, specs)


def test_numbers_of_images_and_questions_follow_the_settings() -> None:
    drawn = samples("needle", 80, n_images=[16, 64], n_questions=[8, 12])
    assert {16 <= len(s.images) <= 64 for s in drawn} == {True}
    assert sum(len(s.images) < 32 for s in drawn) in range(25, 56)  # half of them: evenly by ratio
    assert {len(s.turns) // 2 for s in drawn} == {8, 9, 10, 11, 12}


def test_siblings_fill_their_share_of_the_haystack() -> None:
    for sample in samples("needle", 5, n_images=[300, 300], siblings=0.6):
        groups = Counter(words.group_of(spec.thing) for spec in specs_of(sample))
        assert groups.most_common(1)[0][1] > 165


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


def test_same_is_true_and_even() -> None:
    answers: dict[str, Counter] = {kind: Counter() for kind in questions.SAME}
    for sample in samples("same", 400):
        first, second = specs_of(sample)
        assert sample.images[0] != sample.images[1]
        for question, answer in asked(sample):
            kind = next(k for k, wordings in questions.SAME.items() if question in wordings)
            equal = questions.value(first, kind) == questions.value(second, kind)
            assert answer == ("yes" if equal else "no")
            answers[kind][answer] += 1
    assert 0.4 < answers["thing"]["yes"] / answers["thing"].total() < 0.6
    for kind in ("number", "colour"):
        assert 0.2 < answers[kind]["yes"] / answers[kind].total() < 0.6, answers


def test_order_count_and_retrieval_are_true() -> None:
    for sample in samples("order", 100):
        names = [words.name_of(spec.thing) for spec in specs_of(sample)]
        for number, (question, answer) in enumerate(asked(sample)):
            pair = [item.image for item in sample.evidence if item.turn == 2 * number]
            first = min(pair) if "first" in question else max(pair)
            assert len(pair) == 2 and answer == names[first]
            assert all(f"the {names[index]}" in question for index in pair)
    counts: Counter = Counter()
    for sample in samples("count", 300):
        shown = [words.one(words.name_of(spec.thing)) for spec in specs_of(sample)]
        for question, answer in asked(sample):
            key = next(k for w in questions.HOW_MANY_PICTURES if (k := key_of(w, question)))
            assert words.COUNTS.index(answer) == shown.count(key)
            counts[answer] += 1
    assert set(counts) == set(words.COUNTS)
    for sample in samples("retrieval", 100):
        names = [words.name_of(spec.thing) for spec in specs_of(sample)]
        for question, answer in asked(sample):
            if answer in words.ORDINALS:
                assert names[words.ORDINALS.index(answer)] in question
            else:
                assert words.ORDINALS[names.index(answer)] in question


def test_sub_images_are_the_whole_and_its_tiles_row_by_row() -> None:
    for sample in samples("subimage", 40):
        n_columns, whole = parse_grid(sample.images[0])
        assert [parse_reference(image) for image in sample.images[1:]] == whole
        opening = sample.turns[0].text.rpartition("\n")[0].split("\n")
        assert opening[0] == IMAGE_MARK and set(opening[1:]) == {IMAGE_MARK * n_columns}
        for number, (question, answer) in enumerate(asked(sample)):
            check_needle(sample, question, answer, sample.evidence[number].image - 1, whole)


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


def test_a_haystack_of_256_is_made_in_milliseconds() -> None:
    task = WorldTask("needle", settings={"n_images": [256, 256], "n_questions": [32, 32]}, pool=POOL["train"])
    started = time.process_time()
    for index in range(40):
        task.sample(index)
    assert (time.process_time() - started) / 40 < 0.02  # 3 ms when written
