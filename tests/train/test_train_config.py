"""What a stage's YAML says: phases, rates, presets, overrides, and what is refused."""

from __future__ import annotations

import sys

import pytest
import torch

from longllava.errors import ConfigError, TrainingError
from longllava.shipped import shipped, shipped_names
from longllava.train import main
from longllava.train.config import PhaseConfig, learning_rate, load_stage
from longllava.train.engines import open_engine
from longllava.train.preview import preview

YAML = """
stage: s
model: nano
recipe: nano/stage2
train_only: [bridge]
phases:
  - {steps: 3, row_length: 64}
  - {steps: 2, row_length: 128, tasks: {single: {n_questions: [1, 2]}}}
optimizer: {clip: 0.5}
presets:
  smoke: {optimizer: {eps: 1.0e-6}, phases: [{steps: 1, row_length: 32}]}
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text(YAML)
    return file


def test_steps_belong_to_phases(path) -> None:
    config = load_stage(path)
    assert config.total_steps() == 5
    assert [config.phase_at(step) for step in range(5)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    with pytest.raises(ConfigError, match="step 5 lies after the last phase"):
        config.phase_at(5)


def test_rates_rise_stay_and_fall() -> None:
    phase = PhaseConfig(steps=10, row_length=1, learning_rate=1.0, final_learning_rate=0.2, warmup=2, hold=0.6)
    rates = [learning_rate(phase, step) for step in range(10)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    cosine = PhaseConfig(steps=4, row_length=1, learning_rate=1.0, final_learning_rate=0.0, decay="cosine")
    rates = [learning_rate(cosine, step) for step in range(4)]
    assert rates == pytest.approx([0.853553, 0.5, 0.146447, 0.0], abs=1e-6)
    assert learning_rate(PhaseConfig(steps=4, row_length=1, learning_rate=0.3), 3) == 0.3
    late = PhaseConfig(steps=6, row_length=1, learning_rate=1.0, final_learning_rate=0.0, warmup=4, hold=0.2)
    assert [learning_rate(late, step) for step in range(6)] == pytest.approx([0.25, 0.5, 0.75, 1, 0.5, 0])


def test_a_preset_lies_over_the_file_and_overrides_over_both(path) -> None:
    config = load_stage(path, ["preset=smoke", "phases.0.row_length=16", "optimizer.beta2=0.9"])
    assert config.preset == "smoke" and load_stage(path).preset == ""
    assert [(phase.steps, phase.row_length) for phase in config.phases] == [(1, 16)]
    assert (config.optimizer.eps, config.optimizer.clip, config.optimizer.beta2) == (1e-6, 0.5, 0.9)
    assert load_stage(path, ["phases.1.steps=7"]).phases[1].steps == 7


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("preset=tiny", "no preset 'tiny'; have smoke"),
        ("phases.2.steps=1", "phases has no item 2"),
        ("train_only.0.x=1", "train_only has no item 0"),
        ("train_only.0=bridge", "train_only is no mapping"),
        ("stpes=1", "stpes"),
        ("phases.0.steps=0", "steps"),
        ("train_only=[head]", "'head', allowed: encoder, bridge, backbone"),
        ("train_only=[]", "the list is empty"),
        ("phases=[]", "phases: the list is empty"),
        ("init_from={bridge: x}", "part 'bridge' is not in start_from"),
        ("phases.0.rows_at_once=3", "rows_at_once"),
        ("phases.0.rows_at_once=-1", "rows_at_once: got -1"),
        ("phases.0.warmup=-1", "warmup: got -1"),
        ("phases.0.final_learning_rate=-1", "final_learning_rate: got -1"),
        ("optimizer.clip=0", "clip: got 0"),
        ("optimizer.weight_decay=-1", "weight_decay: got -1"),
        ("optimizer.beta2=1", "beta2: got 1"),
        ("threads=-1", "threads: got -1"),
        ("threads=100000", "threads: got 100000, at most 1024 is allowed"),
        (f"seed={1 << 63}", f"seed: got {1 << 63}, must be smaller than 2^63"),
        ("aids.router_weight=-1", "router_weight: got -1"),
        ("phases.0.tasks={single: 5}", "tasks.single: expected a mapping, got 5"),
        ("preset=empty", "presets.empty: expected a mapping, got None"),
    ],
)
def test_what_is_wrong_is_named(path, override: str, message: str) -> None:
    if override == "preset=empty":
        path.write_text(f"{YAML}  empty:\n")
    with pytest.raises(ConfigError) as error:
        load_stage(path, [override])
    assert message in str(error.value)


@pytest.mark.parametrize("run", [main, preview])
def test_a_stage_without_its_name_is_no_vision_foundation(path, run) -> None:
    path.write_text(YAML.replace("stage: s\n", ""))
    with pytest.raises(ConfigError, match="missing 1 required keyword-only argument: 'stage'"):
        run(path)


def test_every_shipped_stage_and_its_smoke_can_be_read() -> None:
    names = [name for name in shipped_names("configs") if name.startswith("train/") and "vision" not in name]
    assert {"train/nano/stage1", "train/nano/stage2", "train/nano/stage3"} <= set(names)
    for name in names:
        config, smoke = load_stage(shipped("configs", name)), load_stage(shipped("configs", name), ["preset=smoke"])
        shipped("data_recipes", config.recipe)
        assert smoke.stage == config.stage and smoke.total_steps() < 10


def test_without_the_extra_for_training_it_is_one_sentence(path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(TrainingError, match=r"needs accelerate .*; pip install 'longllava\[train\]'"):
        open_engine(load_stage(path), torch.float32)
