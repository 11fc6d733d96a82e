"""Stages: what they start from, what they leave alone, and what is refused before they begin."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from longllava.checkpoints import load_model, quantize_folder
from longllava.errors import CheckpointError, ConfigError, TrainingError
from longllava.files import unfinished
from longllava.train import loop
from longllava.train.config import load_stage
from longllava.train.stage import main, model_config_of, run_stage
from tests.tiny_world import write_stage
from tests.train.runs import losses, weights

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


def test_a_fresh_model_follows_from_its_seed(runs) -> None:
    """The encoder too: a run that was killed before its first checkpoint, or went on with it frozen, had another."""
    keys = {"start_from": {}, "train_only": ["encoder", "bridge", "backbone"]}
    for stage in ("one", "two"):
        run_stage(load_stage(write_stage(runs, stage=stage, **keys)))
    one, two = weights(runs / "one"), weights(runs / "two")
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


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


@pytest.mark.parametrize("start", [{"all": "base"}, {"encoder": "foundation-vision", "backbone": "base"}])
def test_a_stage_of_text_goes_on_from_all_of_one_before(runs, start: dict) -> None:
    """Of which it reads what it has."""
    keys = {"recipe": "nano/foundation-text", "text_only": True, "train_only": ["backbone"],
            "phases": [{"steps": 1, "row_length": 256}]}  # fmt: skip
    run_stage(load_stage(write_stage(runs, stage="base", start_from={}, **keys)))
    final = run_stage(load_stage(write_stage(runs, start_from=start, **keys)))
    assert list(json.loads((final / "training.json").read_text())["started_from"]) == ["backbone"]


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


def test_figures_of_an_earlier_model_do_not_pass_for_those_of_the_next(runs, monkeypatch) -> None:
    """A phase was added; killed while its model was measured, the stage never was: the old figures lay there."""
    phase, keys = {"steps": 2, "row_length": 192, "learning_rate": 1e-2}, {"evaluate": ["caption"], "eval_questions": 2}
    run_stage(load_stage(write_stage(runs, phases=[phase], **keys)))
    (runs / "stage2" / "model" / "training.json").unlink()
    path = write_stage(runs, phases=[phase, phase], **keys)
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr("longllava.evals.curriculum.measure", stopped)
        run_stage(load_stage(path))
    assert not (runs / "stage2" / "evaluation.json").exists()
    run_stage(load_stage(path))
    assert (runs / "stage2" / "evaluation.json").exists()


def stopped(*arguments, **settings):
    raise KeyboardInterrupt


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


def test_a_launchers_gradient_accumulation_divides_nothing(runs, monkeypatch) -> None:
    """accelerate reads it wherever it is set: gradients were a quarter, and nothing told."""
    run_stage(load_stage(write_stage(runs, stage="plain")))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    run_stage(load_stage(write_stage(runs, stage="launched")))
    assert losses(runs / "launched") == losses(runs / "plain")


def test_what_a_killed_run_was_writing_goes_when_it_goes_on(runs) -> None:
    path, folder = write_stage(runs, phases=[{"steps": 1, "row_length": 192, "rows": 2}]), runs / "stage2"
    left = [unfinished(folder / name) for name in ("config.json", "averaged/phase-0.safetensors", "model/config.json")]
    kept = [folder / "averaged/.notes.tmp", folder / "averaged/phase-0.safetensors"]
    for file in (*left, *kept):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    run_stage(load_stage(path))
    assert not any(file.exists() for file in left) and all(file.exists() for file in kept)
