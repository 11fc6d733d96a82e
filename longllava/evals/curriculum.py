"""What a model of the curriculum can do: teacher-forced exact match of every answer, in packed rows.

An answer is right when each of its tokens, and its end, is the likeliest after those before it: just then
greedy decoding gives exactly this answer. All answers of a conversation are judged in one forward, and
conversations are packed as in training, so that thousands of answers take seconds. `generated` asks a few of
the questions through the model's own `generate`, as a check on all of that.
Shapes: L tokens of a row, P labelled positions, D width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from longllava.data.features import FeatureCache, encoder_cache
from longllava.data.packing import IGNORED, Batch, Item, best_fit, build_batch, encode_sample
from longllava.data.samples import Sample
from longllava.evals.curriculum_task import Task, draw_samples, kind_of, telling_words
from longllava.inputs.processor import Processor
from longllava.model import Model
from longllava.nn import Context

ROW_LENGTH = 2048  # a row is as long as the longest sample if that is longer
MAX_NEW_TOKENS = 48  # the longest captions have 16 tokens


class Talker(Protocol):
    def generate(self, prompt: str, images: Any = None, *, max_new_tokens: int) -> str: ...


@dataclass(frozen=True)
class Outcome:
    """One task's answers (or words, where it is judged by word). kinds: kind -> (right, asked).

    seconds: without encoding pictures. first_right: of each sample, whether its first answer is right.
    """

    task: str
    n: int
    n_right: int
    kinds: dict[str, tuple[int, int]]
    n_samples: int
    n_tokens: int
    n_pictures: int
    seconds: float
    first_right: tuple[bool, ...] = field(repr=False)

    @property
    def accuracy(self) -> float:
        return self.n_right / self.n


def measure(
    model: Model,
    processor: Processor,
    tasks: Sequence[Task],
    *,
    n_questions: int = 300,
    seed: int = 0,
    tokens_per_image: int | None = None,
    dtype: torch.dtype = torch.float32,
    show: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Every task on a model, on its device. dtype: of matrix products, over fp32 weights; other weights decide
    for themselves. show: called with each outcome.

    Features of pictures come from the cache on disk that training uses too. Raises: InputError when a model
    of text is asked about pictures.
    """
    model.eval()
    device = model.backbone.embed_tokens.weight.device
    pictures: FeatureCache | None = None
    outcomes = []
    for task in tasks:
        samples = draw_samples(task, n_questions, seed)
        references = [reference for sample in samples for reference in sample.images]
        if references and pictures is None:
            n_tokens = processor.tokens_per_image(tokens_per_image)
            pictures = encoder_cache(model, processor, tokens=n_tokens, device=device, dtype=dtype)
        if pictures is not None:
            fill(pictures, references)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            outcome = judge(model, processor, task, samples, pictures, tokens_per_image)
        show(outcome)
        outcomes.append(outcome)
    return outcomes


def fill(pictures: FeatureCache, references: Sequence[str]) -> None:
    from tqdm import tqdm

    with tqdm(
        total=len(pictures.missing(references)), desc="features", unit="picture", leave=False, disable=None
    ) as bar:
        pictures.fill(references, lambda done, of: bar.update(done - bar.n))


