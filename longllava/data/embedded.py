"""Pictures and videos that lie inside a tar or a table, by references that need nothing but themselves.

    tar:OFFSET+SIZE:PATH            bytes of a member of an uncompressed tar
    table:ROW/ITEM/COLUMN:PATH      item ITEM of a cell of a parquet or arrow file; COLUMN is percent-quoted
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from longllava.errors import InputError

TAR = re.compile(r"tar:(\d+)\+(\d+):(.+)", re.DOTALL)
TABLE = re.compile(r"table:(\d+)/(\d+)/([^:/]+):(.+)", re.DOTALL)
READING = threading.Lock()  # of parquet files
NOT_UNICODE = "pyarrow opens no file whose name is not Unicode text; rename that file or folder"
ARROW_IMPORT = "reading parquet and arrow files needs pyarrow ({}); pip install 'longllava[train]'"


def in_tar(path: Path, offset: int, size: int) -> str:
    return f"tar:{offset}+{size}:{path}"


def in_table(path: Path, row: int, item: int, column: str) -> str:
    return f"table:{row}/{item}/{quote(column, safe='')}:{path}"


def is_embedded(reference: str) -> bool:
    return TAR.fullmatch(reference) is not None or TABLE.fullmatch(reference) is not None


def in_a_table(reference: str) -> bool:
    return TABLE.fullmatch(reference) is not None


def place_in_table(reference: str) -> tuple[str, int]:
    """(file, row): in this order a row group is decoded once for all its pictures. Others are all equal."""
    found = TABLE.fullmatch(reference)
    return (found[4], int(found[1])) if found else ("", 0)


def file_of(reference: str) -> str:
    """The file that a reference, also a plain path, leads to."""
    found = TAR.fullmatch(reference) or TABLE.fullmatch(reference)
    return found[found.re.groups] if found else reference


def state_of(reference: str) -> tuple[int, ...]:
    """By which a file that was written anew is told from what it was; empty for what is in no file."""
    with contextlib.suppress(OSError):  # opening it will say what is wrong
        status = os.stat(file_of(reference))
        return status.st_ino, status.st_size, status.st_mtime_ns
    return ()


def kept(size: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """An lru_cache of what is made of the file that is the first argument, as long as it is that file: one process may
    train on a table, write it anew and train again."""

    def wrap(make: Callable[..., Any]) -> Callable[..., Any]:
        made = functools.lru_cache(size)(lambda path, state, *more: make(path, *more))

        @functools.wraps(make)
        def current(path: str, *more: Any) -> Any:
            return made(path, state_of(path), *more)

        vars(current)["cache_clear"] = made.cache_clear
        return current

    return wrap


def read_embedded(reference: str) -> bytes:
    """Raises: InputError naming the reference."""
    found = TAR.fullmatch(reference)
    try:
        if found:
            offset, size, path = int(found[1]), int(found[2]), found[3]
            with open(path, "rb") as file:
                file.seek(offset)
                data = file.read(size)
            if len(data) < size:
                raise InputError(f"{reference}: the tar ends after {offset + len(data)} bytes")
            return data
        found = TABLE.fullmatch(reference)
        if found is None:
            raise InputError(f"{reference}: no reference into a tar or a table")
        item = item_of(cells_of(found[4], unquote(found[3])).cell(int(found[1])), int(found[2]))
    except OSError as error:
        raise InputError(f"{reference}: cannot be read: {error.strerror or error}") from None
    if item is None:
        raise InputError(f"{reference}: the cell is empty")
    return item


def item_of(value: Any, item: int) -> bytes | None:
    """The bytes of a cell: binary, {"bytes", "path"}, or a list of those."""
    if isinstance(value, list):
        value = value[item] if item < len(value) else None
    if isinstance(value, dict):
        value = value.get("bytes")
    return value if isinstance(value, bytes) else None


class Cells:
    """One column of a table file."""

    def __init__(self, path: str, column: str):
        self.path, self.column = path, column
        self.table: Any = None
        if path.lower().endswith(".arrow"):
            self.table = arrow_table(path)[column]
            return
        metadata = parquet_file(path).metadata
        self.starts = [0]
        for number in range(metadata.num_row_groups):
            self.starts.append(self.starts[-1] + metadata.row_group(number).num_rows)

    def cell(self, row: int) -> Any:
        if self.table is not None:
            return self.table[row].as_py()
        number = bisect.bisect_right(self.starts, row) - 1
        return column_of_group(self.path, number, self.column)[row - self.starts[number]].as_py()


@kept(16)
def cells_of(path: str, column: str) -> Cells:
    return Cells(path, column)


@kept(16)
def parquet_file(path: str) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except Exception as error:
        raise InputError(ARROW_IMPORT.format(error)) from None
    try:
        # what is fetched ahead stays in memory until the file is closed: a row group of each file
        return pyarrow.parquet.ParquetFile(path, pre_buffer=False)
    except UnicodeEncodeError:
        raise InputError(f"{path!a}: {NOT_UNICODE}") from None
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: no parquet file: {' '.join(str(error).split())}") from None


@kept(4)  # for the next cells of it; it may be a whole file, of hundreds of megabytes
def column_of_group(path: str, number: int, column: str) -> Any:
    return row_group(path, number, [column])[column]


def row_group(path: str, number: int, columns: list[str]) -> Any:
    """One thread at a time: steps are planned while the pictures of others are read, and two threads in one ParquetFile
    crash ("double free or corruption", pyarrow 26) or wait for ever."""
    with READING:
        return parquet_file(path).read_row_group(number, columns=columns)


@kept(16)
def arrow_table(path: str) -> Any:
    """A file of `datasets` (a stream) or of Arrow itself, mapped, not read."""
    try:
        import pyarrow
    except Exception as error:
        raise InputError(ARROW_IMPORT.format(error)) from None
    try:
        source = pyarrow.memory_map(path)
        try:
            return pyarrow.ipc.open_file(source).read_all()
        except pyarrow.ArrowInvalid:
            source.seek(0)
            return pyarrow.ipc.open_stream(source).read_all()
    except UnicodeEncodeError:
        raise InputError(f"{path!a}: {NOT_UNICODE}") from None
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: no arrow file: {' '.join(str(error).split())}") from None
