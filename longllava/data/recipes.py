"""A recipe: which sources a stage reads, and in which proportions. YAML only; an unknown key is an error.

    name: nano-stage2
    about: single pictures
    pictures: {per_thing: 60}             # the world's pool, see PoolSettings
    sources:
      - {name: single, kind: world, task: single, weight: 9, licence: Apache-2.0, origin: the picture world}
      - {name: cats, kind: llava, path: cats.json, image_root: cats, weight: 1, licence: CC0, origin: ...}

Paths are relative to the recipe, or to its `root`. Shares follow the weights, or, where no source has one, the
numbers of samples. The n-th sample of a run is a pure function of (recipe, seed, n): nothing needs saving to resume.
"""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from longllava.data.llava_json import Shape
from longllava.data.records import Columns, Unusable
from longllava.data.samples import Sample
from longllava.data.source_config import SourceConfig, data_root
from longllava.data.sources import RecordSource, Source
from longllava.data.stores import Store, open_store, paths_of
from longllava.data.stores.hub import HubName, hub_store
from longllava.data.stream import StreamSource
from longllava.data.worlds.pictures import PicturePool, PoolSettings
from longllava.data.worlds.tasks import WorldTask
from longllava.errors import ConfigError, DataError
from longllava.files import write_text
from longllava.settings import build, convert, read_mapping

BLOCK = 1000  # shares are exact in every block of so many samples, to a thousandth


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """A recipe's file. root: where paths begin, see data_root."""

    name: str
    sources: list[SourceConfig]
    about: str = ""
    root: str | None = None
    pictures: PoolSettings = field(default_factory=PoolSettings)

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("sources: the list is empty; name at least one")
        names = [source.name for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"sources: two are named {name!r}; names tell them apart in logs")
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            raise ConfigError(f"sources: {names[weighted.index(False)]!r} has no weight, others have one;"
                              " give every source a weight, or none")  # fmt: skip
        if all(source.weight == 0 for source in self.sources):
            raise ConfigError("sources: every weight is 0; give one of them a share")
        if (n := sum(source.weight != 0 for source in self.sources)) > BLOCK:
            raise ConfigError(f"sources: {n:,} have a share, at most {BLOCK:,} can; a source's path may list files")
        for source in self.sources:
            if source.kind == "world" and source.weight is None and source.count is None:
                raise ConfigError(
                    f"source {source.name!r}: give a weight or a count; a world task has no end"
                )


class WorldSource:
    """A world task as a source; `count` different samples, or without end."""

    def __init__(self, config: SourceConfig, pool: PicturePool) -> None:
        self.name, self.n_samples = config.name, config.count
        self.window: int | None = None
        self.task = WorldTask(
            config.task or "", split=config.split, seed=config.seed, settings=config.settings, pool=pool
        )

    def sample(self, index: int) -> Sample:
        return self.task.sample(index)


