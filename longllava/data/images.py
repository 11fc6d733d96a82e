"""Opening what a sample refers to: a picture of the built-in world, or a file below its source's folder."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from longllava.data.worlds.pictures import GRID, PREFIX, parse_grid, parse_reference
from longllava.data.worlds.render import SIDE, render
from longllava.errors import InputError
from longllava.inputs.image import open_image


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
