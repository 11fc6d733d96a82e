"""The published models' stages: their hyper-parameters, what they need, and one step of each, 64 times narrower."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from longllava.checkpoints import save_model
from longllava.checkpoints.load import ASSETS
from longllava.config import ModelConfig
from longllava.errors import TrainingError
from longllava.inputs.tokenizer import Tokenizer
from longllava.model import Model
from longllava.settings import load, save
from longllava.shipped import shipped
from longllava.train.config import load_stage
from longllava.train.preview import preview
from longllava.train.stage import run_stage
from tests.train.test_processes import launch
from tests.train.test_zero import needs_deepspeed

MODELS = ("longllava-9b", "longllava-53b-a13b")
# Align.sh, SingleImageSFT.sh, MultiImageSFT.sh of FreedomIntelligence/LongLLaVA
PUBLISHED = {
    "stage1": (1e-4, 2048, ["bridge"]),
    "stage2": (1e-5, 40960, ["bridge", "backbone"]),
    "stage3": (1e-5, 40960, ["bridge", "backbone"]),
}


def path_of(model: str, stage: str) -> Path:
    return shipped("configs", f"train/{model}/{stage}.yaml")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("stage", PUBLISHED)
def test_hyper_parameters_are_the_published_ones(model: str, stage: str) -> None:
    config = load_stage(path_of(model, stage))
    (phase,) = config.phases
    assert (phase.learning_rate, phase.row_length, config.train_only) == PUBLISHED[stage]
    assert (phase.decay, phase.final_learning_rate, round(phase.warmup / phase.steps, 2)) == ("cosine", 0.0, 0.03)
    assert (config.optimizer.weight_decay, config.dtype, config.engine) == (0.0, "bfloat16", "zero3")
    assert config.gradient_checkpointing and config.aids.router_weight == (
        0.001 if model == "longllava-53b-a13b" and stage != "stage1" else 0.0)  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("stage", PUBLISHED)
def test_each_fits_eight_gpus_of_80_gb(model: str, stage: str) -> None:
    told = preview(path_of(model, stage), processes=8)
    assert "8 processes of zero3" in told and "do not divide" not in told
    found = re.search(r"estimated: ([0-9.]+) GB", told)
    assert found is not None and 5 < float(found[1]) < 72  # CUDA and NCCL take some too
    assert "8 rows do not divide among 16 processes" in preview(path_of(model, "stage3"), processes=16)


def narrow(folder: Path) -> Path:
    """LongLLaVA-9B's layout of 32 layers with widths divided by 64; a folder of weights of no stage, and its config."""
    config = load(ModelConfig, shipped("configs", "models/longllava-9b.yaml"))
    backbone = dataclasses.replace(config.backbone, width=64, mlp_width=224, n_heads=4, n_kv_heads=1, head_dim=16,
                                   dt_rank=4, vocab_size=1920)  # fmt: skip
    assert config.encoder is not None and config.bridge is not None
    encoder = dataclasses.replace(config.encoder, width=16, n_layers=2, n_heads=1, mlp_width=32, weights=None)
    bridge = dataclasses.replace(config.bridge, hidden=64)
    config = dataclasses.replace(config, backbone=backbone, encoder=encoder, bridge=bridge, n_parameters=None)
    torch.manual_seed(0)
    model = Model(config)
    model.initialise_(0)
    save_model(model, Tokenizer.from_folder(ASSETS / "nano", config.prompt), folder / "published")
    save(config, folder / "narrow.json")
    return folder / "published"


def test_one_step_of_each_by_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pretrained = narrow(tmp_path)
    few = {"stage3": ["phases.0.tasks={needle: {n_images: [2, 3], n_questions: [1, 2]}}"]}
    for stage, (rate, _, parts) in PUBLISHED.items():
        overrides = [
            f"model={tmp_path / 'narrow.json'}", f"recipe=nano/{stage}", f"output={tmp_path / stage}", "device=cpu",
            "dtype=float32", "engine=torch", "threads=1", "window=1", "phases.0.steps=1", "phases.0.rows=1",
            "phases.0.row_length=1024", "phases.0.warmup=1", *few.get(stage, ()),
        ]  # fmt: skip
        if stage == "stage1":
            with pytest.raises(TrainingError, match="stage1 starts its backbone from pretrained weights; say whose"):
                run_stage(load_stage(path_of("longllava-9b", stage), [*overrides, f"init_from.encoder={pretrained}"]))
            overrides += [f"init_from.backbone={pretrained}", f"init_from.encoder={pretrained}"]
        run_stage(load_stage(path_of("longllava-9b", stage), overrides))
        (line,) = (tmp_path / stage / "log.jsonl").read_text().splitlines()
        assert json.loads(line)["rate"] == rate
        record = json.loads((tmp_path / stage / "model" / "training.json").read_text())
        assert (record["stage"], record["trained"]) == (stage, parts)


@pytest.mark.long
@needs_deepspeed
def test_one_step_of_each_as_written_over_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engine, dtype and checkpointing are the YAMLs' own: ZeRO-3 in bf16."""
    monkeypatch.chdir(tmp_path)
    pretrained = start = narrow(tmp_path)
    for stage in PUBLISHED:
        overrides = [
            f"model={tmp_path / 'narrow.json'}", f"recipe=nano/{stage}", f"output={tmp_path / stage}", "device=cpu",
            "threads=1", "window=1", "phases.0.steps=1", "phases.0.rows=2", "phases.0.row_length=1024",
            "phases.0.warmup=1",
        ]  # fmt: skip
        if stage == "stage1":
            overrides += [f"init_from.backbone={pretrained}", f"init_from.encoder={pretrained}"]
        if stage == "stage3":
            overrides.append("phases.0.tasks={needle: {n_images: [2, 3], n_questions: [1, 2]}}")
        child = launch(path_of("longllava-9b", stage), 2, *overrides)
        printed, _ = child.communicate(timeout=300)
        assert child.returncode == 0, printed
        (line,) = (tmp_path / stage / "log.jsonl").read_text().splitlines()
        assert math.isfinite(json.loads(line)["loss"]) and json.loads(line)["norm"] > 0
        written = json.loads((tmp_path / stage / "config.json").read_text())["train"]
        assert (written["engine"], written["dtype"], written["gradient_checkpointing"]) == ("zero3", "bfloat16", True)
        trained = tmp_path / stage / "model"
        before, after = (load_file(folder / "model.safetensors") for folder in (start, trained))
        changed = {name.split(".")[0] for name in before if not torch.equal(before[name].float(), after[name])}
        assert changed == set(PUBLISHED[stage][2]), stage
        start = trained
