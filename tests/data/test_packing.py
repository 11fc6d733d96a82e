"""Packing: every sample once, none cut, none seen by its neighbours."""

from __future__ import annotations

import pytest
import torch

from longllava.data.packing import IGNORED, Cursor, Item, Misfit, best_fit, build_batch, encode_sample, plan_window
from longllava.data.samples import Evidence, Sample, Turn
from longllava.data.worlds.words import name_of
from longllava.errors import DataError
from longllava.nn import Context
from longllava.train.config import AidsConfig
from longllava.train.loop import Forward
from tests.tiny_world import world_model, world_samples


@pytest.fixture(scope="module")
def tiny():
    return world_model()


@pytest.fixture(scope="module")
def items(tiny) -> list[Item]:
    """Samples of all kinds, with pictures and without."""
    return [encode_sample(sample, tiny[1], None, number=i) for i, sample in enumerate(world_samples("nano/stage3", 24))]


def features(references: list[str]) -> torch.Tensor:
    """Pooled features that depend on the picture alone."""
    rows = [torch.Generator().manual_seed(sum(map(ord, reference))) for reference in references]
    return torch.stack([torch.randn(4, 16, generator=generator) for generator in rows])


def run(tiny, batch, grounding_weight: float = 0.0):
    model, _ = tiny
    images = features(batch.refs) if batch.refs else None
    return Forward(model, AidsConfig(grounding_weight=grounding_weight))(batch, images, None)


def packed(tiny, rows: list[list[Item]], spare: int = 0):
    length = max(sum(map(len, row)) for row in rows) + spare
    return build_batch(rows, length, tiny[1].tokenizer.pad_id)


def test_losses_and_gradients_are_those_of_the_samples_alone(tiny, items) -> None:
    model, _ = tiny
    rows = [items[:8], items[8:11], items[11:20]]
    parameters = [p for name, p in model.named_parameters() if not name.startswith("encoder")]
    loss, measured = run(tiny, packed(tiny, rows, spare=7))
    together = torch.autograd.grad(loss, parameters)
    apart = [run(tiny, packed(tiny, [[item]])) for item in items[:20]]
    alone = torch.autograd.grad(sum(loss for loss, _ in apart), parameters)
    torch.testing.assert_close(loss, sum(loss for loss, _ in apart), rtol=1e-5, atol=0)
    assert measured["accuracy"] == sum(measured["accuracy"] for _, measured in apart)
    for got, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=2e-5 * float(expected.abs().max() + 1))


def test_every_position_of_a_packed_row_is_as_alone(tiny, items) -> None:
    model, _ = tiny

    def hidden(batch) -> torch.Tensor:
        images = model.image_tokens(features(batch.refs)) if batch.refs else None
        x_BLD = model.embed(batch.ids_BL, batch.spans, images)
        return model.backbone(x_BLD, Context(batch.seq_idx_BL, batch.positions_BL))[0]

    row = items[3:10]
    with torch.no_grad():
        together, at = hidden(packed(tiny, [row]))[0], 0
        for item in row:
            torch.testing.assert_close(together[at : at + len(item)], hidden(packed(tiny, [[item]]))[0],
                                       rtol=1e-4, atol=1e-5)  # fmt: skip
            at += len(item)


def test_grounding_of_a_packed_row_is_the_mean_over_its_questions(tiny, items) -> None:
    grounded = [item for item in items if item.pairs][:6]
    assert len(grounded) == 6
    _, measured = run(tiny, packed(tiny, [grounded[:4], grounded[4:]]), 1.0)
    together = float(measured["grounding"]) / packed(tiny, [grounded]).n_labels
    n_queries = [len({query for query, _, _ in item.pairs}) for item in grounded]
    total = 0.0
    for item, n in zip(grounded, n_queries):
        batch = packed(tiny, [[item]])
        total += n * float(run(tiny, batch, 1.0)[1]["grounding"]) / batch.n_labels
    assert together == pytest.approx(total / sum(n_queries), rel=1e-4)


def test_a_batch_holds_each_item_at_its_place(tiny, items) -> None:
    rows = [items[:5], items[5:9]]
    batch = packed(tiny, rows, spare=3)
    for r, row in enumerate(rows):
        at = 0
        for number, item in enumerate(row):
            here = slice(at, at + len(item))
            assert batch.ids_BL[r, here].tolist() == item.ids
            assert batch.seq_idx_BL[r, here].unique().tolist() == [number]
            assert batch.positions_BL[r, here].tolist() == list(range(len(item)))
            labels = [next_id if learned else IGNORED for next_id, learned in zip(item.ids[1:], item.trainable[1:])]
            assert batch.labels_BL[r, here].tolist() == [*labels, IGNORED]  # the last predicts no neighbour
            at += len(item)
        assert (batch.seq_idx_BL[r, at:] == -1).all() and (batch.labels_BL[r, at:] == IGNORED).all()
    shown = [(int(r), batch.refs[image]) for r, _, _, image in batch.spans]
    assert shown == [(r, reference) for r, row in enumerate(rows) for item in row for reference in item.images]
    assert batch.n_tokens == sum(map(len, items[:9])) and batch.sample_ids == [item.id for item in items[:9]]


