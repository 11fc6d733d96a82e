"""A folder is one run's: a second run stops in one sentence, and a run that was killed keeps nobody out."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from longllava.cli import run
from longllava.errors import InputError, TrainingError
from longllava.train import stage, vision
from longllava.train.config import load_stage
from longllava.train.lock import run_lock
from longllava.train.vision_config import VisionTrainConfig
from tests.tiny_world import write_foundation, write_stage

fcntl = pytest.importorskip("fcntl")
HOLD = """
import os, sys, time
from pathlib import Path
from longllava.train.lock import run_lock
with run_lock(Path(sys.argv[1])):
    worker = os.fork()  # as loaders of data do
    if worker:
        print(worker, flush=True)
    time.sleep(60)
"""


def python(code: str, folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    return subprocess.Popen([sys.executable, "-c", code, str(folder)], env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)  # fmt: skip


def test_a_second_run_stops_and_a_killed_one_keeps_nobody_out(tmp_path: Path) -> None:
    runs = write_foundation(tmp_path / "runs")
    path = write_stage(runs, phases=[{"steps": 1, "row_length": 128, "rows": 1, "learning_rate": 1e-3}])
    folder = runs / "stage2"
    holder = python(HOLD, folder)
    assert holder.stdout is not None
    worker = int(holder.stdout.readline())
    try:
        said = (
            f"longllava train: {folder}: process {holder.pid} on .* works in this folder and holds {folder}/lock; wait"
        )
        with pytest.raises(SystemExit) as raised:
            run(lambda: stage.main(path), "longllava train")
        assert re.match(said, raised.value.code) and "\n" not in raised.value.code  # words as a code are exit code 1
        with pytest.raises(TrainingError, match=f"process {holder.pid} on "):
            vision.train(VisionTrainConfig(model=str(runs / "tiny.json"), out=str(folder)))
        assert [file.name for file in folder.iterdir()] == ["lock"]
        holder.kill()
        holder.wait()
        os.kill(worker, 0)  # it lives still, with all files that were open
        stage.main(path)
    finally:
        holder.kill()
        os.kill(worker, 9)
        holder.communicate()
    assert (folder / "model/training.json").is_file()


def test_the_folder_is_held_until_the_model_is_written(tmp_path: Path, monkeypatch) -> None:
    runs = write_foundation(tmp_path / "runs")
    real, said = stage.save_model, []

    def save_model(model, tokenizer, folder):
        said.append(python(HOLD, folder.parent).communicate(timeout=60)[0])
        return real(model, tokenizer, folder)

    monkeypatch.setattr(stage, "save_model", save_model)
    phases = [{"steps": 1, "row_length": 128, "rows": 1, "learning_rate": 1e-3}]
    stage.run_stage(load_stage(write_stage(runs, phases=phases)))
    assert f"process {os.getpid()} on" in said[0]


def test_other_ranks_take_no_lock_and_an_unused_folder_goes(tmp_path: Path) -> None:
    with run_lock(tmp_path / "other", active=False):
        assert not (tmp_path / "other").exists()
    with pytest.raises(TrainingError, match="wrong settings"), run_lock(tmp_path / "run"):
        assert (tmp_path / "run/lock").is_file()
        raise TrainingError("wrong settings")
    assert not (tmp_path / "run").exists()


def test_a_file_where_the_folder_should_be_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file/run"):
        with pytest.raises(InputError, match="file: it is a file; name a folder to write into"), run_lock(folder):
            pass


@pytest.mark.parametrize(("number", "goes_on"), [(errno.ENOLCK, True), (errno.ENOTSUP, True), (errno.EIO, False)])
def test_without_locks_it_goes_on(tmp_path: Path, monkeypatch, number: int, goes_on: bool) -> None:
    def lockf(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    entered = []
    try:
        with run_lock(tmp_path / "run"):
            entered.append(True)
    except OSError as error:
        assert error.errno == number
    assert bool(entered) == goes_on
