"""Opening what a sample refers to: a picture of the built-in world, a file, a place in a tar or table, a tile.

    tile:ROW.COLUMN/ROWSxCOLUMNS@SIDE[*]:REFERENCE   of a picture cut into tiles; * scaled to fit into them
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from PIL import Image

from longllava.data.embedded import is_embedded, kept, read_embedded
from longllava.data.worlds.pictures import GRID, PREFIX, parse_grid, parse_reference
from longllava.data.worlds.render import SIDE, render
from longllava.errors import InputError
from longllava.inputs.colour import rgb
from longllava.inputs.image import open_image, visit
from longllava.inputs.tiles import Split

TILE = re.compile(r"tile:(\d+)\.(\d+)/(\d+)x(\d+)@(\d+)(\*?):(.+)", re.DOTALL)
SPLIT_PICTURES = 4  # that are kept open until all their tiles are read
CHECKED_SIDE = 64  # a JPEG is decoded no larger to see whether it is whole


def open_reference(reference: str, root: str | Path | None = None) -> Image.Image:
    """The picture behind a reference, RGB. World pictures are 96 x 96, grids of them as large as they need.

    root: the folder that paths are relative to and may not leave. Raises: InputError, DataError.
    """
    if reference.startswith(PREFIX + GRID):
        n_columns, specs = parse_grid(reference)
        grid = Image.new("RGB", (n_columns * SIDE, -(-len(specs) // n_columns) * SIDE))
        for index, spec in enumerate(specs):
            grid.paste(render(spec), (index % n_columns * SIDE, index // n_columns * SIDE))
        return grid
    if reference.startswith(PREFIX):
        return render(parse_reference(reference))
    path = safe_path(reference, root) if root is not None else Path(reference)
    try:
        return open_image(path)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def open_picture(reference: str) -> Image.Image:
    """The picture behind any reference of a training sample, RGB. Raises: InputError, DataError."""
    if (found := TILE.fullmatch(reference)) is not None:
        row, column, rows, columns, side = map(int, found.groups()[:5])
        return split_of(found[7], rows, columns, side, bool(found[6])).tile((row, column))
    if is_embedded(reference):
        try:
            return open_image(read_embedded(reference))
        except InputError as error:
            raise InputError(f"{reference}: {error}") from None
    return open_reference(reference)


def tile_reference(reference: str, place: tuple[int, int], grid: tuple[int, int], side: int, scaled: bool) -> str:
    return f"tile:{place[0]}.{place[1]}/{grid[0]}x{grid[1]}@{side}{'*' * scaled}:{reference}"


@kept(SPLIT_PICTURES)
def split_of(reference: str, rows: int, columns: int, side: int, scaled: bool) -> Split:
    return Split(functools.partial(open_picture, reference), rows, columns, side, resize=scaled)


def under(reference: str) -> str:
    """The picture that a tile is of; any other reference is its own."""
    found = TILE.fullmatch(reference)
    return found[7] if found else reference


def check_picture(reference: str) -> None:
    """Make a picture RGB as `open_picture` does, big JPEGs small. Raises: InputError where it cannot be trained on."""
    if reference.startswith(PREFIX):
        return
    source = read_embedded(reference) if is_embedded(reference) else Path(reference)

    def load(image: Image.Image) -> None:
        if image.format == "JPEG":
            image.draft(image.mode, (CHECKED_SIDE, CHECKED_SIDE))
        rgb(image, copied=False)

    try:
        visit(source, None, load)
    except InputError as error:
        raise InputError(f"{reference}: {error}") from None


def safe_path(reference: str, root: str | Path) -> Path:
    """`reference` below `root`, links resolved. Raises: InputError when it is absolute or leads out."""
    relative = Path(reference)
    if relative.is_absolute() or ".." in relative.parts or "\\" in reference or "\0" in reference:
        raise InputError(f"image path {reference!r} must be relative and stay below the source's folder")
    base = Path(root).resolve()
    path = (base / relative).resolve()
    if not path.is_relative_to(base):
        raise InputError(f"image path {reference!r} leads out of {root} through a link")
    return path
