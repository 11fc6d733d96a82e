"""What the scripts of benchmarks/ are told is looked at before they measure: one sentence, and nothing is written."""

from __future__ import annotations

import pytest

from longllava.errors import InputError
from tests.evals.scripts import load_script


@pytest.mark.parametrize(
    ("script", "options", "told"),
    [
        ("efficiency", {"peer_tokens": "16,2k"}, "--peer-tokens: got '16,2k', expected whole numbers above 0"),
        ("efficiency", {"peer_tokens": "0"}, "--peer-tokens: got '0'"),
        ("efficiency", {"tokens": 0}, "--tokens 0: nothing is left to measure without --peer-tokens"),
        ("gpu_first_token", {"batches": "2,x", "device": "cpu", "model": "nano"}, "--batches: got '2,x'"),
    ],
)
def test_what_cannot_be_read_is_said_before_anything_is_measured(
    script: str, options: dict[str, object], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load_script(script)
    monkeypatch.setattr(module, "open_model", lambda *_, **__: pytest.fail("a model was opened"))
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("a process was started"))
    with pytest.raises(InputError, match=told):
        getattr(module, script)(**options)
