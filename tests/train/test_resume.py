"""A run that was stopped, killed or spoiled goes on as if nothing had happened, and only as the same run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
import weakref

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from longllava.checkpoints import save_model
from longllava.data.packing import Misfit
from longllava.data.recipes import Recipe
from longllava.errors import ConfigError, TrainingError
from longllava.files import write_json
from longllava.settings import read_mapping
from longllava.shipped import shipped
from longllava.train import loop
from longllava.train.config import load_stage
from longllava.train.stage import run_stage
from tests.tiny_world import world_model, write_stage
from tests.train.runs import losses, start, stopped_at, wait_for_step

LONG = {"phases": [{"steps": 14, "row_length": 128, "rows": 2, "learning_rate": 5e-3, "warmup": 2},
                   {"steps": 10, "row_length": 192, "rows": 1, "learning_rate": 5e-3,
                    "tasks": {"single": {"n_questions": [1, 3]}}}]}  # fmt: skip


def test_each_step_of_each_process_and_seed_draws_something_else() -> None:
    """On a CPU too, whose generator reads 32 bits: every seed's dropout was the same there."""
    drawn = set()
    for seed in (0, 1, 2, -1, 1 << 40, (1 << 63) - 1):
        for step, rank in ((0, 0), (0, 1), (1, 0), (500_000, 4095)):
            torch.manual_seed(loop.step_seed(seed, step, rank))
            drawn.add(tuple(torch.rand(4).tolist()))
    assert len(drawn) == 24
    assert loop.step_seed(7, 3, 1) == loop.step_seed(7, 3, 1)


def test_a_killed_run_goes_on_bit_for_bit(runs) -> None:
    # 40 steps after the last kill: the process that sends it may be the slower one
    plan = {**LONG, "phases": [LONG["phases"][0], LONG["phases"][1] | {"steps": 40}]}
    run_stage(load_stage(write_stage(runs, stage="whole", **plan)))
    path, folder = write_stage(runs, stage="killed", **plan), runs / "killed"
    rng = random.Random(os.urandom(8))
    steps = rng.randint(1, 9), rng.randint(10, 14)
    ends = (signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 128 + signal.SIGTERM)
    for step, (number, code) in zip(steps, ends):
        log = folder / "log.jsonl"
        done = log.read_bytes().count(b"\n") if log.exists() else 0  # more than was asked for, where this side was slow
        child = start(path)
        wait_for_step(child, log, max(step, done + 1))
        time.sleep(rng.random() * 0.1)
        child.send_signal(number)
        printed, _ = child.communicate()
        assert child.returncode == code, printed
        if number == signal.SIGTERM:
            assert "killed: saved after step" in printed and "Traceback" not in printed
    child = start(path)
    printed, _ = child.communicate()
    assert child.returncode == 0 and "killed: goes on after step" in printed, printed
    where = f"killed at about {steps}"
    assert losses(folder) == losses(runs / "whole"), where
    for file in ("model/model.safetensors", "checkpoints/step-00000054/optimizer.safetensors"):
        assert (folder / file).read_bytes() == (runs / "whole" / file).read_bytes(), f"{file}, {where}"