def test_evidence_becomes_the_name_token_and_the_pictures_tokens(tiny) -> None:
    _, processor = tiny
    name = max(map(name_of, range(20)), key=len)  # several words, one token
    turns = (Turn("user", f"<image><image>\nNumber of the {name}?"), Turn("assistant", "7"))
    start = turns[0].text.index(name)
    sample = Sample("s", turns, ("a", "b"), (Evidence(0, start, start + len(name), image=1),))
    item = encode_sample(sample, processor, None)
    ((query, first, end),) = item.pairs
    assert processor.tokenizer.decode([item.ids[query]]).strip() == name
    assert (first, end - first) == (item.spans[1].start, 4)


# --- plans


def draw(number: int) -> tuple[Sample, str]:
    """Texts of 1 to 40 words; every eleventh does not fit into the rows of these tests."""
    n_words = 400 if number % 11 == 10 else 1 + number * 7 % 40
    turns = (Turn("user", "red " * n_words + f"{number}"), Turn("assistant", "yes"))
    return Sample(f"s{number}", turns), "words"


def windows(processor, begin: Cursor, n: int, **changes):
    plans = []
    for _ in range(n):
        plans.append(plan_window(draw, processor, begin, **{"seed": 3, "n_steps": 4, "n_rows": 2, "row_length": 100}
                                 | changes))  # fmt: skip
        begin = plans[-1].end
    return plans


def numbers(plans) -> list[int]:
    return [item.number for plan in plans for rows in plan.steps for row in rows for item in row]


def test_windows_use_every_sample_once_and_cut_none(tiny) -> None:
    plans = windows(tiny[1], Cursor(), 12)
    used = numbers(plans)
    left = set(plans[-1].end.held)
    misfits = {int(misfit.id[1:]) for plan in plans for misfit in plan.misfits}
    assert sorted([*used, *left, *misfits]) == list(range(plans[-1].end.next))
    assert misfits == {number for number in range(plans[-1].end.next) if number % 11 == 10}
    assert all("a row holds 100" in misfit.why for plan in plans for misfit in plan.misfits)
    plan = next(plan for plan in plans if plan.misfits)
    longest, n = max(misfit.n_tokens for misfit in plan.misfits), len(plan.misfits)
    told = f"{n} longer than a row of 100 tokens, the longest of {longest}: raise row_length, or lower tokens_per_image"
    assert longest > 100 and plan.told() == told
    plan.misfits.append(Misfit("7", "source", "broken image"))
    assert plan.told() == f"{told}; 1 for other reasons, the first, 7: broken image"
    for plan in plans:
        assert [len(rows) for rows in plan.steps] == [2] * 4
        for row in (row for rows in plan.steps for row in rows):
            assert 0 < sum(map(len, row)) <= 100
            assert all(item.ids == encode_sample(draw(item.number)[0], tiny[1], None).ids for item in row)
    lengths = [sum(map(len, row)) for plan in plans for rows in plan.steps for row in rows]
    assert sum(lengths) / len(lengths) > 93  # rows are nearly full


def test_a_plan_follows_from_its_inputs_alone(tiny) -> None:
    plans = windows(tiny[1], Cursor(), 5)
    assert [plan.steps for plan in windows(tiny[1], Cursor(), 5)] == [plan.steps for plan in plans]
    later = windows(tiny[1], plans[2].end, 2)  # what a run that goes on plans
    assert [plan.steps for plan in later] == [plan.steps for plan in plans[3:]]
    assert [plan.end for plan in later] == [plan.end for plan in plans[3:]]
    assert numbers(windows(tiny[1], Cursor(), 1, seed=4)) != numbers(plans[:1])


def test_a_sample_waits_for_one_window_at_most(tiny) -> None:
    """Of samples longer than half a row each row holds one; the shortest had to wait for ever."""

    def long(number: int) -> tuple[Sample, str]:
        return Sample(f"s{number}", (Turn("user", "red " * (50 + number * 7 % 40)), Turn("assistant", "yes"))), "words"

    begin = Cursor()
    for _ in range(8):
        plan = plan_window(long, tiny[1], begin, seed=3, n_steps=8, n_rows=2, row_length=100)
        assert set(begin.held) <= set(numbers([plan]))
        assert all(len(row) == 1 for rows in plan.steps for row in rows)
        begin = plan.end
    assert begin.held


def test_samples_that_never_fit_end_in_one_sentence(tiny) -> None:
    with pytest.raises(DataError, match="1000 samples in a row cannot be used; the last, s10: .* a row holds 100"):
        plan_window(lambda number: draw(10), tiny[1], Cursor(), seed=0, n_steps=1, n_rows=1, row_length=100)


def test_best_fit_fills_the_fullest_row_that_has_room(tiny) -> None:
    items = [Item(i, "", "", [0] * n, [False] * n, [], (), []) for i, n in enumerate((60, 50, 40, 30, 30, 9))]
    rows, left = best_fit(items, 2, 100)
    assert [sorted(len(item) for item in row) for row in rows] == [[40, 60], [9, 30, 50]]
    assert [len(item) for item in left] == [30]
    rows, left = best_fit([*items[3:], *items[:3]], 2, 100, n_before=3)
    assert [sorted(len(item) for item in row) for row in rows] == [[9, 30, 30], [40, 60]]
    assert [len(item) for item in left] == [50]
