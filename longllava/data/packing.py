"""Samples to packed rows. The plan is made first, from token counts, and is a pure function of its inputs.

A row holds whole samples one after the other: none is cut, none is looked at by its neighbours (seq_idx).
A window is a number of steps planned together. What does not fit into it opens the next one, so that every
sample of an epoch is used once; a `Cursor` says where a window begins.
Shapes: B rows, L tokens a row, n image spans or evidence pairs.
"""

from __future__ import annotations

import bisect
import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from longllava.data.ahead import SAMPLES
from longllava.data.media import laid_out
from longllava.data.records import Unusable
from longllava.data.samples import Sample
from longllava.errors import DataError, InputError
from longllava.inputs.chat import messages_of_turns
from longllava.inputs.processor import Processor, Span, TurnTokens

IGNORED = -100
MEND = "raise row_length, or lower tokens_per_image"  # where samples are too long
MISFITS_IN_A_ROW = 1000  # a recipe whose samples are all too long must end in an error, not in a search


@dataclass(frozen=True)
class Item:
    """Sample `number` of the run as tokens. pairs: (query position, key start, key end), of its evidence.

    targets: as in Encoded, position -> the id learned there, where it is not the one that is read.
    """

    number: int
    id: str
    source: str
    ids: list[int]
    trainable: list[bool]
    spans: list[Span]
    images: tuple[str, ...]
    pairs: list[tuple[int, int, int]]
    targets: dict[int, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Misfit:
    """A sample that was left out, and why. n_tokens: of one that is too long for a row."""

    id: str
    source: str
    why: str
    n_tokens: int = 0


@dataclass(frozen=True)
class Cursor:
    """Where a window begins: first the samples `held` back by those before, then `next`, `next` + 1, ...

    starts: the first sample of each phase so far, but of the first.
    """

    next: int = 0
    held: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()


@dataclass
class Plan:
    """steps[s][r]: items of row r of step s. end: where the next window begins. misfits: left out."""

    steps: list[list[list[Item]]]
    row_length: int
    end: Cursor
    misfits: list[Misfit] = field(default_factory=list)

    def told(self) -> str:
        """How many samples were left out, and what to do about it; empty where there are none."""
        lengths = [misfit.n_tokens for misfit in self.misfits if misfit.n_tokens]
        others = [misfit for misfit in self.misfits if not misfit.n_tokens]
        parts = []
        if lengths:
            parts.append(f"{len(lengths)} longer than a row of {self.row_length:,} tokens, the longest of"
                         f" {max(lengths):,}: {MEND}")  # fmt: skip
        if others:
            parts.append(f"{len(others)} for other reasons, the first, {others[0].id}: {others[0].why}")
        return "; ".join(parts)

    def mark(self) -> str:
        """Of which samples lie in which rows: equal on all processes that share the rows."""
        rows = [[[(item.number, item.id, len(item)) for item in row] for row in rows] for rows in self.steps]
        return hashlib.sha256(repr(rows).encode()).hexdigest()

    def references(self, rank: int = 0, world: int = 1) -> list[str]:
        """Every image of one process's rows once, in order of first use."""
        items = (item for rows in self.steps for row in rows[rank::world] for item in row)
        return list(dict.fromkeys(reference for item in items for reference in item.images))


@dataclass
class Batch:
    """Packed rows as tensors.

    ids_BL int64; labels_BL int64: the id that should follow, -100 where nothing is learned; seq_idx_BL int32,
    -1 is padding; positions_BL int64, from 0 in each sample; spans (n, 4) int64 [row, start, length, image],
    image = index into refs; grounding (n, 4) int64 [row, query position, key start, key end].
    """

    ids_BL: Tensor
    labels_BL: Tensor
    seq_idx_BL: Tensor
    positions_BL: Tensor
    spans: Tensor
    refs: list[str]
    grounding: Tensor
    n_tokens: int
    n_labels: int
    sample_ids: list[str]
    sources: list[str]

    def to(self, device: torch.device | str) -> Batch:
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Batch(**{**vars(self), **moved})


def encode_sample(
    sample: Sample, processor: Processor, tokens_per_image: int | None, source: str = "", number: int = 0
) -> Item:
    """Count and place a sample's tokens; evidence becomes token positions. Raises: InputError."""
    messages = messages_of_turns(sample.turns, len(sample.media or sample.images))
    if sample.media:
        messages = laid_out(messages, sample.media, processor.prompt)
    encoded = processor.encode_messages(messages, tokens_per_image)
    pairs = []
    for evidence in sample.evidence:
        query = token_range(encoded.turn_tokens, evidence.turn, evidence.start, evidence.end)[1] - 1
        if evidence.image is not None:
            span = encoded.spans[evidence.image]
            start, end = span.start, span.start + span.length
        elif evidence.key is not None:
            start, end = token_range(encoded.turn_tokens, *evidence.key)
        else:
            raise InputError(f"sample {sample.id}: evidence names neither an image nor a key")
        pairs.append((query, start, end))
    return Item(number, sample.id, source, encoded.ids, encoded.trainable, encoded.spans, tuple(sample.images), pairs,
                encoded.targets)  # fmt: skip


def token_range(turn_tokens: Sequence[TurnTokens], turn: int, start: int, end: int) -> tuple[int, int]:
    return turn_tokens[turn].range_of(start, end)


def plan_window(
    draw: Callable[[int], tuple[Sample, str]],
    processor: Processor,
    begin: Cursor,
    *,
    seed: int,
    n_steps: int,
    n_rows: int,
    row_length: int,
    tokens_per_image: int | None = None,
    expect: Callable[[int], None] | None = None,
) -> Plan:
    """Pack samples from `begin` on into n_steps x n_rows rows of row_length tokens.

    draw: number -> (sample, name of its source). Samples are drawn until they would fill all rows; longest
    first, each goes into the fullest row it fits; what fits nowhere is held back for the next window, where it comes
    before the others: else, of samples longer than half a row, the shortest would wait from window to window for ever.
    seed: the order of rows, and of samples in a row. expect: told of numbers that are drawn soon, and once.
    Raises: DataError when no sample fits.
    """
    capacity = n_steps * n_rows * row_length
    items: list[Item] = []
    misfits: list[Misfit] = []
    waiting, following = list(begin.held), begin.next
    n_tokens, missed, told = 0, 0, following
    while n_tokens < capacity:
        if waiting:
            number = waiting.pop(0)
        else:
            number, following = following, following + 1
        while expect is not None and told < following + SAMPLES:
            expect(told)
            told += 1
        try:
            sample, source = draw(number)
        except Unusable as error:
            misfits.append(Misfit(error.where, error.source, str(error)))
            missed += 1
            give_up(missed, misfits)
            continue
        try:
            item = encode_sample(sample, processor, tokens_per_image, source, number)
        except InputError as error:
            misfits.append(Misfit(sample.id, source, str(error)))
        else:
            if len(item) <= row_length:
                items.append(item)
                n_tokens += len(item)
                missed = 0
                continue
            why = f"{len(item)} tokens, a row holds {row_length}"
            misfits.append(Misfit(sample.id, source, why, len(item)))
        missed += 1
        give_up(missed, misfits)
    n_waited = sum(item.number < begin.next for item in items)
    rows, left = best_fit(items, n_steps * n_rows, row_length, n_waited)
    rng = random.Random(f"rows {seed} {begin.next}")
    rng.shuffle(rows)
    for row in rows:
        rng.shuffle(row)
    steps = [rows[step * n_rows : (step + 1) * n_rows] for step in range(n_steps)]
    held = sorted([*waiting, *(item.number for item in left)])
    return Plan(steps, row_length, Cursor(following, tuple(held), begin.starts), misfits)


def give_up(missed: int, misfits: list[Misfit]) -> None:
    """Raises: DataError when samples are searched for in vain."""
    if missed >= MISFITS_IN_A_ROW:
        raise DataError(f"{missed} samples in a row cannot be used; the last, {misfits[-1].id}: {misfits[-1].why}")


def best_fit(
    items: Sequence[Item], n_rows: int, row_length: int, n_before: int = 0
) -> tuple[list[list[Item]], list[Item]]:
    """Longest item first, into the row where it leaves least room. Returns rows, and what fits nowhere.

    n_before: so many of `items`, the first, come before the others.
    """
    rows: list[list[Item]] = [[] for _ in range(n_rows)]
    left = []
    free = [(row_length, row) for row in range(n_rows)]  # sorted by room, then row
    for item in (*sorted(items[:n_before], key=len, reverse=True), *sorted(items[n_before:], key=len, reverse=True)):
        at = bisect.bisect_left(free, (len(item), -1))
        if at == len(free):
            left.append(item)
            continue
        room, row = free.pop(at)
        rows[row].append(item)
        bisect.insort(free, (room - len(item), row))
    return rows, left


def build_batch(rows: Sequence[Sequence[Item]], row_length: int, pad_id: int) -> Batch:
    """Rows of items as tensors; a row shorter than row_length ends in padding."""
    n_rows = len(rows)
    ids_BL = torch.full((n_rows, row_length), pad_id, dtype=torch.int64)
    labels_BL = torch.full((n_rows, row_length), IGNORED, dtype=torch.int64)
    seq_idx_BL = torch.full((n_rows, row_length), -1, dtype=torch.int32)
    positions_BL = torch.zeros(n_rows, row_length, dtype=torch.int64)
    spans: list[tuple[int, int, int, int]] = []
    grounding: list[tuple[int, int, int, int]] = []
    refs: dict[str, int] = {}
    for r, row in enumerate(rows):
        at = 0
        for number, item in enumerate(row):
            end = at + len(item)
            ids = torch.tensor(item.ids, dtype=torch.int64)
            ids_BL[r, at:end] = ids
            learned = torch.tensor(item.trainable)
            wanted = ids.clone()
            for position, number_learned in item.targets.items():
                wanted[position] = number_learned
            labels_BL[r, at : end - 1] = torch.where(learned[1:], wanted[1:], IGNORED)
            seq_idx_BL[r, at:end] = number
            positions_BL[r, at:end] = torch.arange(len(item))
            for span in item.spans:
                image = refs.setdefault(item.images[span.image], len(refs))
                spans.append((r, at + span.start, span.length, image))
            grounding += [(r, at + query, at + start, at + stop) for query, start, stop in item.pairs]
            at = end
    items = [item for row in rows for item in row]
    return Batch(
        ids_BL, labels_BL, seq_idx_BL, positions_BL, table(spans), list(refs), table(grounding),
        n_tokens=sum(map(len, items)), n_labels=int((labels_BL != IGNORED).sum()),
        sample_ids=[item.id for item in items], sources=[item.source for item in items],
    )  # fmt: skip


def table(rows: Sequence[tuple[int, int, int, int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64).view(-1, 4)
