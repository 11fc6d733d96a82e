"""What a run writes of itself names no folder of the machine."""

from __future__ import annotations

import pytest

from longllava.train.record import command, environment


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("/home/someone/longllava/longllava/train/__main__.py", "-m longllava.train nano/stage1 seed=2"),
        ("/usr/lib/python3/site-packages/longllava/__main__.py", "-m longllava nano/stage1 seed=2"),
        ("/home/someone/.venv/bin/longllava", "longllava nano/stage1 seed=2"),
        ("/usr/lib/python3/site-packages/pytest/__main__.py", "-m pytest nano/stage1 seed=2"),
        ("benchmarks/vniah.py", "vniah.py nano/stage1 seed=2"),
    ],
)
def test_the_command_is_what_was_typed_without_folders(monkeypatch, program: str, expected: str) -> None:
    monkeypatch.setattr("sys.argv", [program, "nano/stage1", "seed=2"])
    assert command() == environment()["command"] == expected