class Recipe:
    """Sources and their shares: `Recipe.load(path)`, then `draw(seed, n)` or `sample(seed, number)`."""

    def __init__(self, config: RecipeConfig, folder: Path, sources: Sequence[Source]) -> None:
        self.config, self.folder, self.sources = config, folder, tuple(sources)
        sizes = [
            (source.n_samples or 0) if row.weight is None else row.weight
            for row, source in zip(config.sources, self.sources)
        ]
        self.counts = block_counts([size / sum(sizes) for size in sizes])
        self.earlier: Recipe | None = None
        self.first, self.shifts = 0, [0] * len(self.sources)

    @classmethod
    def load(cls, path: str | Path, tasks: Mapping[str, Mapping[str, Any]] | None = None) -> Recipe:
        """Read a recipe and open its sources (files are read through and checked now).

        tasks: source name -> settings that replace the file's ({"needle": {"n_images": [64, 256]}}), also
        "weight". Raises: ConfigError naming file and key; DataError for a source that cannot be used.
        """
        config = build(RecipeConfig, read_mapping(path), str(path))
        folder = Path(path).parent
        return cls(config, folder, open_sources(config, folder, str(path))).with_tasks(tasks or {})

    def with_tasks(self, tasks: Mapping[str, Mapping[str, Any]]) -> Recipe:
        """This recipe with other settings of some sources; files are not read again."""
        known = [row.name for row in self.config.sources]
        for name in tasks:
            if name not in known:
                raise ConfigError(f"recipe {self.config.name!r}: no source {name!r}; have {', '.join(known)}")
        if not tasks:
            return self
        rows, sources = [], list[Source]()
        pools = {s.task.split: s.task.pool for s in self.sources if isinstance(s, WorldSource)}
        for row, source in zip(self.config.sources, self.sources):
            changes = dict(tasks.get(row.name, {}))
            weight = convert(float | None, changes.pop("weight", row.weight), f"source {row.name!r}: weight")
            row = replace(row, weight=weight, settings={**row.settings, **changes})
            rows.append(row)
            sources.append(WorldSource(row, pools[row.split]) if row.kind == "world" else source)
        return Recipe(replace(self.config, sources=rows), self.folder, sources)

    def after(self, earlier: Recipe, seed: int, first: int) -> Recipe:
        """This recipe from a run's sample `first` on: with other shares too, each source goes on where `earlier` left
        it. What came before, and waits, lies where `earlier` says."""
        later = copy.copy(self)
        later.earlier, later.first = earlier, first
        later.shifts = [then - now for then, now in zip(earlier.uses(seed, first), self.uses(seed, first))]
        return later

    def uses(self, seed: int, number: int) -> list[int]:
        """How often each source came before a run's sample `number`."""
        block, place = divmod(number, BLOCK)
        before = block_order(tuple(self.counts), seed, block)[0][:place]
        return [block * count + before.count(source) + shift
                for source, (count, shift) in enumerate(zip(self.counts, self.shifts))]  # fmt: skip

    def at(self, seed: int, number: int) -> tuple[int, int]:
        """(source, index in it) of a run's sample `number`, counted from 0."""
        if self.earlier is not None and number < self.first:
            return self.earlier.at(seed, number)
        block, place = divmod(number, BLOCK)
        order, ranks = block_order(tuple(self.counts), seed, block)
        chosen = order[place]
        nth_use = block * self.counts[chosen] + ranks[place] + self.shifts[chosen]
        source = self.sources[chosen]
        if source.n_samples is None:
            return chosen, first_index(seed, source.name) + nth_use
        epoch, place = divmod(nth_use, source.n_samples)
        key = f"{seed}/{source.name}/{epoch}"
        if source.window is None:
            return chosen, permutation(source.n_samples, key)[place]
        window, inside = divmod(place, source.window)
        first = window * source.window
        n_inside = min(source.window, source.n_samples - first)
        return chosen, first + permutation(n_inside, f"{key}/{window}")[inside]

    def draw(self, seed: int, n: int, first: int = 0) -> list[tuple[Source, int]]:
        """The plan of samples first .. first + n: which source, which of its samples."""
        places = (self.at(seed, number) for number in range(first, first + n))
        return [(self.sources[source], index) for source, index in places]

    def sample(self, seed: int, number: int) -> tuple[Sample, str]:
        """A run's sample `number`, and its source's name. Raises: Unusable, where it is to be left out."""
        chosen, index = self.at(seed, number)
        source = self.sources[chosen]
        try:
            return source.sample(index), source.name
        except Unusable as error:
            error.source = source.name
            raise

    def expect(self, seed: int, number: int) -> None:
        """A sample that is asked for soon."""
        chosen, index = self.at(seed, number)
        source = self.sources[chosen]
        if isinstance(source, RecordSource):
            source.expect(index)

    def rejected(self) -> list[str]:
        """file:line: reason of every record that was left out."""
        return [str(item) for source in self.sources for item in getattr(source, "rejected", ())]

    def write_rejected(self, path: str | Path, add: bool = False) -> int:
        """Write `rejected` to a file, one a line, if there are any. add: to what it holds. Returns how many lines."""
        path = Path(path)
        before = path.read_bytes().decode("utf-8").split("\n")[:-1] if add and path.is_file() else []
        lines = dict.fromkeys([*before, *(line.replace("\n", "\\n") for line in self.rejected())])
        if lines:
            write_text(path, "".join(f"{line}\n" for line in lines))
        return len(lines)


