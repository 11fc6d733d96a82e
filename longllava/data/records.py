"""What a record may look like: which columns hold what, pictures inside a record, and why one cannot be used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from longllava.errors import ConfigError

CONVERSATIONS = ("conversations", "messages", "conversation")
IMAGES = ("images", "image")
VIDEOS = ("videos", "video")


class Unusable(ValueError):
    """Why a record is left out. kind: the reason without its particulars, for counting. source, where: the record's."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(printable(f"{kind}: {detail}" if detail else kind))
        self.kind = kind
        self.source = self.where = ""


def printable(text: str) -> str:
    """Lone surrogates, which neither lists nor terminals take, as they are escaped: of ids, of names in a tar."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


@dataclass(frozen=True)
class Embedded:
    """A picture or a video that lies inside a table or a tar, not in a file of its own."""

    reference: str


@dataclass(frozen=True)
class Columns:
    """Names that a source's records have for ours. None: the usual ones.

    A record has conversations (a list of turns), or a question and an answer; with `question` unnamed, the
    source's own question is asked about every record.
    """

    id: str = "id"
    conversations: str | None = None
    image: str | None = None
    video: str | None = None
    question: str | None = None
    answer: str | None = None

    @classmethod
    def of(cls, mapping: Mapping[str, str]) -> Columns:
        """Raises: ConfigError for a name that is not ours."""
        known = tuple(cls.__dataclass_fields__)
        for name in mapping:
            if name not in known:
                raise ConfigError(f"columns: got {name!r}, allowed: {', '.join(known)}")
        return cls(**mapping)

    def needed(self) -> list[str]:
        """Names of columns that may be read."""
        named = (self.id, self.conversations, self.image, self.video, self.question, self.answer, "evidence")
        usual = ([] if self.conversations or self.answer else CONVERSATIONS,
                 [] if self.image else IMAGES, [] if self.video else VIDEOS)  # fmt: skip
        return [*(name for name in named if name), *(name for group in usual for name in group)]


def cell(record: Mapping[str, Any], named: str | None, usual: tuple[str, ...]) -> Any:
    """What the named column holds, or the first of the usual ones that is there; None where none is."""
    if named is not None:
        return record.get(named)
    return next((record[name] for name in usual if record.get(name) is not None), None)
