"""Where samples come from: a source has a name, n_samples (None: without end), and sample(index)."""

from __future__ import annotations

import contextlib
import random
from array import array
from pathlib import Path
from typing import Any, Protocol

from longllava.data.ahead import LOOKS
from longllava.data.llava_json import Shape, sample_of_record
from longllava.data.media import MediaConfig, expect, opened
from longllava.data.records import Unusable, printable
from longllava.data.samples import Sample
from longllava.data.stores import Place, Store
from longllava.data.tally import MAX_BAD, Rejected, Tally
from longllava.errors import DataError

DUPLICATES = ("refuse", "drop", "keep")


class Source(Protocol):
    """window: samples are shuffled inside windows of so many, in order of their index; None: all of them are."""

    name: str
    n_samples: int | None
    window: int | None

    def sample(self, index: int) -> Sample:
        """Raises: Unusable, where the sample is to be left out; DataError, where nothing can go on."""
        ...


class RecordSource:
    """The records of a store, read through and checked when it is made; media are opened when a sample is asked for.

    root: the folder image paths are relative to and may not leave. count: keep so many, drawn by seed (all if
    None). max_bad: share of records that may be unusable. duplicates: of ids: refuse them, drop all but the first,
    or keep them. What was left out is in `rejected`.
    Raises: DataError when a file cannot be read, holds no usable record, fewer than `count`, or too many
    unusable ones.
    """

    def __init__(
        self, name: str, store: Store, label: str, root: Path, *, shape: Shape | None = None,
        media: MediaConfig | None = None, count: int | None = None, seed: int = 0, max_bad: float = MAX_BAD,
        duplicates: str = "refuse",
    ) -> None:  # fmt: skip
        self.name, self.store, self.label, self.root = name, store, label, root
        self.shape, self.media = shape or Shape(), media or MediaConfig()
        self.places = array("q")  # of each usable record
        scanned = Tally(label, max_bad)
        identities: set[int] = set()
        for number, (place, where, record) in enumerate(self.store.scan()):
            try:
                if isinstance(record, Unusable):
                    raise record
                sample = sample_of_record(record, "", self.root, self.shape)
                if duplicates != "keep" and sample.id and not self.is_new(sample.id, identities, where, duplicates):
                    continue
                self.places.extend(place)
                scanned.good(number)
            except Unusable as error:
                scanned.bad(number, where, error)
        scanned.refuse_if_bad()
        self.scanned = list(scanned.rejected.values())
        usable = len(self.places) // 4
        if not usable:
            raise DataError(f"{label}: holds no records that can be used")
        if count is not None and count > usable:
            raise DataError(f"count is {count}, but {label} holds {usable} usable records")
        self.order = list(range(usable))
        if count is not None:
            random.Random(f"{name}/{seed}").shuffle(self.order)
            self.order = sorted(self.order[:count])
        self.n_samples: int | None = len(self.order)
        self.window: int | None = None
        self.tally = Tally(label, max_bad, self.n_samples)
        self.expected: dict[int, Sample] = {}

    def is_new(self, identity: str, seen: set[int], where: str, duplicates: str) -> bool:
        """Remembers ids by their hashes: 8 bytes instead of a string for each of a million."""
        if hash(identity) not in seen:
            seen.add(hash(identity))
            return True
        if duplicates == "drop":
            return False
        raise DataError(
            f"{where}: the id {identity!r} stands twice in {self.label}; set duplicates: drop to use the first alone,"
            " or duplicates: keep where ids are not names of records"
        )

    @property
    def rejected(self) -> list[Rejected]:
        """Records that cannot be used, and those whose media could not be opened since."""
        return [*self.scanned, *self.tally.rejected.values()]

    def place(self, index: int) -> Place:
        start = 4 * self.order[index]
        return tuple(self.places[start : start + 4])  # type: ignore[return-value]

    def record(self, index: int) -> Any:
        return self.store.read(self.place(index))

    def where(self, index: int) -> str:
        return self.store.where(self.place(index))

    def read(self, index: int) -> Sample:
        return sample_of_record(self.record(index), self.where(index).rpartition(":")[2], self.root, self.shape)

    def expect(self, index: int) -> None:
        """A sample that is asked for soon: its pictures are looked at meanwhile."""
        if index not in self.expected:
            with contextlib.suppress(Unusable, OSError):  # told when it is asked for
                self.expected[index] = self.read(index)
                expect(self.expected[index], self.media)

    def sample(self, index: int) -> Sample:
        where = printable(self.where(index))
        try:
            sample = self.expected.pop(index, None) or self.read(index)
        except (Unusable, OSError) as error:
            raise DataError(f"{where}: {error}; it was usable when training began") from None
        references = sample.images
        try:
            sample = opened(sample, self.media)
        except Unusable as error:
            error.where = where
            self.tally.bad(index, where, error)
            raise
        finally:
            LOOKS.forget(references)
        self.tally.good(index)
        return sample
