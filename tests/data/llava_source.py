"""A source of a JSON file, without a recipe that names it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longllava.data.sources import RecordSource
from longllava.data.stores.json_lines import JsonStore


class LlavaSource(RecordSource):
    """Records of one JSON file, or of several."""

    def __init__(
        self, name: str, path: str | Path | Sequence[Path], root: str | Path | None = None, **options: Any
    ) -> None:
        paths = [Path(path)] if isinstance(path, (str, Path)) else list(path)
        super().__init__(
            name, JsonStore(paths), str(paths[0]), Path(root) if root is not None else paths[0].parent, **options
        )
