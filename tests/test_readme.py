"""README's first example is what happens."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from longllava.cli import app

ROOT = Path(__file__).resolve().parents[1]


def test_the_first_example_prints_what_its_comments_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """nano names the picture and finds the one asked for; the picture in README shows the same twelve."""
    text = (ROOT / "README.md").read_text("utf-8")
    command = re.search(r"^\.venv/bin/longllava (world .*?) +#", text, re.MULTILINE)[1]
    example = re.search(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    made = CliRunner().invoke(app, shlex.split(command))
    assert made.exit_code == 0, made.output
    exec(compile(example, "README.md", "exec"), {})
    wanted = re.findall(r"^print\(.* # (\S+)$", example, re.MULTILINE)
    assert len(wanted) == 2
    assert capsys.readouterr().out.split() == wanted
    shown = np.asarray(Image.open(ROOT / "docs/world.png").convert("RGB"), dtype=int)
    drawn = np.asarray(Image.open(tmp_path / "album/contact-sheet.png").convert("RGB"), dtype=int)
    assert shown.shape == drawn.shape
    assert np.abs(shown - drawn).mean() < 2  # of 255: other fonts may draw its words
