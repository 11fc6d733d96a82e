"""What a recipe says of one source."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longllava.data.media import MediaConfig
from longllava.data.records import Columns
from longllava.data.sources import DUPLICATES
from longllava.data.stores import FORMATS
from longllava.data.tally import MAX_BAD
from longllava.errors import ConfigError
from longllava.settings import one_of

OF_WORLD = ("task", "settings")
OF_RECORDS = ("path", "image_root", "subset", "revision", "streaming", "columns", "question")
OF_HUB = ("subset", "revision", "streaming")
DATA_ROOT = "LONGLLAVA_DATA"


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source. kind "world": task, split, seed, settings. kind "llava": records of conversations.

    weight: its share, relative to the others'; 0 leaves it out. count: use so many different samples,
    again and again (a world task has no end otherwise). licence, origin: of the data, for people and for
    model cards.

    Of records: path: a file, a pattern ("part-*.parquet") or a list of them; with format "datasets" a name on the hub
    or a folder, with subset, split, revision. format: json, parquet (and arrow), webdataset, datasets, or auto: by
    the ending. (Shuffled pictures inside parquet files take the decoding of a row group each; "datasets", of the same
    files, copies them once into arrow files, which are mapped.) streaming: read it as it comes (data sets, with a
    count). columns: our names -> theirs (records.py).
    image_root: where pictures and videos lie; without it beside the file, or inside the table. question: asked of
    records that hold an answer only. marks: "written", or "first" where records without <image> have pictures first.
    duplicates: of ids: refuse, drop, keep; a stream's are not compared. max_bad: the share of records that may be
    unusable. media: data/media.py.
    """

    name: str
    kind: str
    licence: str
    origin: str
    weight: float | None = None
    count: int | None = None
    task: str | None = None
    split: str = "train"
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    path: str | list[str] | None = None
    image_root: str | None = None
    format: str = "auto"
    subset: str | None = None
    revision: str | None = None
    streaming: bool = False
    columns: dict[str, str] = field(default_factory=dict)
    question: str | None = None
    marks: str = "written"
    duplicates: str = "refuse"
    max_bad: float = MAX_BAD
    media: MediaConfig = field(default_factory=MediaConfig)

    def __post_init__(self) -> None:
        one_of(self, "kind", ("world", "llava"))
        needed, foreign = ("task", OF_RECORDS) if self.kind == "world" else ("path", OF_WORLD)
        if getattr(self, needed) is None:
            raise ConfigError(f"source {self.name!r}: {needed} is missing; kind {self.kind!r} needs it")
        for name in foreign:
            if getattr(self, name):
                raise ConfigError(
                    f"source {self.name!r}: {name} does not go with kind {self.kind!r}; leave it out"
                )
        if self.weight is not None and self.weight < 0:
            raise ConfigError(f"source {self.name!r}: weight is {self.weight}, must be 0 or above")
        if self.count is not None and self.count < 1:
            raise ConfigError(f"source {self.name!r}: count is {self.count}, must be above 0")
        if not 0 <= self.max_bad <= 1:
            raise ConfigError(f"source {self.name!r}: max_bad is {self.max_bad}, a share between 0 and 1")
        for name, allowed in (("format", FORMATS), ("marks", ("written", "first")), ("duplicates", DUPLICATES)):
            if getattr(self, name) not in allowed:
                got = getattr(self, name)
                raise ConfigError(f"source {self.name!r}: {name}: got {got!r}, allowed: {', '.join(allowed)}")
        self.check_records()

    def check_records(self) -> None:
        columns = Columns.of(self.columns)
        asked = [name for name, given in (("question", self.question), ("columns.question", columns.question)) if given]
        if columns.answer is not None and not asked:
            raise ConfigError(
                f"source {self.name!r}: columns.answer without a question; name columns.question, or give question"
            )
        if columns.answer is None and asked:
            raise ConfigError(
                f"source {self.name!r}: {asked[0]} without columns.answer would be asked of no record, and"
                " conversations have questions of their own; name that column, or leave it out"
            )
        if len(asked) > 1:
            raise ConfigError(f"source {self.name!r}: {' and '.join(asked)} both say what is asked; leave out one")
        for name in OF_HUB:
            if getattr(self, name) and self.format != "datasets":
                raise ConfigError(f"source {self.name!r}: {name} goes with format: datasets; leave it out")
        if self.format == "datasets" and isinstance(self.path, list):
            raise ConfigError(f"source {self.name!r}: format datasets takes one path")
        if self.streaming and self.count is None:
            raise ConfigError(f"source {self.name!r}: streaming needs a count; a stream does not say how long it is")
        if self.streaming and self.duplicates == "drop":
            raise ConfigError(
                f"source {self.name!r}: duplicates: drop needs all ids beforehand, and streaming gives none; leave out"
                " one of the two"
            )


def data_root(written: str | None, folder: Path) -> Path:
    """Where a recipe's paths begin: its own folder, or `root`: a folder beside it, or $LONGLLAVA_DATA.

    Without that variable, $LONGLLAVA_DATA is the folder `data` below the working folder.
    """
    if written is None:
        return folder
    variable = f"${DATA_ROOT}"
    if written != variable and not written.startswith(f"{variable}/"):
        return folder / written
    return Path(os.environ.get(DATA_ROOT) or "data") / written[len(variable) + 1 :]
