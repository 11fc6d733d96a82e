"""Ranges in the tasks' settings: [low, high], both included."""

from __future__ import annotations

import math
import random
from typing import Any

from longllava.errors import ConfigError


def between(settings: Any, name: str, low: int, high: int) -> None:
    """Check that a field is a range [a, b] with low <= a <= b <= high."""
    value = getattr(settings, name)
    if len(value) != 2 or not low <= value[0] <= value[1] <= high:
        raise ConfigError(
            f"{name}: got {list(value)}, expected [low, high] with {low} <= low <= high <= {high}"
        )


def draw_range(rng: random.Random, bounds: tuple[int, ...], *, by_ratio: bool = False) -> int:
    """A number of the range; by_ratio: evenly by ratio, so that 4 to 16 is as likely as 64 to 256."""
    low, high = bounds
    if not by_ratio or low == 0:
        return rng.randint(low, high)
    drawn = math.exp(rng.uniform(math.log(low), math.log(high + 1)))
    return min(high, max(low, int(drawn)))
