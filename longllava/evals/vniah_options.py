"""V-NIAH's settings from words of a command line; faults are one sentence that names the option."""

from __future__ import annotations

import math
from collections.abc import Sequence

from longllava.errors import InputError
from longllava.evals.vniah_task import Settings


def settings_of(
    images: Sequence[str], depths: str, needles: str, seed: str, style: str, haystack: str | None
) -> Settings:
    """images: numbers or comma lists of numbers. Raises: InputError, ConfigError, DataError."""
    sizes = [whole_number("--images", word) for text in images for word in words("--images", text)]
    return Settings(
        images=tuple(sorted(set(sizes))),
        depths=depths_of(depths),
        n_needles=whole_number("--needles", needles),
        seed=whole_number("--seed", seed),
        styles=tuple(words("--style", style)),
        haystack=haystack,
    )


def words(option: str, text: str) -> list[str]:
    found = [word.strip() for word in text.split(",")]
    if not all(found):
        raise InputError(f"{option}: got {text!r}, expected values separated by commas")
    return found


def whole_number(option: str, text: str) -> int:
    try:
        return int(text.replace("_", ""))
    except ValueError:
        raise InputError(f"{option}: got {text!r}, expected a whole number") from None


def depths_of(text: str) -> tuple[float, ...]:
    """ "11": 0, 0.1 ... 1. "0.25,0.75" and "0.5": these. A whole number above 1 is a count."""
    values = []
    for word in words("--depths", text):
        try:
            values.append(float(word))
        except ValueError:
            values.append(math.nan)
    if len(values) == 1 and values[0] > 1 and values[0].is_integer():
        n = int(values[0])
        if n > 1001:
            raise InputError(f"--depths: got {n} depths, at most 1001 are allowed")
        return tuple(round(i / (n - 1), 9) for i in range(n))
    if not all(0 <= value <= 1 for value in values):
        raise InputError(f"--depths: got {text!r}, expected a count above 1, or numbers from 0 to 1")
    return tuple(sorted(set(values)))
