"""The drawings of the picture world: one sprite sheet per drawing style, and the table of things.

A sheet is a PNG of 64 x 64 RGBA cells, 30 to a row, in the order of things.json. `noto` and `fluent`
ship with the package; a sheet that `build_sheets.py` made of another artist's drawings is named by path.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from longllava.data.embedded import kept
from longllava.errors import DataError

CELL = 64
COLUMNS = 30
FOLDER = Path(__file__).parents[2] / "assets" / "pictures"
STYLES = ("noto", "fluent")  # shipped, and trained on


@dataclass(frozen=True)
class Thing:
    """One nameable thing: `name` is its word or words, `group` the kind it is asked by ("animal")."""

    name: str
    group: str
    code: str  # Unicode code points of the drawing, joined by "-"


@functools.cache
def things() -> tuple[Thing, ...]:
    return tuple(Thing(**row) for row in json.loads((FOLDER / "things.json").read_text("utf-8")))


@functools.cache
def thing_index() -> dict[str, int]:
    return {thing.name: index for index, thing in enumerate(things())}


@kept(16)
def sprites(style: str) -> tuple[Image.Image | None, ...]:
    """Every drawing of a style, (64, 64) RGBA, in the order of `things()`; None where the artist has none.

    style: "noto", "fluent", or the path of a sheet PNG. Raises: DataError.
    """
    path = FOLDER / f"{style}.png" if style in STYLES else Path(style)
    if not path.is_file():
        raise DataError(
            f"drawing style {style!r}: no sheet at {path}; use one of {', '.join(STYLES)}, or a sheet made by"
            " `python -m longllava.data.worlds.build_sheets`"
        )
    with Image.open(path, formats=["PNG"]) as file:
        sheet = file.convert("RGBA")
    rows = -(-len(things()) // COLUMNS)
    if sheet.size != (COLUMNS * CELL, rows * CELL):
        raise DataError(
            f"{path}: sheet is {sheet.size[0]} x {sheet.size[1]} pixels, the {len(things())} things need"
            f" {COLUMNS * CELL} x {rows * CELL}; rebuild it with longllava.data.worlds.build_sheets"
        )
    cells = []
    for index in range(len(things())):
        x, y = index % COLUMNS * CELL, index // COLUMNS * CELL
        cell = sheet.crop((x, y, x + CELL, y + CELL))
        cells.append(cell if cell.getchannel("A").getbbox() else None)
    return tuple(cells)
