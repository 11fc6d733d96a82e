"""Where samples come from: a source has a name, n_samples (None: without end), and sample(index)."""

from __future__ import annotations

import json
import random
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from longllava.data.llava_json import Unusable, sample_of_record
from longllava.data.samples import Sample
from longllava.errors import DataError

MAX_BAD = 0.01  # a source of which more cannot be used is wrong as a whole
CHECK_AFTER = 1000


class Source(Protocol):
    name: str
    n_samples: int | None

    def sample(self, index: int) -> Sample: ...


@dataclass(frozen=True)
class Rejected:
    """A record that was left out."""

    where: str  # file:line
    kind: str
    why: str

    def __str__(self) -> str:
        return f"{self.where}: {self.why}"


class LlavaSource:
    """Records of a JSON list or a file of one JSON object a line. Read and checked when it is made.

    root: the folder image paths are relative to and may not leave. count: keep so many, drawn by seed (all if
    None). max_bad: share of records that may be unusable. What was left out is in `rejected`.
    Raises: DataError when the file cannot be read, holds no usable record, fewer than `count`, or too many
    unusable ones.
    """

    def __init__(
        self, name: str, path: str | Path, root: str | Path | None = None, *, count: int | None = None,
        seed: int = 0, max_bad: float = MAX_BAD,
    ) -> None:  # fmt: skip
        self.name, self.path = name, Path(path)
        self.root = Path(root) if root is not None else self.path.parent
        self.rejected: list[Rejected] = []
        self.max_bad = max_bad
        self.places = array("q")  # (start, length, line) of each usable record, in bytes
        seen = 0
        for start, length, line, raw in records(self.path):
            seen += 1
            try:
                sample_of_record(parsed(raw), str(line), self.root)
                self.places.extend((start, length, line))
            except Unusable as error:
                self.rejected.append(Rejected(f"{self.path}:{line}", error.kind, str(error)))
                if seen >= CHECK_AFTER:
                    self.refuse_if_bad(seen)
        self.refuse_if_bad(seen)
        usable = len(self.places) // 3
        if not usable:
            raise DataError(f"{self.path}: holds no records; expected a JSON list, or one JSON object a line")
        if count is not None and count > usable:
            raise DataError(f"count is {count}, but {self.path} holds {usable} usable records")
        self.order = list(range(usable))
        if count is not None:
            random.Random(f"{name}/{seed}").shuffle(self.order)
            self.order = sorted(self.order[:count])
        self.n_samples: int | None = len(self.order)

    def refuse_if_bad(self, seen: int) -> None:
        if len(self.rejected) <= self.max_bad * seen:
            return
        reasons = Counter(item.kind for item in self.rejected).most_common(3)
        listed = ", ".join(f"{kind} ({n})" for kind, n in reasons)
        raise DataError(
            f"{self.path}: {len(self.rejected)} of {seen} records cannot be used, more than"
            f" {self.max_bad:.1%}: {listed}; the first is {self.rejected[0]}"
        )

    def sample(self, index: int) -> Sample:
        start, length, line = self.places[3 * self.order[index] : 3 * self.order[index] + 3]
        with self.path.open("rb") as file:
            file.seek(start)
            raw = file.read(length)
        try:
            return sample_of_record(parsed(raw), str(line), self.root)
        except Unusable as error:
            raise DataError(f"{self.path}:{line}: {error}; it was usable when training began") from None


def parsed(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except UnicodeDecodeError:
        raise Unusable("not UTF-8") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise Unusable("malformed JSON", " ".join(str(error).split())) from None


def records(path: Path) -> Iterator[tuple[int, int, int, bytes]]:
    """(start, length, line number, bytes) of each record. Raises: DataError."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            start = 3 if file.read(3) == b"\xef\xbb\xbf" else 0
            file.seek(start)
            head = file.read(4096).lstrip()
            file.seek(start)
            if head.startswith(b"["):
                yield from records_of_list(path, start, file.read())
                return
            for line, raw in enumerate(file, 1):
                if raw.strip():
                    yield start, len(raw), line, raw
                start += len(raw)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def records_of_list(path: Path, offset: int, raw: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Elements of a JSON list by place, one parsed at a time; the whole is never held as objects."""
    try:
        # One character a byte: JSON's own characters are ASCII, and places count bytes.
        text = raw.decode("latin-1")
        decoder = json.JSONDecoder(strict=False)
        at, line, counted = skip_space(text, text.index("[") + 1), 1, 0
        while text[at : at + 1] != "]":
            _, end = decoder.raw_decode(text, at)
            line += text.count("\n", counted, at)
            counted = at
            yield offset + at, end - at, line, raw[at:end]
            at = skip_space(text, end)
            if text[at : at + 1] == ",":
                at = skip_space(text, at + 1)
            elif text[at : at + 1] != "]":
                raise json.JSONDecodeError("expected ',' or ']' after a record", text, at)
        if text[at + 1 :].strip():
            raise json.JSONDecodeError("text after the list", text, at + 1)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path}: malformed JSON: {' '.join(str(error).split())}") from None


def skip_space(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\n", "\r", "\t"):
        at += 1
    return at
