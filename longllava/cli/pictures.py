"""What stands after --image: files, folders and patterns, as one list of pictures."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable
from pathlib import Path

from longllava.errors import InputError
from longllava.files import expanded


def expand(names: Iterable[str]) -> list[str]:
    """Pictures in the order given; a folder's and a pattern's in natural order (frame2 before frame10).

    Raises InputError for a name that yields no picture. Whether a file is one is found out on reading it.
    """
    found: list[str] = []
    for name in names:
        # "world:..." names a drawn picture, the reader knows which; files and folders may have such names too
        if re.match(r"[a-z][a-z0-9+.-]+:", name) and not glob.glob(name):
            found.append(name)
        else:
            found.extend(expand_local(name))
    return found


def expand_local(name: str) -> list[str]:
    from longllava.inputs.video import PICTURES  # those that are read

    if not name:  # to Path it would be the folder one stands in
        raise InputError("--image: the name is empty; give a file, a folder or a pattern")
    path = expanded(name)
    if os.path.isfile(path):  # not path.is_file, which raises where a name is too long
        return [str(path)]
    if os.path.isdir(path):
        try:
            inside = [str(p) for p in path.iterdir() if p.suffix.lower() in PICTURES and p.is_file()]
        except OSError as error:
            raise InputError(f"--image {name}: cannot be read: {error.strerror or error}") from None
        if not inside:
            raise InputError(f"--image {name}: the folder holds no pictures ({' '.join(PICTURES)})")
        return sorted(inside, key=natural)
    matches = [match for match in glob.glob(str(path), recursive=True) if Path(match).is_file()]
    if not matches:
        raise InputError(f"--image {name}: no such file, folder or pattern")
    return sorted(matches, key=natural)


def natural(name: str) -> list[tuple[bool, int, str]]:
    """Sort key in which runs of digits count as numbers."""
    pieces = re.split(r"(\d+)", name)
    return [(piece.isdecimal(), int(piece) if piece.isdecimal() else 0, piece) for piece in pieces]
