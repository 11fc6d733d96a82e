"""What a script is told, looked at before it measures for minutes."""

from __future__ import annotations

from pathlib import Path

from longllava.errors import InputError
from longllava.files import writable_folder


def whole_numbers(text: str, option: str) -> list[int]:
    """Of "1,10,100" the numbers, each once, in order. Raises: InputError naming the option."""
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = [0]
    if found[0] < 1:
        raise InputError(f"{option}: got {text!r}, expected whole numbers above 0, such as 1,10,100")
    return found


def check_target(file: str | Path | None) -> None:
    """What takes minutes to be measured should not find its file closed then. Raises: InputError naming it."""
    if file is None:
        return
    if Path(file).is_dir():
        raise InputError(f"{file}: it is a folder; name a file to write")
    if Path(file).suffix == ".png":
        raise InputError(f"{file}: a chart would take the place of the figures; name a file that ends with .json")
    writable_folder(Path(file).parent)
