"""The folder that records of these tests lie in."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Holds the pictures that `records.GOOD` and its like name."""
    for name in ("a.png", "b.png", "sub/é c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (3, 2), "red").save(tmp_path / name)
    return tmp_path
