"""A JSON list, or one JSON object a line. Records are found by place in bytes; the whole is never held as objects."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from longllava.data.records import Unusable
from longllava.errors import DataError


class JsonStore:
    """Places are (file, start, length, line)."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = list(paths)

    def scan(self) -> Iterator[tuple[tuple[int, int, int, int], str, Any]]:
        for number, path in enumerate(self.paths):
            for start, length, line, raw in records(path):
                place = (number, start, length, line)
                try:
                    yield place, f"{path}:{line}", parsed(raw)
                except Unusable as error:
                    yield place, f"{path}:{line}", error

    def read(self, place: tuple[int, int, int, int]) -> Any:
        number, start, length, _ = place
        with self.paths[number].open("rb") as file:
            file.seek(start)
            return parsed(file.read(length))

    def where(self, place: tuple[int, int, int, int]) -> str:
        return f"{self.paths[place[0]]}:{place[3]}"


def parsed(raw: bytes) -> Any:
    try:
        return json.loads(raw, parse_constant=refuse_constant)
    except UnicodeDecodeError:
        raise Unusable("not UTF-8") from None
    except Unusable:
        raise
    except (ValueError, RecursionError) as error:  # ValueError alone: a number of more than 4,300 digits
        raise Unusable("malformed JSON", " ".join(str(error).split())) from None


def refuse_constant(name: str) -> float:
    raise Unusable("malformed JSON", f"{name} is no JSON")


def records(path: Path) -> Iterator[tuple[int, int, int, bytes]]:
    """(start, length, line number, bytes) of each record. Raises: DataError."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            start = 3 if file.read(3) == b"\xef\xbb\xbf" else 0
            file.seek(start)
            head = file.read(4096).lstrip()
            file.seek(start)
            if head.startswith(b"["):
                yield from records_of_list(path, start, file.read())
                return
            for line, raw in enumerate(file, 1):
                if raw.strip():
                    yield start, len(raw), line, raw
                start += len(raw)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def records_of_list(path: Path, offset: int, raw: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Elements of a JSON list by place, one parsed at a time."""
    try:
        # One character a byte: JSON's own characters are ASCII, and places count bytes.
        text = raw.decode("latin-1")
        decoder = json.JSONDecoder(strict=False, parse_int=str)  # what cannot be a number is told of its record alone
        at, line, counted = skip_space(text, text.index("[") + 1), 1, 0
        while text[at : at + 1] != "]":
            _, end = decoder.raw_decode(text, at)
            line += text.count("\n", counted, at)
            counted = at
            yield offset + at, end - at, line, raw[at:end]
            at = skip_space(text, end)
            if text[at : at + 1] == ",":
                at = skip_space(text, at + 1)
            elif text[at : at + 1] != "]":
                raise json.JSONDecodeError("expected ',' or ']' after a record", text, at)
        if text[at + 1 :].strip():
            raise json.JSONDecodeError("text after the list", text, at + 1)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path}: malformed JSON: {' '.join(str(error).split())}") from None


def skip_space(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\n", "\r", "\t"):
        at += 1
    return at
