"""Conversations in LLaVA's JSON (or messages with roles), one record to a sample. Never pickle, never a URL.

    {"id": "7", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                                                   {"from": "gpt", "value": "a cat"}]}
    {"messages": [{"role": "user", "content": "<image>What is this?"}, ...], "images": ["a.png"]}

"image" and "images" are a path, a list of paths, or absent. A record that cannot be used raises `Unusable`.
Source: LLaVA docs/Finetune_Custom_Data.md; OpenAI's chat format for messages.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from longllava.data.images import safe_path
from longllava.data.samples import IMAGE_MARK, Evidence, Sample, Turn, problem
from longllava.errors import InputError

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant"}


class Unusable(ValueError):
    """Why a record is left out. kind: the reason without its particulars, for counting."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind


def sample_of_record(record: Any, name: str, root: Path) -> Sample:
    """A checked sample; its images are paths below `root` that exist. Raises: Unusable."""
    if not isinstance(record, dict):
        raise Unusable("not a record", f"expected an object with conversations, got {type(record).__name__}")
    if "conversations" in record:
        turns, inline = turns_of(record["conversations"], "conversations", "from", "value")
    elif "messages" in record:
        turns, inline = turns_of(record["messages"], "messages", "role", "content")
    else:
        raise Unusable("no conversations", f"keys are {', '.join(map(repr, list(record)[:8])) or 'none'}")
    column = images_of(record.get("images", record.get("image")))
    if inline and column and inline != column:
        raise Unusable("images named twice", "in the messages and in a column, differently")
    images = tuple(checked_path(path, root) for path in inline or column)
    identity = record.get("id")
    sample = Sample(
        str(identity) if isinstance(identity, (str, int)) else name, turns, images,
        evidence_of(record.get("evidence"), turns, len(images)),
    )  # fmt: skip
    reason = problem(sample)
    if reason is not None:
        kind = "marks and images differ" if "marks" in reason else "turns out of order or empty"
        raise Unusable(kind, reason)
    return sample


def turns_of(value: Any, column: str, role_key: str, text_key: str) -> tuple[tuple[Turn, ...], list[str]]:
    """Turns, and the paths that parts of a message name themselves."""
    if not isinstance(value, list):
        raise Unusable(f"{column} is no list", f"got {type(value).__name__}")
    turns, paths = [], []
    for number, item in enumerate(value, 1):
        if not isinstance(item, dict) or role_key not in item:
            raise Unusable("missing role", f"turn {number} has no {role_key!r}")
        role = item[role_key]
        if not isinstance(role, str) or role not in ROLES:
            raise Unusable("unknown role", f"turn {number} is of {role!r}, known are {', '.join(ROLES)}")
        text, inline = text_of(item.get(text_key), number)
        paths += inline
        turns.append(Turn(ROLES[role], text))  # type: ignore[arg-type]
    return tuple(turns), paths


def text_of(content: Any, number: int) -> tuple[str, list[str]]:
    if isinstance(content, str):
        return unicode_text(content, number), []
    if not isinstance(content, list):
        raise Unusable("missing text", f"turn {number} holds {type(content).__name__}, expected a string")
    text, paths = "", []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            if IMAGE_MARK in part["text"]:
                raise Unusable(
                    "a text part holds <image>", f"turn {number}; parts of type image stand for images"
                )
            text += unicode_text(part["text"], number)
        elif kind in ("image", "image_url"):
            text += IMAGE_MARK
            path = part.get("image", part.get("path", part.get("image_url")))
            paths += images_of(path.get("url") if isinstance(path, dict) and "url" in path else path)
        else:
            raise Unusable("unknown part of a message", f"turn {number}: {str(part)[:80]}")
    return text, paths


def unicode_text(text: str, number: int) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Unusable("not Unicode text", f"turn {number} holds a lone surrogate") from None
    return text


def images_of(value: Any) -> list[str]:
    if value is None:
        return []
    paths = []
    for item in value if isinstance(value, list) else [value]:
        path = item.get("path") if isinstance(item, dict) else item
        if not isinstance(path, str) or not path:
            raise Unusable("image is no path", f"got {str(item)[:80]!r}")
        if "://" in path or path.startswith("data:"):
            raise Unusable("image is a URL", f"{path[:80]!r}; download it below the source's image_root")
        paths.append(path)
    return paths


def checked_path(path: str, root: Path) -> str:
    try:
        found = safe_path(path, root)
        exists = os.path.isfile(found)
    except InputError as error:
        raise Unusable("image path leaves its folder", str(error)) from None
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, a loop of links
        raise Unusable("missing image", f"{path[:80]!r}: {error}") from None
    if not exists:
        raise Unusable("missing image", str(found))
    return str(found)


def evidence_of(value: Any, turns: tuple[Turn, ...], n_images: int) -> tuple[Evidence, ...]:
    """The optional column that the world's export writes: [{"turn", "start", "end", "image" or "key"}]."""
    if value is None:
        return ()
    try:
        found = tuple(
            Evidence(item["turn"], item["start"], item["end"], item.get("image"),
                     tuple(item["key"]) if item.get("key") else None)
            for item in value
        )  # fmt: skip
        for item in found:
            for turn, start, end in [(item.turn, item.start, item.end), *([item.key] if item.key else [])]:
                if turn < 0 or not 0 <= start < end <= len(turns[turn].text):
                    raise IndexError
            if (item.image is None) == (item.key is None) or not 0 <= (item.image or 0) < max(1, n_images):
                raise IndexError
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        raise Unusable("evidence does not fit the turns", str(value)[:80]) from None
    return found
