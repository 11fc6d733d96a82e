"""What V-NIAH asks: a haystack of pictures, needles, and where a needle goes.

Every picture of the world holds one thing, a digit and a frame, needles and haystack alike; only the
needle's thing stands once in its prompt. Pictures are of the test split: unseen combinations, unseen
renderings. Nothing is picked by hand: needles follow from the seed, and the haystack from the seed and the
needles' things; 100 pictures are the first of 1,000.
Source: LongVA's vision_niah (EvolvingLMMs-Lab/LongVA), whose haystack is a film, the needles five pictures.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longllava.data.worlds.pictures import draw_spec, drawn_things, reference
from longllava.data.worlds.questions import by_thing
from longllava.data.worlds.sheets import STYLES
from longllava.data.worlds.words import name_of
from longllava.errors import ConfigError, InputError
from longllava.inputs.video import folder_frames, leading_frames

KINDS = ("number", "colour")  # what needles are asked for, in turn
MAX_IMAGES = 100_000
DIGEST_OF = 32  # haystack pictures whose references enter the digest


@dataclass(frozen=True)
class Needle:
    """A picture (an image source), the name of what only it shows, and the question about it."""

    picture: Any
    name: str
    kind: str
    question: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Settings:
    """images: sizes of haystack. depths: 0 (first) to 1 (last). styles: "noto", "fluent", or paths of sheets.

    haystack: a folder of pictures, a GIF or a video (1 frame a second), whose first N frames stand in for the
    world's pictures; the needles are still the world's, and differ from it in more than what they show.
    """

    images: tuple[int, ...] = (100, 250, 500, 1000)
    depths: tuple[float, ...] = tuple(i / 10 for i in range(11))
    n_needles: int = 20
    seed: int = 0
    styles: tuple[str, ...] = STYLES
    haystack: str | None = None

    def __post_init__(self) -> None:
        if not self.images or not all(1 <= n <= MAX_IMAGES for n in self.images):
            raise ConfigError(f"images: got {list(self.images)}, expected numbers from 1 to {MAX_IMAGES:,}")
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise ConfigError(f"depths: got {list(self.depths)}, expected numbers from 0 (first) to 1 (last)")
        n_things = len(drawn_things(self.styles))
        if not 1 <= self.n_needles <= n_things // 2:
            raise ConfigError(
                f"needles: got {self.n_needles}, allowed: 1 to {n_things // 2}, half of the {n_things}"
                " things; the other half is for the haystack"
            )


def position(depth: float, n_images: int) -> int:
    """Pictures before the needle: int(depth * N), as LongVA; 0.29 * 100 counts as 29, not 28.999..."""
    return int(round(depth * n_images, 9))


def shuffled_things(settings: Settings) -> list[int]:
    """All things in the seed's order: needles first, the haystack's after them."""
    things = list(drawn_things(settings.styles))
    random.Random(f"vniah/things/{settings.seed}").shuffle(things)
    return things


def draw_needles(settings: Settings) -> list[Needle]:
    """Needles in order, asked for their number and the colour of their frame in turn."""
    needles = []
    for i, thing in enumerate(shuffled_things(settings)[: settings.n_needles]):
        picture = draw_picture(f"vniah/needle/{settings.seed}/{i}", [thing], settings)
        kind = KINDS[i % len(KINDS)]
        question = by_thing(picture, kind)
        assert question is not None  # plain pictures have a digit and a frame
        needles.append(Needle(reference(picture), name_of(thing), kind, question.text, question.answer))
    return needles


def draw_haystack(settings: Settings, n: int) -> list[Any]:
    """The first n image sources of the haystack. Raises: InputError when a folder or video has fewer."""
    if settings.haystack is not None:
        return first_frames(settings.haystack, n)
    things = sorted(shuffled_things(settings)[settings.n_needles :])
    pictures = (draw_picture(f"vniah/haystack/{settings.seed}/{i}", things, settings) for i in range(n))
    return [reference(picture) for picture in pictures]


def draw_picture(key: str, things: Sequence[int], settings: Settings):  # type: ignore[no-untyped-def]
    rng = random.Random(key)
    return draw_spec(rng, rng.choice(things), "test", rng.choice(settings.styles), plain=True, restyle=0.0)


def first_frames(source: str, n: int) -> list[Any]:
    """The first n pictures of a folder, or the first n seconds of a video, one frame a second."""
    path = Path(source)
    if not path.exists():
        raise InputError(f"haystack {source}: no such folder or video")
    try:
        frames: list[Any] = folder_frames(path) if path.is_dir() else leading_frames(path, n)
    except InputError as error:
        raise InputError(f"haystack {source}: {error}") from None
    if len(frames) < n:
        have = f"{len(frames)} {'pictures' if path.is_dir() else 'frames at 1 per second'}"
        raise InputError(f"haystack {source}: {have}, {n} are needed; ask for fewer with --images")
    return frames[:n]


def digest(settings: Settings) -> str:
    """Of the pictures and questions: a changed world is another evaluation. Files count by name, size and time."""
    files = [Path(style) for style in settings.styles if style not in STYLES]
    hay = draw_haystack(settings, DIGEST_OF) if settings.haystack is None else []
    if settings.haystack is not None:
        path = Path(settings.haystack)
        files += folder_frames(path) if path.is_dir() else [path]
    for file in files:
        status = file.stat()
        hay.append((file.name, status.st_size, status.st_mtime_ns))
    return hashlib.sha256(repr((draw_needles(settings), hay)).encode()).hexdigest()[:16]