def open_sources(config: RecipeConfig, folder: Path, where: str) -> list[Source]:
    pools: dict[str, PicturePool] = {}
    return [open_source(row, config, folder, where, pools) for row in config.sources]


def open_source(
    row: SourceConfig, config: RecipeConfig, folder: Path, where: str, pools: dict[str, PicturePool]
) -> Source:
    """Raises: ConfigError, DataError, naming recipe and source."""
    try:
        if row.kind == "world":
            if row.split not in pools:
                pools[row.split] = PicturePool(row.split, settings=config.pictures)
            return WorldSource(row, pools[row.split])
        return record_source(row, data_root(config.root, folder))
    except ConfigError as error:
        raise ConfigError(f"{where}: source {row.name!r}: {error}") from None
    except DataError as error:
        raise DataError(f"{where}: source {row.name!r}: {error}") from None


def record_source(row: SourceConfig, folder: Path) -> Source:
    columns = Columns.of(row.columns)
    shape = Shape(columns, row.marks, row.question)
    files = row.image_root is not None
    root = folder / row.image_root if row.image_root else folder
    if row.format == "datasets":
        beside = folder / str(row.path)
        hub = HubName(str(beside if beside.exists() else row.path), row.subset, row.split, row.revision)
        if row.streaming:
            assert row.count is not None, "the config was checked"
            return StreamSource(row.name, hub, row.count, root=root, files=files, shape=shape, media=row.media,
                                seed=row.seed, max_bad=row.max_bad)  # fmt: skip
        store: Store = hub_store(hub, columns, files)
        label = str(hub)
    else:
        paths = paths_of(row.path or "", folder)
        store, label = open_store(row.format, paths, columns, files), str(paths[0])
        if files and not root.is_dir():
            raise DataError(f"image_root: {root}: no such folder")
        root = root if files else paths[0].parent
    return RecordSource(row.name, store, label, root, shape=shape, media=row.media, count=row.count, seed=row.seed,
                        max_bad=row.max_bad, duplicates=row.duplicates)  # fmt: skip


def block_counts(shares: Sequence[float]) -> list[int]:
    """A block's samples of each source: by largest remainder, at least one where it has a share."""
    counts = [max(1, int(share * BLOCK)) if share else 0 for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i] * BLOCK)
    missing = BLOCK - sum(counts)
    for step in range(abs(missing)):
        index = by_remainder[step] if missing > 0 else counts.index(max(counts))
        counts[index] += 1 if missing > 0 else -1
    return counts


@functools.lru_cache(maxsize=8)
def block_order(counts: tuple[int, ...], seed: int, block: int) -> tuple[list[int], list[int]]:
    """The source of each of a block's samples, and how often it came before in the block."""
    order = [source for source, count in enumerate(counts) for _ in range(count)]
    random.Random(f"block {seed} {block}").shuffle(order)
    seen = [0] * len(counts)
    ranks = []
    for source in order:
        ranks.append(seen[source])
        seen[source] += 1
    return order, ranks


@functools.lru_cache(maxsize=64)
def permutation(n: int, key: str) -> list[int]:
    order = list(range(n))
    random.Random(key).shuffle(order)
    return order


@functools.lru_cache(maxsize=1024)
def first_index(seed: int, name: str) -> int:
    """Where a run begins in an endless source: runs of different seeds read different samples."""
    return random.Random(f"first {seed} {name}").randrange(1 << 40)
