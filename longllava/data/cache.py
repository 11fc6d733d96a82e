"""Where what was made once is kept: features of pictures, frames of videos, media of streams."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$LONGLLAVA_CACHE, or runs/cache below the working folder."""
    return Path(os.environ.get("LONGLLAVA_CACHE") or "runs/cache")
