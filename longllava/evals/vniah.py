"""V-NIAH: is one picture found among a thousand? Needles in a haystack of pictures, at every depth.

As LongVA defines it: the needle is inserted at int(depth * N), so a prompt has N + 1 pictures; one prompt per
needle and depth; the score is a teacher-forced exact match: each token of the answer (its end not counted) is
the likeliest after those before it. Beside it stands whether the greedy answer is the right one, spaces
around it and case left aside; that is stricter, for the answer must also end where it should.

Prompts with one haystack share what stands before the needle: the haystack is read once, forked at each
depth, and each prompt reads its needle and the rest. The answers are those to whole prompts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from longllava.errors import DataError
from longllava.evals.journal import Journal
from longllava.evals.memory import PeakMemory
from longllava.evals.vniah_task import Needle, Settings, draw_haystack, draw_needles, position
from longllava.version import __version__

ENCODE_AT_ONCE = 64  # pictures between two moves of the bar
MAX_NEW_TOKENS = 16  # answers are one or two words


class Scored(Protocol):
    @property
    def exact(self) -> bool: ...


class Album(Protocol):
    """Pictures read so far."""

    @property
    def n_tokens(self) -> int: ...
    def append(self, images: Any = None) -> None: ...
    def fork(self) -> Album: ...
    def score(self, question: str, answer: str) -> Scored: ...
    def ask(self, question: str, *, max_new_tokens: int) -> str: ...


class Judged(Protocol):
    """A model as this task sees it. encode: what can be computed of a picture once, for `append`."""

    def encode(self, images: Sequence[Any]) -> Sequence[Any]: ...
    def session(self) -> Album: ...


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One prompt and what became of it.

    tokens: up to the question. seconds: this prompt's own, for needle, rest of haystack, question, answer.
    shared_seconds: for what stands before the needle, read once for all. peak_memory: bytes.
    """

    images: int
    depth: float
    needle: int
    name: str
    kind: str
    answer: str
    said: str
    teacher_forced: bool
    generated: bool
    seconds: float
    shared_seconds: float
    tokens: int
    peak_memory: int


def journal_settings(settings: Settings, digest: str, **model: Any) -> dict[str, Any]:
    """Everything a cell depends on that does not stand in it. `model` says which one is judged."""
    kept = {name: value for name, value in asdict(settings).items() if name not in ("images", "depths")}
    return {"version": __version__, **model, **kept, "pictures": digest}


def finished(journal: Journal) -> dict[tuple[int, float, int], Cell]:
    """Cells by (images, depth, needle)."""
    try:
        cells = [Cell(**record) for record in journal.records]
    except TypeError:  # edited, or another's
        raise DataError(f"{journal.path}: holds what is no prompt of V-NIAH; move it away to start anew") from None
    return {(cell.images, cell.depth, cell.needle): cell for cell in cells}


def work_left(settings: Settings, journal: Journal) -> int:
    """Pictures yet to be encoded and read: the sum of what `run` reports to `move`."""
    done = finished(journal)
    total = largest = 0
    for n in set(settings.images):
        waiting = [depth for depth in set(settings.depths) for i in range(settings.n_needles)
                   if (n, depth, i) not in done]  # fmt: skip
        if waiting:
            largest = max(largest, n)
            total += position(max(waiting), n) + sum(n - position(depth, n) + 1 for depth in waiting)
    return total + largest + settings.n_needles if total else 0


def run(
    model: Judged,
    settings: Settings,
    journal: Journal,
    *,
    show: Callable[[Cell], None] = lambda cell: None,
    move: Callable[[int], None] = lambda n: None,
    memory: PeakMemory | None = None,
) -> list[Cell]:
    """All cells of `settings`, by images, depth, needle. Those in the journal are not asked again.

    show: called with each new cell. move: with each number of pictures that were encoded or read.
    Raises: InputError for a haystack or picture that cannot be used.
    """
    memory = memory or PeakMemory()
    done = finished(journal)
    wanted = [(n, depth, i) for n in sorted(set(settings.images)) for depth in sorted(set(settings.depths))
              for i in range(settings.n_needles)]  # fmt: skip
    waiting = [key for key in wanted if key not in done]
    if waiting:
        hay = encode(model, draw_haystack(settings, max(n for n, _, _ in waiting)), move)
        needles = draw_needles(settings)
        pictures = encode(model, [needle.picture for needle in needles], move)
    for n in sorted({n for n, _, _ in waiting}):
        walk, at, shared = model.session(), 0, 0.0
        for depth in sorted({d for m, d, _ in waiting if m == n}):
            index = position(depth, n)
            if index > at:
                started = time.perf_counter()
                walk.append(images=hay[at:index])
                shared += time.perf_counter() - started
                move(index - at)
                at = index
            for i in (i for m, d, i in waiting if (m, d) == (n, depth)):
                rest = [pictures[i], *hay[index:n]]
                memory.start()
                measured = ask(walk, rest, needles[i])
                cell = Cell(images=n, depth=depth, needle=i, shared_seconds=round(shared, 3),
                            peak_memory=memory.bytes(), **measured)  # fmt: skip
                journal.append(asdict(cell))
                done[n, depth, i] = cell
                move(len(rest))
                show(cell)
    return [done[key] for key in wanted]


def encode(model: Judged, sources: Sequence[Any], move: Callable[[int], None]) -> list[Any]:
    encoded: list[Any] = []
    for first in range(0, len(sources), ENCODE_AT_ONCE):
        batch = sources[first : first + ENCODE_AT_ONCE]
        encoded += model.encode(batch)
        move(len(batch))
    return encoded


def ask(walk: Album, rest: Sequence[Any], needle: Needle) -> dict[str, Any]:
    """One prompt: what `walk` has read, the needle, the rest of the haystack, the question."""
    started = time.perf_counter()
    album = walk.fork()
    album.append(images=rest)
    score = album.score(needle.question, needle.answer)
    said = album.ask(needle.question, max_new_tokens=MAX_NEW_TOKENS)
    return {
        "name": needle.name,
        "kind": needle.kind,
        "answer": needle.answer,
        "said": said,
        "teacher_forced": score.exact,
        "generated": said.strip().lower() == needle.answer.strip().lower(),
        "seconds": round(time.perf_counter() - started, 3),
        "tokens": album.n_tokens,
    }
