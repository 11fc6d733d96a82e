"""Finished pieces of a long evaluation, on disk as soon as they are finished.

A JSON line of settings, then one JSON line per piece. Started again with the same settings, an evaluation
reads what it has and goes on; with other settings it starts anew, and the old file is kept beside the new.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from longllava.errors import DataError
from longllava.files import write_atomic, write_text


class Journal:
    """`records`: those read. `news`: what a person should know about an older file, or "".

    settings: a mapping that JSON can hold; everything a record depends on beside what stands in it.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any]):
        self.path = Path(path)
        self.records: list[dict[str, Any]] = []
        self.news = ""
        header = json.dumps({"settings": settings}, ensure_ascii=False)
        settings = json.loads(header)["settings"]
        lines = self.whole_lines()
        old = lines[0].get("settings") if lines else None
        if lines and not isinstance(old, dict):
            raise DataError(f"{self.path}: line 1 is no table of settings; move the file away to start anew")
        if old == settings:
            self.records = lines[1:]
            self.rewrite([header, *(json.dumps(line, ensure_ascii=False) for line in lines[1:])])
        else:
            if lines[1:]:
                old_bytes = self.path.read_bytes()  # copied, not moved: the new file may find the disk full
                kept = write_atomic(self.free_name(), lambda file: file.write(old_bytes))
                changed = difference(old or {}, settings)
                self.news = f"starting anew: {changed}; the finished part is kept in {kept}"
            self.rewrite([header])

    def free_name(self) -> Path:
        """For an older file: the one before it may be the one that is wanted again."""
        number = 1
        while (name := self.path.with_suffix(f".previous{number if number > 1 else ''}{self.path.suffix}")).exists():
            number += 1
        return name

    def rewrite(self, lines: list[str]) -> None:
        write_text(self.path, "".join(line + "\n" for line in lines))

    def whole_lines(self) -> list[dict[str, Any]]:
        """What the file holds; a torn last line (the machine stopped while it was written) is left out."""
        if not self.path.exists():
            return []
        try:
            raw = self.path.read_bytes()
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror or error}") from None
        lines = []
        for number, line in enumerate(raw[: raw.rfind(b"\n") + 1].splitlines(), 1):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict):
                raise DataError(f"{self.path}: line {number} is no record; move the file away to start anew")
            lines.append(record)
        return lines

    def append(self, record: dict[str, Any]) -> None:
        """On disk when this returns."""
        with self.path.open("ab") as file:
            file.write((json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
        self.records.append(record)


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """ "seed was 0, is 1"."""
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return ", ".join(f"{name} was {old.get(name)!r:.60}, is {new.get(name)!r:.60}" for name in names)
