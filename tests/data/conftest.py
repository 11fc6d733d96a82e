"""The folder that records of these tests lie in, nano's processor, and folders of a test's own."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from longllava.checkpoints.load import ASSETS
from longllava.config import ModelConfig
from longllava.inputs.processor import Processor
from longllava.inputs.tokenizer import Tokenizer
from longllava.settings import load


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Holds the pictures that `records.GOOD` and its like name."""
    for name in ("a.png", "b.png", "sub/é c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (3, 2), "red").save(tmp_path / name)
    return tmp_path


@pytest.fixture(scope="module")
def processor() -> Processor:
    config = load(ModelConfig, ASSETS / "nano/config.json")
    return Processor(config, Tokenizer.from_folder(ASSETS / "nano", config.prompt))


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGLLAVA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LONGLLAVA_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
