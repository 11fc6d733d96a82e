"""Huge pictures: the whole one first, then its tiles row by row, each as large as the encoder looks at.

Source: LongLLaVA cli.py, processForBestFitPatch. There a picture whose rest is odd got last tiles that were one pixel
short; here all are whole.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

from longllava.config import PromptConfig
from longllava.errors import InputError
from longllava.inputs.chat import Mark, Markup, Piece
from longllava.inputs.image import is_address, label, open_image, upright_size

if TYPE_CHECKING:
    from PIL import Image

FIT = "fit"
MAX_TILES = 1024  # of one picture
WHITE = (255, 255, 255)


def parse_tiles(tiles: str | None) -> tuple[int, int] | str | None:
    """None, "fit", or "2x3" as (2, 3). Raises: InputError."""
    if tiles is None or tiles == FIT:
        return tiles
    found = re.fullmatch(r"([1-9]\d{0,2})x([1-9]\d{0,2})", tiles) if isinstance(tiles, str) else None
    if found is None or int(found[1]) * int(found[2]) > MAX_TILES:
        raise InputError(
            f"tiles: got {tiles!r}, allowed: {FIT!r}, or rows x columns such as '2x3', at most {MAX_TILES} tiles"
        )
    return int(found[1]), int(found[2])


class Tile(NamedTuple):
    """One tile of a picture: a function that open_image calls."""

    split: Split
    row: int
    column: int

    def __call__(self) -> Image.Image:
        return self.split.tile((self.row, self.column))


def picture_numbers(sources: Sequence[Any]) -> list[int]:
    """For each source the number, from 0, of the picture that it is or is a tile of: tiles follow their picture."""
    return [number - 1 for number in accumulate(not isinstance(source, Tile) for source in sources)]


class Fetched:
    """The picture behind an address, which is asked once for two readings, of the whole and of the tiles: the first
    keeps the bytes, the second drops them. A function that open_image calls."""

    def __init__(self, address: str, open_reference: Callable[[str], Any]):
        self.address, self.open_reference = address, open_reference
        self.lock = threading.Lock()
        self.kept: Any = None

    def __call__(self) -> Any:
        with self.lock:
            found, self.kept = self.kept, None
            if found is None:
                found = self.kept = self.open_reference(self.address)
            return found

    def __fspath__(self) -> str:  # what errors call it
        return self.address


class Split:
    """A picture as rows x columns tiles, cut when they are read. It is decoded once for all of them, then dropped."""

    def __init__(
        self, source: Any, rows: int, columns: int, side: int, *, resize: bool = False,
        open_reference: Callable[[str], Any] | None = None,
    ):  # fmt: skip
        self.source, self.rows, self.columns, self.side, self.resize = source, rows, columns, side, resize
        self.open_reference = open_reference
        self.lock = threading.Lock()
        self.picture: Image.Image | None = None
        self.unread: set[tuple[int, int]] = set()

    def sources(self) -> list[Any]:
        """The picture, then its tiles."""
        return [self.source, *(Tile(self, row, column) for row in range(self.rows) for column in range(self.columns))]

    def tile(self, place: tuple[int, int]) -> Image.Image:
        from PIL import Image

        picture = self.opened(place)
        left = place[1] * self.side - (self.columns * self.side - picture.width) // 2
        top = place[0] * self.side - (self.rows * self.side - picture.height) // 2
        box = (max(left, 0), max(top, 0), min(left + self.side, picture.width), min(top + self.side, picture.height))
        tile = Image.new("RGB", (self.side, self.side), WHITE)
        if box[0] < box[2] and box[1] < box[3]:  # else a tile of padding alone
            tile.paste(picture.crop(box), (box[0] - left, box[1] - top))
        return tile

    def opened(self, place: tuple[int, int]) -> Image.Image:
        with self.lock:
            if self.picture is None:
                self.picture = self.decode()
                self.unread = {(row, column) for row in range(self.rows) for column in range(self.columns)}
            picture = self.picture
            self.unread.discard(place)
            if not self.unread:
                self.picture = None
            return picture

    def decode(self) -> Image.Image:
        from PIL import Image

        room = (self.columns * self.side, self.rows * self.side)
        try:
            picture = open_image(
                self.source, wanted_side=max(room) if self.resize else None, open_reference=self.open_reference
            )
        except InputError as error:
            raise InputError(f"{label(self.source)}{error}") from None
        if not self.resize:
            return picture
        scale = min(room[0] / picture.width, room[1] / picture.height)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        return picture.resize(size, Image.Resampling.BICUBIC)


def split(
    source: Any, tiles: tuple[int, int] | str, side: int, open_reference: Callable[[str], Any] | None = None
) -> Split:
    """Cut a picture for an encoder that looks at side x side pixels.

    tiles "fit": as many as its pixels fill, centred on white, none scaled. (rows, columns): scaled to fit into them.
    Only the header is read now; of an address all is downloaded for that, and not kept. Raises: InputError naming the
    source.
    """
    opened = source
    if isinstance(source, str) and is_address(source) and open_reference is not None:
        opened = Fetched(source, open_reference)
    if not isinstance(tiles, str):
        return Split(opened, *tiles, side, resize=True, open_reference=open_reference)
    try:
        width, height = upright_size(source, open_reference)
        rows, columns = math.ceil(height / side), math.ceil(width / side)
        if rows * columns > MAX_TILES:
            raise InputError(
                f"{width} x {height} pixels are {rows} x {columns} tiles, at most {MAX_TILES} are allowed;"
                " give the number of rows and columns, such as tiles='8x8'"
            )
    except InputError as error:
        raise InputError(f"{label(source)}{error}") from None
    return Split(opened, rows, columns, side, open_reference=open_reference)


def expand(
    pieces: Sequence[Piece], sources: Sequence[Any], prompt: PromptConfig, first: int = 0
) -> tuple[list[Piece], list[Any]]:
    """Pieces and their sources in order of the marks, numbered from `first`; a Split's mark becomes its tiles'."""
    result: list[Piece] = []
    opened: list[Any] = []
    for piece in pieces:
        if not isinstance(piece, Mark):
            result.append(piece)
            continue
        source, number = sources[piece.image], first + len(opened)
        if not isinstance(source, Split):
            result.append(replace(piece, image=number))
            opened.append(source)
            continue
        result.append(replace(piece, image=number, close=prompt.whole_close))
        for row in range(source.rows):
            start = number + 1 + row * source.columns
            marks = [replace(piece, image=start + column) for column in range(source.columns)]
            result += [Markup(prompt.row_join), *marks]
        result += [Markup(prompt.tiles_end)] if prompt.tiles_end else []
        opened += source.sources()
    return result, opened
