"""What glibc's heap keeps of freed memory, and when it hands holes back to the system; nothing where another one is."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable

# mallopt(3): its numbers for the two thresholds, and what glibc's own adjustment ends at
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
MAPPED_FROM = 32 << 20
KEPT_FREE = 2 * MAPPED_FROM

# What people set who have chosen for themselves.
VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")
TUNABLES = ("trim_threshold", "mmap_threshold", "top_pad", "mmap_max")


def keep_freed() -> None:
    """Let the heap keep up to 64 MB that are free at its end, and take blocks below 32 MB from it.

    glibc begins with 128 KB for both, goes up with the largest block freed so far and so hands a layer's activations
    to the system after each use; the next ones come page by page, zeroed. A prompt of 1,000 pictures took 270,000 such
    pages, and takes 69,000 in 0.96 of the time and the same memory (nano, median of 20 pairs on two cores of a Xeon).
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if any(name in os.environ for name in VARIABLES) or any(f"glibc.malloc.{name}=" in tunables for name in TUNABLES):
        return
    if (mallopt := _of_glibc("mallopt")) is not None and mallopt(MMAP_THRESHOLD, MAPPED_FROM):
        mallopt(TRIM_THRESHOLD, KEPT_FREE)


def give_back() -> None:
    """Hand the holes of the heap to the system: it keeps what was freed between blocks that are still in use.

    Steps of ever other sizes leave ever more of them: nano's stage 3 came to 9.5 GB of which 2.5 were in use.
    """
    if (trim := _of_glibc("malloc_trim")) is not None:
        trim(0)


@functools.lru_cache(maxsize=2)
def _of_glibc(name: str) -> Callable[..., int] | None:
    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError, TypeError):  # another C library, or Windows
        return None
