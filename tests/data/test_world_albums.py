"""Tasks of several pictures: each needle alone in its haystack, every answer true to the pictures."""

from __future__ import annotations

import time
from collections import Counter

import pytest

from longllava.data.samples import IMAGE_MARK, Sample
from longllava.data.worlds import questions, words
from longllava.data.worlds.pictures import parse_grid, parse_reference
from longllava.data.worlds.render import COLOUR_NAMES, PictureSpec
from longllava.data.worlds.sheets import thing_index
from longllava.data.worlds.tasks import WorldTask
from tests.data.world_samples import BY_THING, BY_VALUE, POOL, asked, key_of, samples, specs_of


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
    together = sum(answers.values(), Counter())
    assert 0.35 < together["yes"] / together.total() < 0.41  # who always says no is right in three of five


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


def test_a_haystack_of_256_is_made_in_milliseconds() -> None:
    task = WorldTask("needle", settings={"n_images": [256, 256], "n_questions": [32, 32]}, pool=POOL["train"])
    started = time.process_time()
    for index in range(40):
        task.sample(index)
    assert (time.process_time() - started) / 40 < 0.02  # 3 ms when written
