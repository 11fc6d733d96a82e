"""The tasks of the picture world by name, and `WorldTask`: index -> sample."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, Protocol

from longllava.data.samples import Sample
from longllava.data.worlds.album_tasks import Count, Needle, Order, Retrieval, Same, SubImage
from longllava.data.worlds.conversation import Conversation
from longllava.data.worlds.image_tasks import Caption, Single
from longllava.data.worlds.pictures import PicturePool
from longllava.data.worlds.text_tasks import Facts, TagsCaption, TagsRecall, Text
from longllava.errors import ConfigError
from longllava.settings import build


class Maker(Protocol):
    """A task's settings (fields of a frozen dataclass), and one sample from a random state."""

    def make(self, rng: random.Random, pool: PicturePool) -> Conversation: ...


TASKS: dict[str, type[Maker]] = {
    "tags-caption": TagsCaption, "tags-recall": TagsRecall, "facts": Facts, "text": Text,
    "caption": Caption, "single": Single,
    "needle": Needle, "same": Same, "order": Order, "count": Count, "retrieval": Retrieval,
    "subimage": SubImage,
}  # fmt: skip


class WorldTask:
    """Samples of one task: `sample(i)` is a pure function of (task, settings, split, seed, i) and the pool.

    settings: the task's own (n_images: [4, 16] and so on; see its class). pool: the pictures it draws from,
    the split's default pool if none is given. Raises: ConfigError for an unknown task or setting.
    """

    def __init__(
        self, name: str, *, split: str = "train", seed: int = 0, settings: Mapping[str, Any] | None = None,
        pool: PicturePool | None = None,
    ) -> None:  # fmt: skip
        if name not in TASKS:
            raise ConfigError(f"task: got {name!r}, allowed: {', '.join(TASKS)}")
        self.name, self.seed = name, seed
        self.maker: Maker = build(TASKS[name], dict(settings or {}), f"task {name}")
        self.pool = pool or PicturePool(split)
        self.split = self.pool.split
        if self.split != split:
            raise ConfigError(
                f"task {name}: split {split!r}, but its pictures are of the {self.split!r} split"
            )

    def sample(self, index: int) -> Sample:
        """Sample number `index`, counted from 0 without an end."""
        key = f"{self.name}/{self.split}/{self.seed}/{index}"
        return self.maker.make(random.Random(key), self.pool).sample(key)
