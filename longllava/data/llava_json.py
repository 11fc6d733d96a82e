"""Conversations in LLaVA's JSON (or messages with roles), one record to a sample. Never pickle, never a URL.

    {"id": "7", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                                                   {"from": "gpt", "value": "a cat"}]}
    {"messages": [{"role": "user", "content": "<image>What is this?"}, ...], "images": ["a.png"]}
    {"video": "door.mp4", "QA": [{"i": "Watch.", "q": "What opens?", "a": "the door"}]}  # columns: {conversations: QA}
    {"question": "What is this?", "answer": "a cat", "image": "a.png"}  # columns: {question: question, answer: answer}

"image", "images", "video" and "videos" are a path, a list of paths, or absent; a video is a file or a folder of frames,
and its mark is <image> or <video>. A record that cannot be used raises `Unusable`.
Source: LLaVA docs/Finetune_Custom_Data.md; OpenAI's chat format for messages; VideoChat2-IT for "QA".
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longllava.data.images import safe_path
from longllava.data.records import CONVERSATIONS, IMAGES, VIDEOS, Columns, Embedded, Unusable, cell, printable
from longllava.data.samples import IMAGE_MARK, Evidence, Medium, Sample, Turn, problem
from longllava.errors import InputError

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant"}
VIDEO_MARK = "<video>"
MARKS = re.compile(f"{IMAGE_MARK}|{VIDEO_MARK}")
VIDEO = Medium(0, video=True)  # how many frames is found out when it is opened


@dataclass(frozen=True)
class Shape:
    """How a source's records are read. marks: "written", or "first" where records without marks have theirs first.

    question: what is asked of records that hold an answer only.
    """

    columns: Columns = Columns()
    marks: str = "written"
    question: str | None = None


def sample_of_record(record: Any, name: str, root: Path, shape: Shape | None = None) -> Sample:
    """A checked sample; its images are paths below `root` that exist, or references into a table or tar.

    A video is one reference, with a Medium of no images yet. Raises: Unusable.
    """
    shape = shape or Shape()
    if not isinstance(record, dict):
        raise Unusable("not a record", f"expected an object with conversations, got {type(record).__name__}")
    turns, inline = turns_of_record(record, shape)
    column = images_of(cell(record, shape.columns.image, IMAGES))
    if inline and column and inline != column:
        raise Unusable("images named twice", "in the messages and in a column, differently")
    images = tuple(checked(image, root) for image in inline or column)
    videos = tuple(
        checked(video, root, folders=True) for video in images_of(cell(record, shape.columns.video, VIDEOS))
    )
    turns, media = with_marks(turns, len(images), len(videos), shape.marks)
    references = in_order(media, images, videos)
    identity = record.get(shape.columns.id)
    sample = Sample(
        printable(str(identity) if isinstance(identity, (str, int)) else name), turns, references,
        evidence_of(record.get("evidence"), turns, len(images)), media if videos else (),
    )  # fmt: skip
    reason = problem(sample)
    if reason is not None:
        kind = "marks and images differ" if "marks" in reason else "turns out of order or empty"
        raise Unusable(kind, reason)
    return sample


def turns_of_record(record: dict, shape: Shape) -> tuple[tuple[Turn, ...], list[str | Embedded]]:
    columns = shape.columns
    if columns.answer is not None:
        question = record.get(columns.question) if columns.question else shape.question
        texts = [unicode_text(checked_text(text, number), number)
                 for number, text in enumerate((question, record.get(columns.answer)), 1)]  # fmt: skip
        return (Turn("user", texts[0]), Turn("assistant", texts[1])), []
    name = columns.conversations or next((name for name in CONVERSATIONS if name in record), None)
    if name is None or name not in record:
        raise Unusable("no conversations", f"keys are {', '.join(map(repr, list(record)[:8])) or 'none'}")
    return turns_of(record[name], name)


def checked_text(text: Any, number: int) -> str:
    if not isinstance(text, str):
        raise Unusable("missing text", f"turn {number} holds {type(text).__name__}, expected a string")
    return text


def turns_of(value: Any, column: str) -> tuple[tuple[Turn, ...], list[str | Embedded]]:
    """Turns, and the paths that parts of a message name themselves."""
    if not isinstance(value, list):
        raise Unusable(f"{column} is no list", f"got {type(value).__name__}")
    turns: list[Turn] = []
    paths: list[str | Embedded] = []
    for number, item in enumerate(value, 1):
        if isinstance(item, dict) and "q" in item and "a" in item:
            asked = "\n".join(checked_text(item[key], number) for key in ("i", "q") if item.get(key))
            turns += [Turn("user", unicode_text(asked, number)),
                      Turn("assistant", unicode_text(checked_text(item["a"], number), number))]  # fmt: skip
            continue
        keys = ("role", "content") if isinstance(item, dict) and "role" in item else ("from", "value")
        if not isinstance(item, dict) or keys[0] not in item:
            raise Unusable("missing role", f"turn {number} has no 'from' or 'role'")
        role = item[keys[0]]
        if not isinstance(role, str) or role not in ROLES:
            raise Unusable("unknown role", f"turn {number} is of {role!r}, known are {', '.join(ROLES)}")
        text, inline = text_of(item.get(keys[1]), number)
        paths += inline
        turns.append(Turn(ROLES[role], text))  # type: ignore[arg-type]
    return tuple(turns), paths


def text_of(content: Any, number: int) -> tuple[str, list[str | Embedded]]:
    if isinstance(content, str):
        return unicode_text(content, number), []
    if not isinstance(content, list):
        raise Unusable("missing text", f"turn {number} holds {type(content).__name__}, expected a string")
    text: str = ""
    paths: list[str | Embedded] = []
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
            path = cell(part, None, ("image", "path", "image_url"))  # a table's parts have all, some of them empty
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


def with_marks(
    turns: tuple[Turn, ...], n_images: int, n_videos: int, marks: str
) -> tuple[tuple[Turn, ...], tuple[Medium, ...]]:
    """Turns in which every mark is <image>, and what each mark stands for: videos where <video> stands.

    A record with videos alone may write <image> for them.
    """
    if marks == "first" and (n_images or n_videos) and turns and not any(
        mark in turn.text for turn in turns for mark in (IMAGE_MARK, VIDEO_MARK)
    ):  # fmt: skip
        # as an unmarked prompt is laid out: pictures, a line break, the text; after a video no break
        opening = IMAGE_MARK * n_images + ("\n" if n_images and not n_videos else "") + VIDEO_MARK * n_videos
        turns = (Turn(turns[0].role, opening + turns[0].text), *turns[1:])
    if not n_videos:
        return turns, (Medium(),) * n_images
    media: list[Medium] = []
    changed = []
    for turn in turns:
        text = turn.text
        if turn.role == "user":
            if not n_images:
                text = text.replace(IMAGE_MARK, VIDEO_MARK)
            media += [VIDEO if mark == VIDEO_MARK else Medium() for mark in MARKS.findall(text)]
            text = text.replace(VIDEO_MARK, IMAGE_MARK)
        changed.append(Turn(turn.role, text))
    n_marked = sum(medium.video for medium in media)
    if n_marked != n_videos:
        raise Unusable("marks and videos differ", f"{n_marked} {VIDEO_MARK} marks, {n_videos} videos")
    return tuple(changed), tuple(media)


def in_order(media: tuple[Medium, ...], images: tuple[str, ...], videos: tuple[str, ...]) -> tuple[str, ...]:
    if not videos:
        return images
    if sum(not medium.video for medium in media) != len(images):
        n_marks = sum(not medium.video for medium in media)
        raise Unusable("marks and images differ", f"{n_marks} {IMAGE_MARK} marks, {len(images)} images")
    rest, films = iter(images), iter(videos)
    return tuple(next(films) if medium.video else next(rest) for medium in media)


def images_of(value: Any) -> list[str | Embedded]:
    if value is None:
        return []
    paths: list[str | Embedded] = []
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, Embedded):
            paths.append(item)
            continue
        path = item.get("path") if isinstance(item, dict) else item
        if not isinstance(path, str) or not path:
            raise Unusable("image is no path", f"got {str(item)[:80]!r}")
        if "://" in path or path.startswith("data:"):
            raise Unusable("image is a URL", f"{path[:80]!r}; download it below the source's image_root")
        paths.append(path)
    return paths


def checked(image: str | Embedded, root: Path, folders: bool = False) -> str:
    return image.reference if isinstance(image, Embedded) else checked_path(image, root, folders)


def checked_path(path: str, root: Path, folders: bool = False) -> str:
    try:
        found = safe_path(path, root)
        exists = os.path.isfile(found) or folders and os.path.isdir(found)
    except InputError as error:
        raise Unusable("image path leaves its folder", str(error)) from None
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, a loop of links
        raise Unusable("missing image", f"{path[:80]!r}: {error}") from None
    if not exists:
        raise Unusable("missing video" if folders else "missing image", str(found))
    return str(found)


def evidence_of(value: Any, turns: tuple[Turn, ...], n_images: int) -> tuple[Evidence, ...]:
    """The optional column that the world's export writes: [{"turn", "start", "end", "image" or "key"}].

    A column of that name in which nothing has a "turn" is the record's own, and says nothing to us.
    """
    if not any(isinstance(item, dict) and "turn" in item for item in (value if isinstance(value, list) else [value])):
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
            if (item.image is None) == (item.key is None) or item.image is not None and not 0 <= item.image < n_images:
                raise IndexError
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        raise Unusable("evidence does not fit the turns", str(value)[:80]) from None
    return found
