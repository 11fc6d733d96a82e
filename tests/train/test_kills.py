"""A run that is killed at random moments, again and again, is the run that was not (make kill-test N=1000)."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from longllava.train.config import load_stage
from longllava.train.stage import run_stage
from tests.tiny_world import write_foundation, write_stage
from tests.train.runs import losses, start

N_KILLS = int(os.environ.get("LONGLLAVA_KILLS", "20"))
STEPS_A_KILL = 12  # a process that is left alone takes some 40 a second
SECONDS = 0.3  # from a process's first record to its death: up to so many


@pytest.mark.long
def test_killed_at_random_moments_a_run_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGLLAVA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    runs = write_foundation(tmp_path / "runs")
    phase = {"steps": STEPS_A_KILL * N_KILLS, "row_length": 128, "rows": 1, "learning_rate": 2e-3}
    plan = {"phases": [phase], "save_every": 2}
    run_stage(load_stage(write_stage(runs, stage="whole", **plan)))
    path, folder = write_stage(runs, stage="killed", **plan), runs / "killed"
    seed = random.SystemRandom().randrange(1 << 32)
    rng, n_kills = random.Random(seed), 0
    while not (folder / "model" / "training.json").is_file():
        log, before = folder / "log.jsonl", len((folder / "log.jsonl").read_bytes()) if n_kills else 0
        child = start(path)
        while child.poll() is None and not (log.is_file() and log.stat().st_size > before):
            time.sleep(0.005)
        time.sleep(rng.random() * SECONDS)
        if n_kills < N_KILLS:
            child.send_signal(signal.SIGKILL)
        printed, _ = child.communicate()
        assert child.returncode in (0, -signal.SIGKILL), printed
        n_kills += child.returncode != 0
    where = f"{n_kills} kills, seed {seed}"
    print(where)
    assert n_kills >= min(N_KILLS, 5), where
    assert losses(folder) == losses(runs / "whole"), where
    last = f"checkpoints/step-{phase['steps']:08d}"
    for file in ("model/model.safetensors", f"{last}/model.safetensors", f"{last}/optimizer.safetensors"):
        assert (folder / file).read_bytes() == (runs / "whole" / file).read_bytes(), f"{file}, {where}"
