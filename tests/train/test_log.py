"""What a run tells while it trains: losses of each source, operations, memory, and the trackers by name."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from longllava.data.packing import build_batch, encode_sample
from longllava.errors import ConfigError, TrainingError
from longllava.plan.operations import scan_operations
from longllava.settings import load
from longllava.shipped import shipped
from longllava.train.config import AidsConfig, TrainConfig, load_stage
from longllava.train.forward import Forward
from longllava.train.log import Meter, TrainingLog
from longllava.train.lora import add_adapters_
from longllava.train.optimizer import select_parts
from longllava.train.speed import Cost
from tests.tiny_world import world_model, world_samples


def batch_of(n: int, per_row: int, n_tokens: int = 4, n_experts: int = 1) -> tuple[Any, Any]:
    model, processor = world_model(n_experts=n_experts)
    items = [dataclasses.replace(encode_sample(sample, processor, n_tokens), source=f"source{number % 3}")
             for number, sample in enumerate(world_samples("nano/stage2", n))]  # fmt: skip
    rows = [items[at : at + per_row] for at in range(0, n, per_row)]
    return model.train(), build_batch(rows, max(sum(map(len, row)) for row in rows) + 5, 0)


def test_losses_of_the_sources_are_those_of_their_samples_alone() -> None:
    model, batch = batch_of(6, 2)
    pictures = torch.randn(len(batch.refs), 16, 16)
    forward = Forward(model, AidsConfig())
    _, measured = forward(batch, pictures, 4)
    names = ["source0", "source1", "source2"]
    assert sum(float(measured[f"loss/{name}"]) for name in names) == pytest.approx(float(measured["loss"]), rel=1e-5)
    assert sum(int(measured[f"labels/{name}"]) for name in names) == batch.n_labels
    at = torch.tensor([batch.sources.index(name) for name in names])  # samples 0, 1, 2: rows 0, 0, 1
    for name, number in zip(names, at.tolist()):
        row, place = divmod(number, 2)
        alone = dataclasses.replace(batch, labels_BL=torch.where(
            (torch.arange(3)[:, None] == row) & (batch.seq_idx_BL == place), batch.labels_BL, -100))  # fmt: skip
        others = [3 + i for i in range(3) if batch.sources[3 + i] == name]
        for other in others:
            row, place = divmod(other, 2)
            same = (torch.arange(3)[:, None] == row) & (batch.seq_idx_BL == place)
            alone.labels_BL[same] = batch.labels_BL[same]
        assert float(forward(alone, pictures, 4)[1]["loss"]) == pytest.approx(float(measured[f"loss/{name}"]), rel=1e-5)


def test_a_step_of_alignment_with_text_alone_has_a_gradient_of_zeros() -> None:
    model, batch = batch_of(2, 2)
    loss, _ = Forward(model, AidsConfig())(batch, None, 4, alignment_only=True)
    loss.backward()
    assert loss.item() == 0 and all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_a_record_divides_by_the_labels_of_each_source_over_all_processes() -> None:
    meter = Meter(peak=100.0)
    meter.add({"loss": 6.0, "loss/a": 2.0, "labels/a": 1, "loss/b": 4.0, "labels/b": 3}, 10, 4, 50)
    meter.seconds = 2.0
    twice = meter.take(lambda values: values * 2)
    assert twice["loss"] == 1.5 and twice["loss/a"] == 2.0 and twice["loss/b"] == pytest.approx(4 / 3)
    assert twice["tokens_per_second"] == 10 and twice["mfu"] == 0.5
    assert twice["memory_mb"] > 50 and "labels/a" not in twice
    meter.add({"loss": 1.0}, 1, 1)
    assert meter.take()["loss"] == 1.0  # begins anew


@pytest.mark.parametrize(
    ("n_tokens", "changes"),
    [(4, {}), (1, {}), (4, {"lora": {"rank": 3}}), (4, {"train_only": ["bridge"]})],
)
@pytest.mark.parametrize("n_experts", [1, 8])
def test_operations_are_those_of_torchs_products(n_tokens: int, changes: dict, n_experts: int) -> None:
    """Counted by torch, which sees no scan and no attention of the compiled kernels: those are taken away."""
    from torch.utils.flop_counter import FlopCounterMode

    model, batch = batch_of(4, 4, n_tokens, n_experts)
    stage = load(TrainConfig, {
        "stage": "s", "model": "", "recipe": "", "train_only": ["bridge", "backbone"],
        "phases": [{"steps": 1, "row_length": 8, "tokens_per_image": n_tokens}], **changes,
    })  # fmt: skip
    if stage.lora is not None:
        pytest.importorskip("peft")
        add_adapters_(model, stage.lora, 0)
    select_parts(model, stage.train_only)
    pictures = torch.randn(len(batch.refs), 4, 16)
    with FlopCounterMode(display=False) as counter:
        loss, _ = Forward(model, AidsConfig())(batch, pictures, n_tokens)
        loss.backward()
    cost = Cost(stage, model.config)
    backbone = model.config.backbone
    phase = dataclasses.replace(stage.phases[0], alignment_only=True)
    assert cost.of(batch, phase) == len(batch.refs) * n_tokens * 3 * 2 * 32 * (16 + backbone.width)  # the bridge's
    cost.token -= 3 * 2 * scan_operations(backbone)
    cost.pair = 0
    padded = batch.ids_BL.numel() - batch.n_tokens
    recomputed = 2 * backbone.vocab_size * backbone.width * batch.n_labels  # the loss makes logits again
    counted = cost.of(batch, stage.phases[0]) + padded * cost.token + recomputed
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_a_loss_that_is_not_finite_is_null_in_the_log(tmp_path: Path) -> None:
    with TrainingLog(tmp_path, step=0, total_steps=3, label="stage1", report_to=[]) as log:
        log.write(1, {"loss": float("nan"), "norm": float("inf"), "rate": 0.5})
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "loss": None, "norm": None, "rate": 0.5}


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_are_called_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []
    fake = types.ModuleType(name)
    fake.init = lambda **options: calls.append(("init", options))
    fake.log = lambda numbers, step: calls.append(("log", (numbers, step)))
    fake.finish = lambda: calls.append(("finish", None))
    monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with TrainingLog(tmp_path, step=0, total_steps=3, label="stage1", report_to=[name], settings={"seed": 4}) as log:
        log.write(2, {"loss": 0.5, "note": "words"})
    assert [what for what, _ in calls] == ["init", "log", "finish"]
    assert calls[0][1]["project"] == "longllava" and calls[0][1]["config"] == {"seed": 4}
    assert calls[1][1] == ({"loss": 0.5}, 2)
    assert os.environ["WANDB_MODE"] == "offline"
    assert json.loads((tmp_path / "log.jsonl").read_text()) == {"step": 2, "loss": 0.5, "note": "words"}


@pytest.mark.parametrize("kept", [0, 2])
def test_what_a_killed_run_told_after_its_checkpoint_is_void(tmp_path: Path, kept: int) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first, last, loss in ((0, 5, 9.0), (kept, 3, 8.0)):
        with TrainingLog(tmp_path, step=first, total_steps=5, label="x") as log:
            for step in range(first + 1, last + 1):
                log.write(step, {"loss": loss})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(one.step, one.value) for one in events] == [(one["step"], one["loss"]) for one in records]
    assert [one["loss"] for one in records] == [9.0] * kept + [8.0] * (3 - kept)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device here that is always full")
@pytest.mark.parametrize("end", [b'{"ste', b"\xff\0", b"5\n", b"[1]\n", b"null\n", b'{"step": "a"}\n'])
def test_a_log_whose_end_was_spoiled_loses_its_end(tmp_path: Path, end: bytes) -> None:
    """And keeps no run from going on."""
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1}\n' + end)
    with TrainingLog(tmp_path, step=3, total_steps=5, label="x", report_to=[]):
        assert (tmp_path / "log.jsonl").read_bytes() == b'{"step": 1}\n'


def test_a_full_disk_names_the_log(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match="No space left on device") as full,
        TrainingLog(tmp_path, step=0, total_steps=1, label="x", report_to=()) as log,
    ):
        log.file.close()
        log.file = open("/dev/full", "a", encoding="utf-8")
        log.write(1, {"loss": 1.0})
    assert full.value.filename == str(tmp_path / "log.jsonl")


def test_a_tracker_that_is_not_there_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(TrainingError, match="wandb cannot be imported .*; pip install wandb, or leave it out"):
        TrainingLog(tmp_path, step=0, total_steps=3, label="stage1", report_to=["wandb"])
    broken = tmp_path / "broken" / "tensorboard"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise TypeError('Descriptors cannot be created directly')")
    monkeypatch.syspath_prepend(broken.parent)
    for module in [name for name in sys.modules if ".tensorboard." in f".{name}."]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(TrainingError, match="tensorboard cannot be imported .Descriptors cannot .*; pip"):
        TrainingLog(tmp_path, step=0, total_steps=3, label="stage1")
    with pytest.raises(ConfigError, match="report_to: got 'wanda', allowed: tensorboard, wandb, trackio"):
        load_stage(shipped("configs", "train/nano/stage1.yaml"), ["report_to=[wanda]"])
