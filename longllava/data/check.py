"""What a recipe holds, source by source: what is there, what cannot be used and why, and how long its samples are."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longllava.data.packing import Item, encode_sample
from longllava.data.recipes import RecipeConfig, block_counts, open_source
from longllava.data.records import Unusable
from longllava.data.source_config import SourceConfig
from longllava.data.sources import Source
from longllava.data.tally import Rejected
from longllava.data.worlds.pictures import PicturePool
from longllava.errors import ConfigError, DataError, InputError
from longllava.inputs.processor import Processor
from longllava.settings import build, read_mapping

LIMIT = 1000  # samples of a source that are looked at
QUANTILES = {"median": 0.5, "p99": 0.99, "longest": 1.0}


@dataclass
class SourceCheck:
    """One source. missing: why it could not be opened. lengths: tokens of the samples that were looked at.

    left_out: records and samples that cannot be used. too_long: of those that could, longer than a row.
    share: of the recipe; None where one source alone is looked at and others do not say how many they are.
    """

    config: SourceConfig
    missing: str | None = None
    n_samples: int | None = None
    share: float | None = None
    lengths: list[int] = field(default_factory=list)
    n_images: int = 0
    n_image_tokens: int = 0
    n_learned: int = 0
    too_long: int = 0
    left_out: list[Rejected] = field(default_factory=list)
    shown: list[Item] = field(default_factory=list)

    def reasons(self) -> list[tuple[str, int]]:
        return Counter(item.kind for item in self.left_out).most_common()

    def as_dict(self) -> dict[str, Any]:
        lengths = sorted(self.lengths)
        return {
            "name": self.config.name, "licence": self.config.licence, "origin": self.config.origin,
            "missing": self.missing, "samples": self.n_samples, "share": self.share and round(self.share, 4),
            "looked_at": len(lengths), "left_out": len(self.left_out), "reasons": dict(self.reasons()),
            "too_long": self.too_long,
            "tokens": {name: quantile(lengths, share) for name, share in QUANTILES.items()},
            "images_a_sample": round(self.n_images / max(1, len(lengths)), 2),
            "image_tokens": self.n_image_tokens, "learned_tokens": self.n_learned, "all_tokens": sum(lengths),
        }  # fmt: skip


def quantile(ordered: list[int], share: float) -> int | None:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


def check_recipe(
    path: str | Path, processor: Processor, *, limit: int = LIMIT, show: int = 1, row_length: int | None = None,
    tokens_per_image: int | None = None, only: str | None = None, seed: int = 0,
) -> tuple[RecipeConfig, list[SourceCheck]]:  # fmt: skip
    """Look at each source on its own, so that one that is missing hides nothing of the others.

    limit: samples of a source whose tokens are counted, drawn by seed. show: samples kept for people to read.
    row_length: of a stage; longer samples are counted. only: the name of one source.
    Raises: ConfigError for the recipe itself.
    """
    config = build(RecipeConfig, read_mapping(path), str(path))
    names = [row.name for row in config.sources]
    if only is not None and only not in names:
        raise ConfigError(f"{path}: no source {only!r}; have {', '.join(names)}")
    pools: dict[str, PicturePool] = {}
    checks = []
    for row in config.sources:
        if only is not None and row.name != only:
            continue
        checked = SourceCheck(row)
        checks.append(checked)
        try:
            source = open_source(row, config, Path(path).parent, str(path), pools)
            checked.n_samples = source.n_samples
            look(source, checked, processor, limit, show, row_length, tokens_per_image, seed)
        except (DataError, ConfigError) as error:
            checked.missing = str(error).removeprefix(f"{path}: source {row.name!r}: ")
        else:
            checked.left_out = [*getattr(source, "rejected", []), *checked.left_out]
    found = {checked.config.name: checked.n_samples for checked in checks}
    sizes = [row.weight if row.weight is not None else found.get(row.name) or row.count or 0 for row in config.sources]
    unseen = [row for row in config.sources if row.name not in found and row.weight is None and row.count is None]
    if sum(sizes) and not unseen:  # or how much of the recipe one source is cannot be told
        counts = dict(zip(names, block_counts([size / sum(sizes) for size in sizes])))
        for checked in checks:
            checked.share = counts[checked.config.name] / sum(counts.values())
    return config, checks


def look(
    source: Source, checked: SourceCheck, processor: Processor, limit: int, show: int, row_length: int | None,
    tokens_per_image: int | None, seed: int,
) -> None:  # fmt: skip
    for index in chosen(source, limit, seed):
        try:
            sample = source.sample(index)
        except Unusable:
            continue  # it is among the source's rejected
        try:
            item = encode_sample(sample, processor, tokens_per_image, source.name, index)
        except InputError as error:
            checked.left_out.append(Rejected(sample.id, "cannot be laid out", str(error)))
            continue
        if not any(item.trainable):
            checked.left_out.append(Rejected(sample.id, "nothing to learn", "no token of it is trained on"))
            continue
        checked.lengths.append(len(item))
        checked.n_images += len(item.images)
        checked.n_image_tokens += sum(span.length for span in item.spans)
        checked.n_learned += sum(item.trainable)
        checked.too_long += row_length is not None and len(item) > row_length
        if len(checked.shown) < show:
            checked.shown.append(item)


def chosen(source: Source, limit: int, seed: int) -> list[int]:
    """Which samples are looked at: of a stream and of a source without end the first, else drawn."""
    n = source.n_samples
    if n is None or source.window is not None:
        return list(range(limit if n is None else min(limit, n)))
    return list(range(n)) if n <= limit else sorted(random.Random(f"check {seed}").sample(range(n), limit))