@torch.inference_mode()
def judge(
    model: Model,
    processor: Processor,
    task: Task,
    samples: Sequence[Sample],
    pictures: FeatureCache | None,
    tokens_per_image: int | None = None,
) -> Outcome:
    """One task's samples. pictures: a cache that holds all of theirs."""
    started = time.perf_counter()
    items = [encode_sample(sample, processor, tokens_per_image, number=i) for i, sample in enumerate(samples)]
    longest = max(map(len, items))
    rows, _ = best_fit(items, len(items), max(ROW_LENGTH, longest))
    right: dict[int, list[tuple[str, bool]]] = {}
    for row in filter(None, rows):
        batch = build_batch([row], sum(map(len, row)), processor.tokenizer.pad_id)
        right_L = tokens_right(model, batch, pictures, tokens_per_image, processor.tokenizer.vocab_size)
        at = 0
        for item in row:
            # the token at position p is predicted at p - 1
            right[item.number] = [
                (kind, bool(right_L[at + start - 1 : at + end - 1].all()))
                for kind, start, end in judged(task, samples[item.number], item, processor)
            ]
            at += len(item)
    kinds: dict[str, tuple[int, int]] = {}
    for kind, is_right in (one for each in right.values() for one in each):
        n_right, n = kinds.get(kind, (0, 0))
        kinds[kind] = (n_right + is_right, n + 1)
    return Outcome(
        task.name,
        n=sum(n for _, n in kinds.values()),
        n_right=sum(n_right for n_right, _ in kinds.values()),
        kinds=dict(sorted(kinds.items())),
        n_samples=len(samples),
        n_tokens=sum(map(len, items)),
        n_pictures=sum(len(sample.images) for sample in samples),
        seconds=round(time.perf_counter() - started, 2),
        first_right=tuple(right[number][0][1] for number in range(len(samples))),
    )


def tokens_right(
    model: Model, batch: Batch, pictures: FeatureCache | None, tokens_per_image: int | None, n_words: int
) -> Tensor:
    """Of a batch of one row: bool (L), whether the next token is the likeliest, where there is a label.

    n_words: the tokenizer's; a model may have spare rows that `generate` never takes.
    """
    batch = batch.to(model.backbone.embed_tokens.weight.device)
    images_NMD = None
    if batch.refs:
        assert pictures is not None
        images_NMD = model.image_tokens(pictures.get(batch.refs).to(batch.ids_BL.device), tokens_per_image)
    x_BLD = model.embed(batch.ids_BL, batch.spans, images_NMD)
    hidden_BLD, _ = model.backbone(x_BLD, Context(batch.seq_idx_BL, batch.positions_BL))
    labelled_BL = batch.labels_BL != IGNORED
    likeliest_P = model.logits(hidden_BLD[labelled_BL])[:, :n_words].argmax(-1)
    right_BL = torch.zeros_like(labelled_BL)
    right_BL[labelled_BL] = likeliest_P == batch.labels_BL[labelled_BL]
    return right_BL[0].cpu()


def judged(task: Task, sample: Sample, item: Item, processor: Processor) -> list[tuple[str, int, int]]:
    """(kind, start, end) of the tokens that are right or wrong together."""
    if not task.by_word:
        asked = sample.turns[::2]
        return [(kind_of(task, turn.text), *where) for turn, where in zip(asked, answers(item), strict=True)]
    n_tokens = item.spans[0].length
    tokens = processor.encode_chat(sample.turns, len(sample.images), tokens_per_image=n_tokens).turn_tokens[1]
    return [(kind, *tokens.range_of(start, end)) for kind, start, end in telling_words(sample)]


def answers(item: Item) -> list[tuple[int, int]]:
    """[start, end) of each answer's tokens, its end included; a question always stands between two."""
    found, start = [], None
    for position, learned in enumerate([*item.trainable, False]):
        if learned and start is None:
            start = position
        elif not learned and start is not None:
            found.append((start, position))
            start = None
    return found


@dataclass(frozen=True)
class Generated:
    """First questions of a task's samples, asked through `generate`. n_agree: judged as teacher-forced."""

    task: str
    n: int
    n_right: int
    n_agree: int


def generated(talker: Talker, task: Task, outcome: Outcome, n: int, *, n_questions: int, seed: int = 0) -> Generated:
    """Ask the first questions of the first n samples that `outcome` judged, pictures from files to answer."""
    samples = draw_samples(task, n_questions, seed)[:n]
    n_right = n_agree = 0
    for sample, forced in zip(samples, outcome.first_right):
        images = list(sample.images) or None
        said = talker.generate(sample.turns[0].text, images=images, max_new_tokens=MAX_NEW_TOKENS)
        is_right = said == sample.turns[1].text
        n_right += is_right
        n_agree += is_right == forced
    return Generated(task.name, len(samples), n_right, n_agree)
