"""Where records lie: JSON, parquet and arrow tables, tars of pictures with their JSON, the hub's data sets.

A store is read through once (`scan`), and any of its records again later by its place (`read`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from longllava.data.records import Columns
from longllava.data.stores.json_lines import JsonStore
from longllava.data.stores.tables import TableStore
from longllava.data.stores.tars import TarStore
from longllava.errors import DataError

Place = tuple[int, int, int, int]
SUFFIXES = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "parquet", ".tar": "webdataset"}
FORMATS = ("auto", "json", "parquet", "webdataset", "datasets")
READABLE = ", ".join(SUFFIXES)


class Store(Protocol):
    def scan(self) -> Iterator[tuple[Place, str, Any]]:
        """(place, "file:line", record or Unusable) of each record. Raises: DataError when a file cannot be read."""
        ...

    def read(self, place: Place) -> Any:
        """The record at a place. Raises: Unusable, OSError."""
        ...

    def where(self, place: Place) -> str: ...


def open_store(kind: str, paths: Sequence[Path], columns: Columns, files: bool) -> Store:
    """kind: one of FORMATS but "datasets". files: pictures are files below image_root, named in the table.

    Raises: DataError.
    """
    kinds = {SUFFIXES.get(path.suffix.lower()) for path in paths} if kind == "auto" else {kind}
    if len(kinds) != 1 or None in kinds:
        raise DataError(f"{paths[0]}: a source's files are all of one kind, of {READABLE}; or name it: format: json")
    (found,) = kinds
    if found == "parquet":
        return TableStore(paths, columns, files)
    return TarStore(paths) if found == "webdataset" else JsonStore(paths)


def paths_of(written: str | Sequence[str], folder: Path) -> list[Path]:
    """The files that a recipe names, relative to `folder`; patterns in order of name. Raises: DataError.

    `folder` is no pattern, nor is a name under which there is a file.
    """
    found: list[Path] = []
    for one in [written] if isinstance(written, str) else written:
        if (folder / one).is_file():
            found.append(folder / one)
            continue
        anchor, matches = Path(one).anchor, list[Path]()
        if any(sign in one for sign in "*?["):
            root = Path(anchor or folder)
            try:
                matches = sorted(path for path in root.glob(str(Path(one).relative_to(anchor))) if path.is_file())
            except ValueError as error:  # as part-**.json before Python 3.13
                raise DataError(f"{folder / one}: {error}") from None
        if not matches:
            raise DataError(f"{folder / one}: no such file")
        found += matches
    return found