def test_a_run_goes_on_only_as_the_same_run(runs, monkeypatch) -> None:
    path = write_stage(runs, **LONG)
    passes = stopped_at(path, 5, monkeypatch)
    settings = (runs / "stage2" / "config.json").read_bytes()
    recipe = read_mapping(shipped("data_recipes", "nano/stage2"))
    (runs / "moved.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    recipe["sources"][0]["weight"] += 1
    (runs / "changed.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    recipe["sources"][0]["weight"] -= 1
    (runs / "others.yaml").write_text(yaml.safe_dump({**recipe, "pictures": {"per_thing": 3}}), "utf-8")
    recipe["sources"][0]["media"] = {"tiles": "2x2"}
    (runs / "tiled.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    for override, message in (
        ("seed=2", "seed: 1 then, 2 now"),
        (f"recipe={runs / 'changed.yaml'}", r"samples\.0\.weight: "),
        (f"recipe={runs / 'others.yaml'}", r"pictures\.per_thing: \d+ then, 3 now"),
        (f"recipe={runs / 'tiled.yaml'}", r"reading\.0\.media\.tiles: None then, '2x2' now"),
        ("phases.0.steps=2", r"settings \(phases.0.steps: 14 then, 2 now\); use"),  # fewer than were taken
        ("train_only=[bridge]", r"train_only: \['bridge', 'backbone'\] then, \['bridge'\] now"),
        ("phases.0.learning_rate=0.1", r"settings \(phases.0.learning_rate: 0.005 then, 0.1 now\); use"),
    ):
        with pytest.raises(TrainingError, match=message):
            run_stage(load_stage(path, [override]))
        assert (runs / "stage2" / "config.json").read_bytes() == settings  # those it was begun with
    # what has not begun may change, what only rounds, and where a file lies
    changed = ["phases.1.steps=1", "log_every=5", "threads=2", f"recipe={runs / 'moved.yaml'}"]
    before = torch.get_num_threads()
    try:
        run_stage(load_stage(path, changed))
    finally:
        torch.set_num_threads(before)
    assert len(passes) == 5 + 15 - 3  # from the checkpoint of step 3


def test_records_of_a_run_that_goes_on_are_means_of_the_same_steps(runs, monkeypatch) -> None:
    """What lay between the last record and the checkpoint was in none."""
    for stage in ("whole", "stopped"):
        path = write_stage(runs, stage=stage, log_every=5, phases=LONG["phases"][:1])
        if stage == "stopped":
            stopped_at(path, 9, monkeypatch)
        run_stage(load_stage(path))
    assert losses(runs / "stopped") == losses(runs / "whole")


def test_a_model_that_changed_under_its_name_is_another_run(runs, monkeypatch) -> None:
    path = write_stage(runs)
    stopped_at(path, 4, monkeypatch)
    sizes = json.loads((runs / "tiny.json").read_text())

    def told(**changes) -> str:
        (runs / "tiny.json").write_text(json.dumps({**sizes, "bridge": {**sizes["bridge"], **changes}}))
        with pytest.raises(TrainingError) as raised:
            run_stage(load_stage(path))
        return str(raised.value)

    assert "settings (architecture.bridge.pool: '2d' then, '1d' now); use" in told(pool="1d")  # of the same shapes
    assert "settings (architecture.bridge.hidden: 32 then, 48 now); use" in told(hidden=48)
    record = runs / "stage2/checkpoints/step-00000003/state.json"
    state = json.loads(record.read_text())
    del state["facts"]["architecture"]  # as older checkpoints are
    record.write_text(json.dumps(state))
    shapes = "3 tensors of its bridge have other shapes, the first, down.weight, (32, 32), not (32, 48)"
    assert told(hidden=48) == f"checkpoint of step 3 is of another model: {shapes}"


@pytest.mark.parametrize("keys", [{"train_only": ["bridge"]}, {"lora": {"rank": 2}, "start_from": {"all": "base"}}])
def test_a_run_goes_on_with_the_frozen_weights_it_was_begun_with_alone(runs, monkeypatch, keys) -> None:
    """Half of the steps would have been taken beside others, of which no record would say so."""
    shutil.copytree(runs / "foundation-text", runs / "base")
    write_json(runs / "base" / "model" / "training.json", {"stage": "base"})
    path = write_stage(runs, **keys)
    stopped_at(path, 4, monkeypatch)
    folder = runs / ("base" if "lora" in keys else "foundation-text") / "model"
    model, processor = world_model(seed=8)
    record = (folder / "training.json").read_bytes()
    save_model(model, processor.tokenizer, folder)
    (folder / "training.json").write_bytes(record)
    with pytest.raises(TrainingError, match=r"settings \(frozen_weights: '[0-9a-f]{12}' then, '[0-9a-f]{12}' now\)"):
        run_stage(load_stage(path))
    shutil.rmtree(runs / "stage2")
    run_stage(load_stage(path))


def test_what_was_left_out_before_a_stop_stays_listed(tmp_path) -> None:
    first, second = Misfit("a", "source", "broken"), Misfit("b", "source", "too\nlong")
    for misfits in ([first], [first], [second]):
        loop.list_left_out(tmp_path / "left-out.tsv", misfits)
    assert (tmp_path / "left-out.tsv").read_text() == "source\ta\tbroken\nsource\tb\ttoo long\n"


def test_records_found_broken_before_a_stop_stay_listed(runs, tmp_path, monkeypatch) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "a cat"}]
    Image.new("RGB", (40, 40), "red").save(tmp_path / "good.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "good.png").read_bytes()[:-30])
    records = [{"id": str(n), "image": "good.png", "conversations": turns} for n in range(200)]
    records.append({"id": "empty", "conversations": []})  # found when the file is read, each time
    (tmp_path / "own.json").write_text(json.dumps(records))
    source = {"name": "own", "kind": "llava", "path": "own.json", "licence": "CC0", "origin": "x"}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"name": "own", "sources": [source]}))
    records[Recipe.load(tmp_path / "own.yaml").at(1, 5)[1]]["image"] = "torn.png"  # in the first window
    (tmp_path / "own.json").write_text(json.dumps(records))
    phases = [{"steps": 16, "row_length": 64, "rows": 2, "learning_rate": 1e-3}]  # once through the records
    path = write_stage(runs, recipe=str(tmp_path / "own.yaml"), phases=phases, window=2, save_every=1)
    real, quarantine, after = loop.Feed.batches, runs / "stage2" / "quarantine.txt", list[int]()

    def batches(self, *arguments):
        if self.misfits:
            after.append(1)
        if self.misfits and len(after) == 7:  # windows later than that which left it out
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(loop.Feed, "batches", batches)
    with pytest.raises(KeyboardInterrupt):
        run_stage(load_stage(path))
    listed = quarantine.read_text()
    assert "no turns" in listed and "torn.png" in listed
    run_stage(load_stage(path))
    assert quarantine.read_text() == listed
    shutil.rmtree(runs / "stage2" / "checkpoints")  # to begin again, with records that are mended
    (runs / "stage2" / "model" / "training.json").unlink()
    (tmp_path / "own.json").write_text(json.dumps([{**record, "image": "good.png"} for record in records[:200]]))
    run_stage(load_stage(path))
    assert not quarantine.exists() and not (runs / "stage2" / "left-out.tsv").exists()


