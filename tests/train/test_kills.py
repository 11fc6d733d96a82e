"""A run that is killed at random moments, again and again, is the run that was not (make kill-test N=1000).

And one that is told to end does so soon, whatever it is at.
"""

from __future__ import annotations

import os
import random
import runpy
import signal
import sys
import time
from pathlib import Path

import pytest

from longllava.data import features
from longllava.data.features import FeatureCache
from longllava.data.recipes import Recipe
from longllava.train import loop
from longllava.train.config import load_stage
from longllava.train.stage import main, run_stage
from tests.tiny_world import write_foundation, write_stage
from tests.train.runs import losses, start

N_KILLS = int(os.environ.get("LONGLLAVA_KILLS", "20"))
STEPS_A_KILL = 12  # a process that is left alone takes some 40 a second
PHASES = [{"steps": 10, "row_length": 192, "rows": 2, "learning_rate": 1e-2}]
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


def test_a_signal_while_a_window_is_planned_does_not_wait_for_it(runs, monkeypatch, capsys) -> None:
    """A window of many pictures is planned, and these encoded, for minutes; systems kill half a minute after."""
    run_stage(load_stage(write_stage(runs, stage="whole", phases=PHASES)))
    path, drawn = write_stage(runs, stage="told", phases=PHASES), list[int]()
    real = Recipe.sample

    def sample(self, seed, number):
        drawn.append(number)
        if len(drawn) == limit:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)  # the other thread notes it
        return real(self, seed, number)

    monkeypatch.setattr(Recipe, "sample", sample)
    for limit in (5, 25, 30):
        drawn.clear()
        with pytest.raises(SystemExit) as ended:
            main(path)
        assert ended.value.code == 128 + signal.SIGTERM
        printed = capsys.readouterr().out  # which of the two hangs on the threads, but for the first window's
        assert "told: ended before the first step" in printed or limit > 5 and "told: saved after step " in printed
        assert len(drawn) <= limit + 1
    limit = 0
    main(path)
    assert losses(runs / "told") == losses(runs / "whole")


def test_a_signal_while_pictures_are_encoded_does_not_wait_for_all(runs, monkeypatch) -> None:
    path, filled = write_stage(runs), list[int]()
    real = FeatureCache.append

    def append(self, references, features_NMC):
        if not filled:
            os.kill(os.getpid(), signal.SIGTERM)
        filled.append(len(references))
        return real(self, references, features_NMC)

    monkeypatch.setattr(features, "BATCH", 2)
    monkeypatch.setattr(FeatureCache, "append", append)
    with pytest.raises(SystemExit):
        main(path)
    assert filled == [2]


def test_a_signal_while_the_last_step_is_saved_is_heard(runs, monkeypatch) -> None:
    """It was lost: the run went on to its model and through its evaluation, and ended with 0."""
    path, real = write_stage(runs), loop.save_state

    def save(folder, state):
        if state.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(folder, state)

    with monkeypatch.context() as told, pytest.raises(SystemExit) as ended:
        told.setattr(loop, "save_state", save)
        main(path)
    assert ended.value.code == 128 + signal.SIGTERM and not (runs / "stage2" / "model").exists()
    main(path)
    assert (runs / "stage2" / "model" / "training.json").is_file()


def test_ctrl_c_outside_the_steps_is_no_traceback(monkeypatch) -> None:
    """While weights are read, or a model is measured; `longllava train` ends with 130, and so does this."""

    def stopped(path, overrides):
        raise KeyboardInterrupt

    monkeypatch.setattr("longllava.train.main", stopped)
    monkeypatch.setattr(sys, "argv", ["train", "stage.yaml"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("longllava.train", run_name="__main__")
    assert ended.value.code == 130
