"""Several processes are one: the same samples, the same losses; one that has only text does not keep others waiting."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from longllava.data.packing import Cursor
from longllava.shipped import shipped
from longllava.train.config import load_stage
from longllava.train.engines import open_engine, sent, shared_state
from longllava.train.stage import run_stage
from longllava.train.state import TrainingState
from tests.tiny_world import write_stage
from tests.train.runs import losses, wait_for_step

ROOT = Path(__file__).resolve().parents[2]
TEXT = {"needle": {"n_images": [2, 3], "n_questions": [1, 2], "weight": 1}, "facts": {"weight": 8}}
CASES = {
    "pictures": {"phases": [{"steps": 8, "row_length": 192, "rows": 4, "learning_rate": 5e-3, "warmup": 2}]},
    # the bridge alone learns, and most rows have no picture; where they run is not said
    "text": {
        "device": "auto", "recipe": "nano/stage3", "train_only": ["bridge"],
        "phases": [{"steps": 8, "row_length": 128, "rows": 2, "learning_rate": 5e-3, "tasks": TEXT}],
    },
}  # fmt: skip


TRAIN = ("-m", "longllava.train")


def launch(path: Path, n: int, *overrides: str, script: tuple[str, ...] = TRAIN) -> subprocess.Popen:
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={n}", *script]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([sys.executable, "-m", *launcher, str(path), *overrides], env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip


def compare(one: Path, several: Path) -> None:
    for (step, loss, norm), (_, other_loss, other_norm) in zip(losses(one), losses(several), strict=True):
        assert (other_loss, other_norm) == pytest.approx((loss, norm), rel=1e-5), step


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(runs: Path, case: str) -> None:
    run_stage(load_stage(write_stage(runs, stage="one", **CASES[case])))
    child = launch(write_stage(runs, stage="two", **CASES[case]), 2)
    printed, _ = child.communicate(timeout=120)
    assert child.returncode == 0, printed
    assert printed.count("step 8/8") == 1, printed  # not two runs of one process each
    compare(runs / "one", runs / "two")
    assert json.loads((runs / "two" / "model" / "training.json").read_text())["steps"] == 8


def test_stopped_with_two_it_goes_on_with_one(runs: Path) -> None:
    plan = {"phases": [{"steps": 40, "row_length": 128, "rows": 2, "learning_rate": 2e-3}], "save_every": 100}
    run_stage(load_stage(write_stage(runs, stage="one", **plan)))
    path, folder = write_stage(runs, stage="two", **plan), runs / "two"
    child = launch(path, 2)
    wait_for_step(child, folder / "log.jsonl", 5)
    child.send_signal(signal.SIGTERM)  # the launcher passes it on
    printed, _ = child.communicate(timeout=120)
    assert "two: saved after step" in printed, printed
    run_stage(load_stage(path))
    compare(runs / "one", folder)


BLIND = """\
import os, sys
from longllava.data import ahead
from longllava.errors import InputError
from longllava.train import main

def check_picture(reference):
    if os.environ["RANK"] == "1" and reference.endswith("7.png"):
        raise InputError(f"{reference}: cannot be read")

ahead.check_picture = check_picture
main(sys.argv[1])
"""


def test_a_picture_that_one_process_cannot_read_ends_the_run(runs: Path, tmp_path: Path) -> None:
    """It would plan other rows, of which some were trained on twice and others never."""
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "a cat"}]
    for n in range(20):
        Image.new("RGB", (40, 40), (12 * n, 0, 0)).save(tmp_path / f"{n}.png")
    records = [{"id": str(n), "image": f"{n}.png", "conversations": turns} for n in range(20)]
    (tmp_path / "own.json").write_text(json.dumps(records))
    source = {"name": "own", "kind": "llava", "path": "own.json", "licence": "CC0", "origin": "x", "max_bad": 0.5}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"name": "own", "sources": [source]}))
    (tmp_path / "blind.py").write_text(BLIND)
    child = launch(write_stage(runs, recipe=str(tmp_path / "own.yaml")), 2, script=(str(tmp_path / "blind.py"),))
    printed, _ = child.communicate(timeout=120)
    assert child.returncode != 0 and not (runs / "stage2" / "model").exists(), printed
    told = (r"stage2: processes planned different rows from step \d+ on; process 0 left out nothing;"
            r" process 1 left out \d for other reasons, the first, .*7\.png: cannot be read")  # fmt: skip
    assert re.search(told, printed), printed


@pytest.mark.parametrize("engine", ["torch", "zero2"])
def test_processes_wait_for_the_first_for_hours(monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    """While it reads a checkpoint of 636 GB: 10 minutes is what DeepSpeed and NCCL would give it."""
    from accelerate.state import AcceleratorState, PartialState

    def begin(*arguments, timeout=None, **more):
        raise TimeoutError(str(timeout))

    if engine != "torch":
        pytest.importorskip("deepspeed")
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": "1", "ACCELERATE_USE_CPU": "1", "DS_ACCELERATOR": "cpu",
                        "OMP_NUM_THREADS": "1"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "init_process_group", begin)
    for kind in (PartialState, AcceleratorState):  # as in a process that has trained nothing yet
        monkeypatch.setattr(kind, "_shared_state", {})
    config = dataclasses.replace(load_stage(shipped("configs", "train/nano/stage1")), engine=engine, device="cpu")
    with pytest.raises(TimeoutError, match="6:00:00"):
        open_engine(config, torch.float32)


def test_a_state_reaches_other_processes_tensor_by_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not pickled: what goes to a process is kept on a wire, then read from it by the other."""
    pickles: list[bytes] = []
    wire: list[torch.Tensor] = []
    weights = {"a": torch.randn(50, 100), "n": torch.tensor(7)}
    state = TrainingState(3, 0, Cursor(), weights, {"step/a": torch.tensor(3.0)}, {})
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda found: pickles.append(pickle.dumps(found)))
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, source: wire.append(tensor.clone()))
    device = torch.device("cpu")
    assert shared_state(lambda: state, rank=0, world=2) is state
    for tensors in (state.tensors, state.optimizer):
        sent(tensors, device, rank=0, world=2)
    assert max(map(len, pickles)) < 1000

    def receive(found: list) -> None:
        found[:] = pickle.loads(pickles.pop(0))

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", receive)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, source: tensor.copy_(wire.pop(0)))
    other = shared_state(lambda: None, rank=1, world=2)
    assert other == dataclasses.replace(state, tensors={}, optimizer={})
    for found, expected in ((sent({}, device, rank=1, world=2), kept) for kept in (state.tensors, state.optimizer)):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
