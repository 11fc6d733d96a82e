"""Stages: what they start from, what they leave alone, and that a stopped run goes on as if nothing had happened."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from longllava.checkpoints import load_model, quantize_folder
from longllava.data.packing import Misfit
from longllava.data.recipes import Recipe
from longllava.errors import CheckpointError, ConfigError, TrainingError
from longllava.settings import read_mapping
from longllava.shipped import shipped
from longllava.train import loop
from longllava.train.config import load_stage
from longllava.train.stage import main, model_config_of, run_stage
from tests.tiny_world import write_foundation, write_stage


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LONGLLAVA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PRESET", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def runs(tmp_path) -> Path:
    return write_foundation(tmp_path / "runs")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def losses(folder: Path) -> list[tuple[int, float, float]]:
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"], record["norm"]) for record in records]


# --- what a stage starts from


def test_parts_come_from_their_stages_and_only_some_learn(runs) -> None:
    main(write_stage(runs, stage="stage1", recipe="nano/stage1", train_only=["bridge"]))
    vision, text, first = (weights(runs / stage) for stage in ("foundation-vision", "foundation-text", "stage1"))
    assert first.keys() == text.keys()
    for name, tensor in first.items():
        source = vision if name.startswith("encoder") else text
        if not name.startswith("bridge"):
            assert torch.equal(tensor, source[name]), name
    assert any(not torch.equal(first[name], text[name]) for name in first if name.startswith("bridge"))
    # the next stage begins where this one ended; both of its parts learn, the encoder still does not
    main(write_stage(runs, start_from={"all": "stage1"}))
    second = weights(runs / "stage2")
    changed = {name.partition(".")[0] for name in first if not torch.equal(first[name], second[name])}
    assert changed == {"bridge", "backbone"}
    record = json.loads((runs / "stage2" / "model" / "training.json").read_text())
    assert (record["stage"], record["steps"], record["trained"]) == ("stage2", 6, ["bridge", "backbone"])
    assert record["started_from"]["bridge"] == str(runs / "stage1" / "model")


def test_a_model_may_be_named_by_its_folder(runs) -> None:
    (runs.parent / "nano").mkdir()  # shipped names are no folders
    folder = runs / "foundation-text" / "model"
    stage = load_stage(write_stage(runs, model=str(folder), phases=[{"steps": 1, "row_length": 192}]))
    by_file = dataclasses.replace(stage, model=str(runs / "tiny.json"))
    assert model_config_of(stage) == model_config_of(by_file)
    assert model_config_of(dataclasses.replace(stage, model="nano")).backbone.n_layers > 3
    final = run_stage(stage)
    assert (final / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    with pytest.raises(CheckpointError, match=r"runs: no config.json in it"):
        model_config_of(dataclasses.replace(stage, model=str(runs)))


def test_the_sizes_of_an_int8_model_are_those_of_its_floats(runs) -> None:
    quantize_folder(runs / "foundation-text" / "model", runs / "int8")
    changes = {"model": str(runs / "int8"), "phases": [{"steps": 1, "row_length": 192}]}
    assert load_model(run_stage(load_stage(write_stage(runs, **changes)))).config.int8 is None


def test_a_finished_stage_is_left_as_it_is(runs, capsys) -> None:
    path = write_stage(runs, phases=[{"steps": 2, "row_length": 64, "learning_rate": 1e-2}])
    run_stage(load_stage(path))
    listed = (runs / "stage2" / "left-out.tsv").read_text().splitlines()
    told = f"left out before step 2, listed in left-out.tsv: {len(listed)} longer than a row of 64 tokens, the longest"
    assert listed and told in capsys.readouterr().out
    before = (runs / "stage2" / "model" / "model.safetensors").stat().st_mtime_ns
    run_stage(load_stage(path))
    assert "stage2 is finished" in capsys.readouterr().out
    assert (runs / "stage2" / "model" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start_from": {"all": "stage1"}}, "stage2 starts from stage1, and .* is not there; train stage1 first"),
        (
            {"start_from": {"backbone": "stage1"}, "init_from": {"backbone": "RUNS/foundation-text/model"}},
            "stage2 starts its backbone from stage1; .*foundation-text/model is of foundation-text",
        ),
        ({"start_from": {"bridge": "nothing"}}, "no training.json that says which stage it is of"),
        ({"model": "RUNS/wide.json"}, "its backbone is of another model"),
        ({"model": "RUNS/broad.json"}, "its backbone is of another model; they differ in embed_tokens.weight"),
    ],
)
def test_a_folder_of_another_stage_is_refused(runs, monkeypatch, changes: dict, message: str) -> None:
    monkeypatch.setattr("longllava.train.stage.shipped_models", list)  # the foundation that ships is no way out
    (runs / "nothing" / "model").mkdir(parents=True)
    wide = (runs / "foundation-text" / "model" / "config.json").read_text().replace('"n_layers": 3', '"n_layers": 4')
    (runs / "wide.json").write_text(wide)
    broad = (runs / "foundation-text" / "model" / "config.json").read_text().replace("1920", "1930")
    (runs / "broad.json").write_text(broad)
    named = json.loads(json.dumps(changes).replace("RUNS", str(runs)))
    with pytest.raises(TrainingError, match=message):
        run_stage(load_stage(write_stage(runs, **named)))
    assert not (runs / "stage2").exists()  # nothing half-written


def test_a_stage_that_was_not_trained_is_named_also_where_a_foundation_ships(runs) -> None:
    with pytest.raises(TrainingError, match=r"stage2 starts from stage1, and .*stage1/model is not there; train"):
        run_stage(load_stage(write_stage(runs, start_from={"all": "stage1"})))


def test_a_misspelt_evaluation_is_told_before_training(runs) -> None:
    with pytest.raises(ConfigError, match="no task 'captoin'; have recall, facts, words, caption"):
        run_stage(load_stage(write_stage(runs, evaluate=["captoin"])))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluate": ["facts", "caption"]}, "evaluate: 'caption' asks about pictures, and this stage"),
        ({"phases": [{"steps": 1, "row_length": 256, "alignment_only": True}]},
         "phases.0.alignment_only: without pictures nothing would be learned"),
    ],
)  # fmt: skip
def test_a_stage_of_text_wants_no_pictures(runs, changes: dict, message: str) -> None:
    keys = {"recipe": "nano/foundation-text", "text_only": True, "train_only": ["backbone"], "start_from": {}}
    with pytest.raises(ConfigError, match=message):
        run_stage(load_stage(write_stage(runs, **keys, **changes)))
    assert not (runs / "stage2").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "cuda" if not torch.cuda.is_available() else "mps"}, "but this run is on c.*; set device: auto"),
        ({"frozen": ["bridge", "backbone"]}, "frozen: nothing is left that learns of train_only, backbone, bridge"),
        ({"phases": [{"steps": 1, "row_length": 64, "tokens_per_image": 7}]}, "phases.0.tokens_per_image: got 7"),
        *(({"phases": [{"steps": 1, "row_length": 256}, {"steps": 1, "row_length": 256, "tasks": tasks}]},
           f"phases.1.tasks: {told}")
          for tasks, told in (({"singel": {"weight": 1}}, "recipe .*: no source 'singel'"),
                              ({"single": {"weight": "high"}}, "source 'single': weight: expected float, got 'high'"))),
    ],
)  # fmt: skip
def test_what_would_train_otherwise_is_refused_before_the_first_step(runs, changes: dict, message: str) -> None:
    with pytest.raises((ConfigError, TrainingError), match=message):
        run_stage(load_stage(write_stage(runs, **changes)))
    assert not (runs / "stage2" / "log.jsonl").exists()


def test_a_record_of_the_log_is_of_one_phase(runs) -> None:
    phase = {"steps": 3, "row_length": 192, "learning_rate": 1e-3}
    run_stage(load_stage(write_stage(runs, phases=[{**phase, "alignment_only": True}, phase], log_every=4)))
    records = map(json.loads, (runs / "stage2" / "log.jsonl").read_text().splitlines())
    found = [(record["step"], record["phase"], "accuracy" in record) for record in records]
    assert found == [(3, 0, False), (4, 1, True), (6, 1, True)]  # an accuracy is of labels of its phase alone


def test_an_evaluation_follows_the_last_step(runs, capsys) -> None:
    run_stage(load_stage(write_stage(runs, evaluate=["caption", "needle@4"], eval_questions=6)))
    result = json.loads((runs / "stage2" / "evaluation.json").read_text())
    tasks = result["models"][0]["tasks"]
    assert list(tasks) == ["caption", "needle@4"] and tasks["caption"]["questions"] == 6
    assert "needle@4" in capsys.readouterr().out
    (runs / "stage2" / "evaluation.json").unlink()  # as if it had been stopped before the end of it
    run_stage(load_stage(runs / "stage2.yaml"))
    again = json.loads((runs / "stage2" / "evaluation.json").read_text())["models"][0]["tasks"]
    for task, figures in tasks.items():
        assert again[task] | {"seconds": 0} == figures | {"seconds": 0}


def test_processes_beside_the_first_write_nothing(runs, monkeypatch) -> None:
    path = write_stage(runs)
    before = sorted(runs.iterdir())
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(loop, "train", lambda *arguments: {})
    run_stage(load_stage(path))
    assert sorted(runs.iterdir()) == before


# --- a step that cannot be taken, and a part that must not change


def test_a_gradient_that_is_not_finite_changes_nothing_and_names_its_samples(runs, monkeypatch, capsys) -> None:
    phases = [{"steps": 2, "row_length": 192, "rows": 1, "learning_rate": 0.01}]
    real, seen = loop.Forward.forward, []

    def forward(self, batch, *arguments):
        loss, measured = real(self, batch, *arguments)
        seen.append(batch.sample_ids)
        return (loss * float("nan") if len(seen) == 2 else loss), measured

    monkeypatch.setattr(loop.Forward, "forward", forward)
    run_stage(load_stage(write_stage(runs, phases=phases, save_every=1)))
    printed = capsys.readouterr().out
    assert "step 2: the gradient is not finite, nothing is updated; samples: " + ", ".join(sorted(seen[1])) in printed
    first, second = (runs / "stage2" / "checkpoints" / f"step-{step:08d}" for step in (1, 2))
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert (first / file).read_bytes() == (second / file).read_bytes()
    start = weights(runs / "foundation-text")
    assert any(not torch.equal(tensor, start[name]) for name, tensor in load_file(first / "model.safetensors").items())


def test_a_run_that_diverged_ends_in_an_error(runs, monkeypatch) -> None:
    real = loop.Forward.forward

    def forward(self, *arguments):
        loss, measured = real(self, *arguments)
        return loss * float("inf"), measured

    monkeypatch.setattr(loop.Forward, "forward", forward)
    monkeypatch.setattr(loop, "NOT_FINITE_IN_A_ROW", 3)
    with pytest.raises(TrainingError, match="stage2: 3 steps in a row; step 3: the gradient is not finite, "):
        run_stage(load_stage(write_stage(runs)))
    assert not (runs / "stage2" / "model").exists()


def test_a_frozen_part_that_changed_is_an_error(runs, monkeypatch) -> None:
    real = loop.Forward.forward

    def forward(self, *arguments):
        with torch.no_grad():
            self.model.encoder.position_embedding.add_(1e-3)
        return real(self, *arguments)

    monkeypatch.setattr(loop.Forward, "forward", forward)
    with pytest.raises(TrainingError, match="encoder changed although it was frozen"):
        run_stage(load_stage(write_stage(runs)))


def test_rows_at_once_split_a_step_without_changing_it(runs) -> None:
    phase = {"steps": 3, "row_length": 192, "rows": 4, "learning_rate": 1e-3}
    for stage, at_once in (("whole", 0), ("split", 1)):
        run_stage(load_stage(write_stage(runs, stage=stage, phases=[phase | {"rows_at_once": at_once}])))
    for (step, whole, norm), (_, split, split_norm) in zip(losses(runs / "whole"), losses(runs / "split"), strict=True):
        assert (split, split_norm) == pytest.approx((whole, norm), rel=1e-3), step


# --- going on


LONG = {"phases": [{"steps": 14, "row_length": 128, "rows": 2, "learning_rate": 5e-3, "warmup": 2},
                   {"steps": 10, "row_length": 192, "rows": 1, "learning_rate": 5e-3,
                    "tasks": {"single": {"n_questions": [1, 3]}}}]}  # fmt: skip


def start(path: Path) -> subprocess.Popen:
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "longllava.train", str(path)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_step(child: subprocess.Popen, log: Path, step: int) -> None:
    while not (log.exists() and f'{{"step": {step},' in log.read_text()):
        assert child.poll() is None, child.stdout and child.stdout.read()
        time.sleep(0.005)


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
    real, n_calls = loop.Forward.forward, []

    def forward(self, *arguments):
        n_calls.append(1)
        if len(n_calls) == 5:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(loop.Forward, "forward", forward)
    with pytest.raises(KeyboardInterrupt):
        run_stage(load_stage(path))
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
    # what has not begun may change, what only rounds, and where a file lies
    changed = ["phases.1.steps=1", "log_every=5", "threads=2", f"recipe={runs / 'moved.yaml'}"]
    before = torch.get_num_threads()
    try:
        run_stage(load_stage(path, changed))
    finally:
        torch.set_num_threads(before)
    assert len(n_calls) == 5 + 15 - 3  # from the checkpoint of step 3


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
