"""What a stage's test runs among: folders of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_world import write_foundation


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGLLAVA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PRESET", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return write_foundation(tmp_path / "runs")
