"""A streamed source: never whole on disk, read window by window, the same samples in the same order in every run.

Its records are counted in the order of the stream, whose shards the seed shuffles; a window of them is shuffled by the
recipe. Where a window begins in the stream is noted in the cache, so that a run that goes on seeks there; without the
note it reads from the beginning, slower, to the same samples. Pictures in records become files in the cache.

    $LONGLLAVA_CACHE/streams/HASH.json       window -> cursor
    $LONGLLAVA_CACHE/streamed/ab/abcd....bin   pictures, by their content
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import random
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longllava.data.cache import cache_folder
from longllava.data.llava_json import Shape, sample_of_record
from longllava.data.media import MediaConfig, opened
from longllava.data.records import IMAGES, VIDEOS, Embedded, Unusable
from longllava.data.samples import Sample
from longllava.data.stores.hub import HubName, Stream
from longllava.data.tally import MAX_BAD, Rejected, Tally
from longllava.errors import DataError
from longllava.files import write_atomic, write_text

WINDOW = 1024  # records
KEPT = 4  # windows in memory, as texts and paths


class StreamSource:
    """The first `count` records of a stream. files: pictures are files below `root`, which the records name."""

    def __init__(
        self, name: str, hub: HubName, count: int, *, root: Path, files: bool = False, shape: Shape | None = None,
        media: MediaConfig | None = None, seed: int = 0, max_bad: float = MAX_BAD,
    ) -> None:  # fmt: skip
        self.name = name
        self.n_samples: int | None = count
        self.size = WINDOW
        self.window: int | None = self.size
        self.root, self.files, self.seed = root, files, seed
        self.shape, self.media = shape or Shape(), media or MediaConfig()
        self.stream = Stream(hub, self.shape.columns)
        random.Random(f"shards {seed}").shuffle(self.stream.order)
        self.tally = Tally(str(hub), max_bad, count)
        self.windows: OrderedDict[int, list[Any]] = OrderedDict()
        self.running: tuple[int, Iterator[Any]] | None = None  # the window that comes next, and what reads it
        text = f"{hub} {hub.revision} {seed} {self.size} {self.stream.n_shards}{files_below(hub.path)}"
        self.notes = cache_folder() / "streams" / f"{hashlib.sha256(os.fsencode(text)).hexdigest()[:16]}.json"

    @property
    def rejected(self) -> list[Rejected]:
        return list(self.tally.rejected.values())

    def sample(self, index: int) -> Sample:
        window, place = divmod(index, self.size)
        if window not in self.windows:
            self.windows[window] = self.load(window)
            while len(self.windows) > KEPT:
                self.windows.popitem(last=False)
        self.windows.move_to_end(window)
        where = f"{self.stream.name}:{index + 1}"
        records = self.windows[window]
        if place >= len(records):
            n = window * self.size + len(records)
            raise DataError(f"{self.stream.name}: count is {self.n_samples}, but the stream ends after {n} records")
        try:
            sample = opened(sample_of_record(records[place], str(index + 1), self.root, self.shape), self.media)
        except Unusable as error:
            error.where = where
            self.tally.bad(index, where, error)
            raise
        self.tally.good(index)
        return sample

    def load(self, window: int) -> list[Any]:
        """The records of a window, read on from the one before, or from the nearest noted place."""
        cursors = self.cursors()
        if self.running is None or self.running[0] != window:
            known = max((number for number in cursors if number <= window), default=0)
            self.running = (known, self.stream.read(cursors.get(known)))
        at, reader = self.running
        records: list[Any] = []
        while at <= window:
            n_read, cursor = 0, dict[str, Any]()
            for record, following in itertools.islice(reader, self.size):
                n_read, cursor = n_read + 1, following
                if at == window:  # one by one: with their pictures a thousand may be gigabytes
                    records.append(self.lightened(record))
            at += 1
            if n_read == self.size and at not in cursors:
                self.note(at, cursor)
        self.running = (at, reader)
        return records

    def cursors(self) -> dict[int, Any]:
        try:
            return {int(number): cursor for number, cursor in json.loads(self.notes.read_text("utf-8")).items()}
        except (OSError, ValueError, AttributeError):  # none yet, or torn: it is a help, not a state
            return {}

    def note(self, window: int, cursor: dict[str, Any]) -> None:
        notes = {**self.cursors(), window: cursor}
        with contextlib.suppress(OSError):  # a full disk: the next start is slower
            write_text(self.notes, json.dumps(notes))

    def lightened(self, record: dict[str, Any]) -> dict[str, Any]:
        """A record without bytes: its pictures are files in the cache, or named."""
        columns = self.shape.columns
        media = {name for name in (columns.image, columns.video, *IMAGES, *VIDEOS) if name}
        return {name: self.kept(value) if name in media else value for name, value in record.items()}

    def kept(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.kept(item) for item in value]
        data = value.get("bytes") if isinstance(value, dict) else value
        if isinstance(data, bytes) and not self.files:
            name = hashlib.sha256(data).hexdigest()
            path = cache_folder() / "streamed" / name[:2] / f"{name}.bin"
            if not path.is_file():
                write_atomic(path, lambda file: file.write(data))
            return Embedded(str(path))
        return value.get("path") if isinstance(value, dict) else value


def files_below(path: str) -> str:
    """Names, sizes and times of a folder's files: notes of another folder of its name, or of what was in it, would lead
    to other records. Nothing of a data set on the hub."""
    if not os.path.isdir(path):
        return ""
    found = sorted(file for file in Path(path).rglob("*") if file.is_file())
    facts = ((str(file.relative_to(path)), file.stat()) for file in found)
    return "".join(f"\n{name} {status.st_size} {status.st_mtime_ns}" for name, status in facts)
