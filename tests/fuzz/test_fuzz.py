"""Hostile inputs by the thousand: an answer or one LongLLaVAError within five seconds, and never a picture made up.

A kind's inputs are numbered; an input that failed is made again by its number. Ordinary runs try the first 2,000 of
each, `make fuzz N=100000` any number. Found once, a failure's number stays in SEEDS.
"""

import json
import os
import time

import pytest

from longllava.checkpoints.folders import find_folder
from longllava.checkpoints.stored import read_entries
from longllava.checkpoints.towers import tower_folder
from longllava.errors import CheckpointError
from tests.fuzz import folders, media, prompts

FEW, MANY = 2000, int(os.environ.get("LONGLLAVA_FUZZ", "10000"))
KINDS = {
    "picture": media.judge_picture, "video": media.judge_video, "tiles": media.judge_tiles,
    "folder": media.judge_folder, "address": media.judge_address, "prompt": prompts.judge_prompt,
    "config": folders.judge_config, "index": folders.judge_index,
}  # fmt: skip
IN_FOLDERS = ("folder", "config", "index")
SEEDS = {"config": (1903,), "index": (126,), "prompt": (2114,), "video": (2875,)}


def try_all(kind, numbers, tmp_path, monkeypatch):
    """Counts what was taken; both outcomes must occur, or nothing was tried."""
    if kind == "address":
        media.without_a_network(monkeypatch)
    extra = (tmp_path,) if kind in IN_FOLDERS else ()
    n_taken, started = 0, time.process_time()
    for number in numbers:
        try:
            n_taken += KINDS[kind](number, *extra)
        except Exception as error:
            raise AssertionError(f"{kind} {number}: {type(error).__name__}: {error}") from error
    print(json.dumps({"kind": kind, "inputs": len(numbers), "taken": n_taken,
                      "seconds": round(time.process_time() - started, 1)}))  # fmt: skip
    return n_taken


@pytest.mark.parametrize("kind", KINDS)
def test_two_thousand_hostile_inputs(kind, tmp_path, monkeypatch):
    assert 0 < try_all(kind, range(FEW), tmp_path, monkeypatch) < FEW


@pytest.mark.parametrize("kind", SEEDS)
def test_what_failed_once(kind, tmp_path, monkeypatch):
    try_all(kind, SEEDS[kind], tmp_path, monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_many_hostile_inputs(kind, tmp_path, monkeypatch):
    assert 0 < try_all(kind, range(MANY), tmp_path, monkeypatch) < MANY


@pytest.mark.parametrize("name", ["x" * 300, "~nobody-of-this-name/model", "a\0b", "http://a", "x" * 300 + "/y"])
def test_names_that_are_no_folders(name, tmp_path):
    """Of a model, and of the tower that a model names: one sentence."""
    with pytest.raises(CheckpointError):
        find_folder(name)
    with pytest.raises(CheckpointError, match="its vision tower: "):
        tower_folder(name, tmp_path)


def test_an_index_that_names_too_long_a_file(tmp_path):
    index = {"weight_map": {"a": "x" * 300 + ".safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="index.json: 'xxx.* is not the plain name of a .safetensors file"):
        read_entries(tmp_path)