def test_a_finished_run_goes_on_with_a_phase_added(runs) -> None:
    run_stage(load_stage(write_stage(runs, output=str(runs / "whole"), **LONG)))
    first = {**LONG, "phases": LONG["phases"][:1]}
    folder = runs / "grown"
    run_stage(load_stage(write_stage(runs, output=str(folder), **first)))
    (folder / "model" / "training.json").unlink()
    run_stage(load_stage(write_stage(runs, output=str(folder), **LONG)))
    assert losses(folder) == losses(runs / "whole")
    file = "model/model.safetensors"
    assert (folder / file).read_bytes() == (runs / "whole" / file).read_bytes()


def test_the_model_is_the_mean_of_the_named_phases(runs) -> None:
    short = {**LONG, "phases": LONG["phases"][:1]}
    weights = []
    for name, keys in (("first", short), ("last", LONG), ("mean", {**LONG, "average_phases": [0, 1]})):
        run_stage(load_stage(write_stage(runs, output=str(runs / name), **keys)))
        weights.append(load_file(runs / name / "model" / "model.safetensors"))
    first, last, mean = weights
    assert any(not torch.equal(first[key], last[key]) for key in first)
    for key in first:
        torch.testing.assert_close(mean[key], (first[key] + last[key]) / 2, rtol=0, atol=1e-7)
    (runs / "mean" / "model" / "training.json").unlink()
    os.truncate(runs / "mean" / "averaged" / "phase-0.safetensors", 100)
    with pytest.raises(TrainingError, match=r"phase-0.safetensors: cannot be read: .*; the mean of the phases needs"):
        run_stage(load_stage(runs / "stage2.yaml", [f"output={runs / 'mean'}"]))
    with pytest.raises(ConfigError, match="average_phases: got 2, phases are numbered 0 to 1"):
        load_stage(write_stage(runs, **{**LONG, "average_phases": [2]}))


def test_a_spoiled_checkpoint_is_passed_over_and_the_run_is_the_same(runs, capsys, monkeypatch) -> None:
    run_stage(load_stage(write_stage(runs, output=str(runs / "whole"), **LONG)))
    path, folder = write_stage(runs, output=str(runs / "spoiled"), **LONG), runs / "spoiled"
    run_stage(load_stage(path))
    (folder / "model" / "training.json").unlink()
    os.truncate(folder / "checkpoints" / "step-00000024" / "model.safetensors", 100)
    states: list[weakref.ref] = []
    latest_state, learning_rate = loop.latest_state, loop.learning_rate

    def read(checkpoints):
        state = latest_state(checkpoints)
        states.append(weakref.ref(state))
        return state

    def rate(phase, step):
        assert states[0]() is None  # it is on its way: what was read would be all weights and AdamW's state once more
        return learning_rate(phase, step)

    monkeypatch.setattr(loop, "latest_state", read)
    monkeypatch.setattr(loop, "learning_rate", rate)
    run_stage(load_stage(path))
    printed = capsys.readouterr().out
    assert "step-00000024/model.safetensors: not the file that was written" in printed
    assert "stage2: goes on after step 21" in printed
    assert losses(folder) == losses(runs / "whole")
    file = "model/model.safetensors"
    assert (folder / file).read_bytes() == (runs / "whole" / file).read_bytes()
