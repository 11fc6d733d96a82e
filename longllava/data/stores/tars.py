"""Tars of WebDataset: 000.jpg, 000.json, 001.jpg, ... Neighbours whose names agree up to the first dot are a sample.

Nothing is unpacked: a picture is read from its place in the tar. Members that are no plain files are passed over.
Source: github.com/webdataset/webdataset, "The WebDataset Format".
"""

from __future__ import annotations

import itertools
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longllava.data.embedded import in_tar
from longllava.data.records import Embedded, Unusable
from longllava.data.stores.json_lines import parsed
from longllava.errors import DataError

PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif")
FILMS = ("mp4", "webm", "mkv", "avi", "mov")
BLOCK = 512
TEXTS = ("txt", "text", "cap", "caption", "cls")


@dataclass(frozen=True)
class Member:
    """name: what follows the key ("jpg", "0.png")."""

    name: str
    offset: int
    size: int


class TarStore:
    """Places are (file, number of the sample in it, 0, 0). A record is the JSON, with a text as its column "txt"."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = list(paths)
        self.groups: list[list[tuple[str, tuple[Member, ...]]]] = [[] for _ in paths]

    def scan(self) -> Iterator[tuple[tuple[int, int, int, int], str, Any]]:
        for number, path in enumerate(self.paths):
            self.groups[number] = []
            for key, members in grouped(path):
                place = (number, len(self.groups[number]), 0, 0)
                self.groups[number].append((key, members))
                try:
                    yield place, f"{path}:{key}", self.read(place)
                except Unusable as error:
                    yield place, f"{path}:{key}", error

    def read(self, place: tuple[int, int, int, int]) -> Any:
        path = self.paths[place[0]]
        key, members = self.groups[place[0]][place[1]]
        record: dict[str, Any] = {"id": key}
        images, videos = list[Embedded](), list[Embedded]()
        with path.open("rb") as file:
            for member in members:
                kind = member.name.rsplit(".", 1)[-1].lower()
                if kind in PICTURES or kind in FILMS:
                    found = Embedded(in_tar(path, member.offset, member.size))
                    (images if kind in PICTURES else videos).append(found)
                elif kind == "json" or kind in TEXTS:
                    file.seek(member.offset)
                    raw = file.read(member.size)
                    record |= json_object(raw) if kind == "json" else {"txt": text(raw)}
        # the tar's own pictures, whatever their JSON calls them
        return record | ({"images": images} if images else {}) | ({"videos": videos} if videos else {})

    def where(self, place: tuple[int, int, int, int]) -> str:
        return f"{self.paths[place[0]]}:{self.groups[place[0]][place[1]][0]}"


def json_object(raw: bytes) -> dict[str, Any]:
    value = parsed(raw)
    if not isinstance(value, dict):
        raise Unusable("not a record", f"its JSON is no object but a {type(value).__name__}")
    return value


def text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise Unusable("not UTF-8") from None


def members(path: Path) -> Iterator[tuple[str, Member]]:
    """(key, member) of each plain file. Raises: DataError."""
    try:
        with tarfile.open(path, "r:") as tar:
            for item in tar:
                folder, _, base = item.name.rpartition("/")
                key, dot, name = base.partition(".")
                if item.isreg() and key and dot:
                    yield f"{folder}/{key}" if folder else key, Member(name, item.offset_data, item.size)
        with path.open("rb") as file:  # tarfile takes one that is cut inside a header for a whole one
            file.seek(-BLOCK, os.SEEK_END)
            if file.read().strip(b"\0"):
                raise tarfile.ReadError("it lacks the zeros that end a tar")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"{path}: no uncompressed tar, or torn: {' '.join(str(error).split())}; samples are read from their places"
            " in it, so unpack a .tar.gz"
        ) from None


def grouped(path: Path) -> Iterator[tuple[str, tuple[Member, ...]]]:
    for key, found in itertools.groupby(members(path), key=lambda pair: pair[0]):
        yield key, tuple(member for _, member in found)
