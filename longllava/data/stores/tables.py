"""Parquet and arrow files. Pictures inside a table are left there: a scan reads their places only, not their bytes.

Columns of pictures: bytes, {"bytes", "path"}, paths, or lists of these, as `datasets` writes them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from longllava.data.embedded import arrow_table, in_table, parquet_file, row_group, state_of
from longllava.data.records import IMAGES, VIDEOS, Columns, Embedded, Unusable
from longllava.errors import DataError, InputError

ROWS = 1000  # of an arrow file that are turned into objects at a time


class TableStore:
    """Places are (file, row group, row in it, row in the file).

    files: pictures are files that the table names, below the source's image_root; else they lie in the table.
    """

    def __init__(self, paths: Sequence[Path], columns: Columns, files: bool):
        self.paths, self.files = list(paths), files
        self.wanted = set(columns.needed())
        self.media = {name for name in (columns.image, columns.video, *IMAGES, *VIDEOS) if name}
        self.states: dict[int, tuple[int, ...]] = {}  # of the files that places are in

    def scan(self) -> Iterator[tuple[tuple[int, int, int, int], str, Any]]:
        for number, path in enumerate(self.paths):
            row = 0
            self.states[number] = state_of(str(path))
            try:
                n_groups = self.n_groups(number)
                for group in range(n_groups):
                    for inside, record in enumerate(self.records(path, *self.group(number, group))):
                        yield (number, group, inside, row), f"{path}:{row + 1}", record
                        row += 1
            except (InputError, OSError) as error:
                raise DataError(str(error)) from None

    def read(self, place: tuple[int, int, int, int]) -> Any:
        number, group, inside, row = place
        if self.states[number] != state_of(str(self.paths[number])):  # another row may be there now, of other pictures
            raise Unusable("the table changed", "the file was written anew")
        try:  # this row alone: samples come shuffled, and a thousand as objects are a thousand times the work
            return self.records(self.paths[number], row, self.group(number, group)[1].slice(inside, 1))[0]
        except (InputError, IndexError) as error:
            raise Unusable("the table changed", str(error)) from None

    def where(self, place: tuple[int, int, int, int]) -> str:
        return f"{self.paths[place[0]]}:{place[3] + 1}"

    def is_arrow(self, number: int) -> bool:
        return self.paths[number].suffix.lower() == ".arrow"

    def n_groups(self, number: int) -> int:
        if self.is_arrow(number):
            return -(-len(arrow_table(str(self.paths[number]))) // ROWS)
        return parquet_file(str(self.paths[number])).metadata.num_row_groups

    @functools.lru_cache(maxsize=8)  # noqa: B019  a store lives as long as its run
    def group(self, number: int, group: int) -> tuple[int, Any]:
        """(its first row in the file, table) of a row group, or of ROWS rows of an arrow file."""
        path = str(self.paths[number])
        if self.is_arrow(number):
            whole = arrow_table(path)
            return group * ROWS, whole.slice(group * ROWS, ROWS).select(
                [name for name in whole.column_names if name in self.wanted])  # fmt: skip
        file = parquet_file(path)
        first = sum(file.metadata.row_group(before).num_rows for before in range(group))
        return first, row_group(path, group, self.leaves(file))

    def records(self, path: Path, first: int, table: Any) -> list[dict[str, Any]]:
        """Rows as objects; those of a table that begins with the file's row `first`."""
        columns = {}
        for name in table.column_names:
            column = table[name]
            in_table_itself = name in self.media and not self.files and not names_files(column.type)
            columns[name] = places(column, path, first, name) if in_table_itself else values(column, name in self.media)
        return [dict(zip(columns, row)) for row in zip(*columns.values(), strict=True)]

    def leaves(self, file: Any) -> list[str]:
        """The parquet columns to read: of pictures everything but the bytes, where something else is there."""
        leaves = [file.schema.column(index).path for index in range(len(file.schema.names))]
        chosen = []
        for name in file.schema_arrow.names:  # a name may hold dots, which also stand before what lies in a column
            if name in self.wanted:
                paths = [path for path in leaves if path == name or path.startswith(f"{name}.")]
                light = [path for path in paths if path.split(".")[-1] != "bytes"] if name in self.media else paths
                chosen += light or paths
        return chosen


def names_files(kind: Any) -> bool:
    """Whether a column holds strings, or lists of them: paths."""
    import pyarrow as pa

    inner = kind.value_type if is_list(kind) else kind
    if pa.types.is_dictionary(inner):  # a column of pandas's categories
        inner = inner.value_type
    return any(test(inner) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


def is_list(kind: Any) -> bool:
    """Of any of Arrow's forms; of a fixed size where `datasets` was told the length."""
    from pyarrow import types

    tests = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view, types.is_large_list_view)
    return any(test(kind) for test in tests)


def places(column: Any, path: Path, first: int, name: str) -> list[Any]:
    """References in the place of a column's pictures."""
    import pyarrow.compute as pc

    counts = (pc.list_value_length(column) if is_list(column.type) else pc.is_valid(column)).to_pylist()
    return [
        [Embedded(in_table(path, first + row, item, name)) for item in range(int(count or 0))]
        for row, count in enumerate(counts)
    ]


def values(column: Any, is_media: bool) -> list[Any]:
    """A column as objects; of pictures their paths alone."""
    rows = column.to_pylist()
    return [path_of(row) for row in rows] if is_media else rows


def path_of(value: Any) -> Any:
    if isinstance(value, list):
        return [path_of(item) for item in value]
    return value.get("path") if isinstance(value, dict) else value
