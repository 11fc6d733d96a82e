"""What a source's marks stand for, opened: videos as their frames, big pictures with their tiles; and how they are laid
out among text, the same in training as when a model is asked.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from longllava.config import PromptConfig
from longllava.data.ahead import LOOKS
from longllava.data.cache import cache_folder
from longllava.data.embedded import in_a_table, is_embedded, read_embedded
from longllava.data.frames import frames_of
from longllava.data.images import tile_reference
from longllava.data.records import Unusable
from longllava.data.samples import Medium, Sample
from longllava.errors import ConfigError, InputError, LongLLaVAError
from longllava.inputs.chat import Mark, Message, Piece, media_pieces
from longllava.inputs.image import upright_size
from longllava.inputs.tiles import Split, expand, parse_tiles
from longllava.inputs.video import check_sampling


@dataclass(frozen=True, kw_only=True)
class MediaConfig:
    """How a source's pictures and videos are read.

    tiles: pictures also as tiles of `side` pixels, "fit" or "rows x columns" such as "2x3"; with "fit" a picture of
    more than max_tiles is scaled into as many. fps, max_frames: frames taken of a video; side: what their longer side
    is shrunk to. check: decode every picture when it is planned, so that a broken one is left out, not stumbled over.
    """

    tiles: str | None = None
    max_tiles: int = 36
    side: int = 336
    fps: float = 1.0
    max_frames: int = 64
    check: bool = True

    def __post_init__(self) -> None:
        try:
            parse_tiles(self.tiles)
            check_sampling(self.fps, self.max_frames)
        except InputError as error:
            raise ConfigError(f"media: {error}") from None
        if self.side < 1 or self.max_tiles < 1:
            raise ConfigError(f"media: side is {self.side} and max_tiles {self.max_tiles}, must be above 0")


def opened(sample: Sample, config: MediaConfig) -> Sample:
    """A sample whose media are images: frames are taken, tiles counted, pictures looked at. Raises: Unusable."""
    if not sample.media and config.tiles is None:
        check(sample.images, config)
        return sample
    images: list[str] = []
    media, firsts = [], []
    for medium, reference in zip(sample.media or [Medium()] * len(sample.images), sample.images, strict=True):
        firsts.append(len(images))
        if medium.video:
            found = video_frames(reference, config)
            if os.path.isdir(reference):  # frames that were taken here are whole
                check(found, config)
            media.append(Medium(len(found), video=True))
        else:
            check([reference], config)
            rows, columns, found = tiles_of(reference, config)
            media.append(Medium(len(found), rows=rows, columns=columns))
        images += found
    pictures = [first for first, medium in zip(firsts, media) if not medium.video]
    evidence = tuple(
        item if item.image is None else replace(item, image=pictures[item.image]) for item in sample.evidence
    )
    return replace(sample, images=tuple(images), media=tuple(media), evidence=evidence)


def check(references: Sequence[str], config: MediaConfig) -> None:
    if not config.check:
        return
    for reference in references:
        try:
            LOOKS.look(reference)
        except LongLLaVAError as error:
            raise Unusable("broken image", str(error)) from None


def expect(sample: Sample, config: MediaConfig) -> None:
    """The pictures of a sample that `opened` is asked for soon. Tables are read in one thread, videos in their turn."""
    if config.check:
        media = sample.media or [Medium()] * len(sample.images)
        LOOKS.expect(reference for medium, reference in zip(media, sample.images, strict=True)
                     if not medium.video and not in_a_table(reference))  # fmt: skip


def video_frames(reference: str, config: MediaConfig) -> list[str]:
    try:
        return frames_of(reference, fps=config.fps, max_frames=config.max_frames, side=config.side,
                         cache=cache_folder())  # fmt: skip
    except LongLLaVAError as error:
        raise Unusable("broken video", str(error)) from None


def tiles_of(reference: str, config: MediaConfig) -> tuple[int, int, list[str]]:
    """(rows, columns, references): the whole picture and its tiles, row by row; 0 x 0 where it is not cut."""
    tiles, side, scaled = parse_tiles(config.tiles), config.side, True
    if tiles is None:
        return 0, 0, [reference]
    if isinstance(tiles, str):
        try:
            width, height = upright_size(read_embedded(reference) if is_embedded(reference) else reference)
        except LongLLaVAError as error:
            raise Unusable("broken image", f"{reference}: {error}") from None
        rows, columns = math.ceil(height / side), math.ceil(width / side)
        scaled = rows * columns > config.max_tiles
        if scaled:
            factor = math.sqrt(config.max_tiles / (rows * columns))
            rows, columns = max(1, int(rows * factor)), max(1, int(columns * factor))
            rows, columns = min(rows, config.max_tiles), min(columns, config.max_tiles)
    else:
        rows, columns = tiles
    places = [(row, column) for row in range(rows) for column in range(columns)]
    return rows, columns, [reference, *(tile_reference(reference, p, (rows, columns), side, scaled) for p in places)]


def laid_out(messages: Sequence[Message], media: Sequence[Medium], prompt: PromptConfig) -> list[Message]:
    """Messages in which the mark of a video is its frames', and that of a picture with tiles theirs."""
    firsts = [0]
    for medium in media:
        firsts.append(firsts[-1] + medium.n_images)
    result = []
    for message in messages:
        pieces: list[Piece] = []
        for piece in message.pieces:
            if isinstance(piece, Mark):
                pieces += spread(piece, media[piece.image], firsts[piece.image], prompt)
            else:
                pieces.append(piece)
        result.append(Message(message.role, tuple(pieces)))
    return result


def spread(mark: Mark, medium: Medium, first: int, prompt: PromptConfig) -> list[Piece]:
    if medium.video:
        pieces = media_pieces(0, medium.n_images, prompt, first=first)
        return [replace(p, start=mark.start, end=mark.end) if isinstance(p, Mark) else p for p in pieces]
    if not medium.rows:
        return [replace(mark, image=first)]
    cut = Split(None, medium.rows, medium.columns, 1)
    return expand([replace(mark, image=0)], [cut], prompt, first=first)[0]
