"""What a script is told, looked at before it measures for minutes."""

from __future__ import annotations

from longllava.errors import InputError


def whole_numbers(text: str, option: str) -> list[int]:
    """Of "1,10,100" the numbers, each once, in order. Raises: InputError naming the option."""
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = [0]
    if found[0] < 1:
        raise InputError(f"{option}: got {text!r}, expected whole numbers above 0, such as 1,10,100")
    return found
