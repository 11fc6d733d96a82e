"""DeepSpeed's ZeRO over two processes (gloo): the losses of one process, from one engine's checkpoint to the next."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from longllava.model import Model
from longllava.settings import save
from longllava.shipped import shipped
from longllava.train.config import PhaseConfig, TrainConfig, load_stage
from longllava.train.forward import Forward
from longllava.train.optimizer import select_parts
from longllava.train.stage import run_stage
from longllava.train.zero import Zero
from tests.tiny_world import world_config, write_stage
from tests.train.runs import losses
from tests.train.test_processes import compare, launch

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
FEW = {"needle": {"n_images": [2, 3], "n_questions": [1, 2], "weight": 1}, "facts": {"weight": 8}}
FIRST = {"steps": 3, "row_length": 192, "rows": 4, "rows_at_once": 1, "learning_rate": 5e-3, "tasks": FEW}
SECOND = FIRST | {"rows": 2, "row_length": 128}  # many a process then has a row of text alone


def plan(runs: Path, **changes: Any) -> dict[str, Any]:
    """A stage of a fresh mixture of experts, of which most are idle most of the time; its head is not tied."""
    config = world_config()
    backbone = dataclasses.replace(config.backbone, n_experts=8, n_experts_per_token=1)
    save(dataclasses.replace(config, backbone=backbone), runs / "experts.json")
    return {"model": str(runs / "experts.json"), "recipe": "nano/stage3",
            "start_from": {"encoder": "foundation-vision"},
            "frozen": ["backbone.final_norm"],
            "aids": {"router_weight": 0.01, "grounding_weight": 0.1, "alignment_weight": 0.1},
            "gradient_checkpointing": True, "phases": [FIRST, SECOND]} | changes  # fmt: skip


def run(path: Path, n: int) -> str:
    child = launch(path, n)
    printed, _ = child.communicate(timeout=300)
    assert child.returncode == 0, printed
    return printed


@needs_deepspeed
def test_two_processes_of_zero_are_one_and_go_on_from_each_others_checkpoints(runs: Path) -> None:
    whole = plan(runs)
    run_stage(load_stage(write_stage(runs, stage="one", **whole)))
    run(write_stage(runs, stage="two", **plan(runs, phases=[FIRST], engine="zero3")), 2)
    (runs / "two" / "model" / "training.json").unlink()
    printed = run(write_stage(runs, stage="two", **plan(runs, engine="zero2", offload="optimizer")), 2)
    assert "two: goes on after step 3" in printed
    compare(runs / "one", runs / "two")
    assert json.loads((runs / "two" / "model" / "training.json").read_text())["steps"] == 6


def few_of_nano(runs: Path, stage: str, engine: str, steps: int = 6) -> Path:
    """Steps of nano's own stage 3, begun at its foundations, as a YAML."""
    values = yaml.safe_load(shipped("configs", "train/nano/stage3.yaml").read_text("utf-8"))
    phase = {"steps": steps, "row_length": 1024, "rows": 4, "rows_at_once": 1, "learning_rate": 1e-3, "warmup": 2,
             "tasks": {"needle": {"n_images": [2, 8], "n_questions": [4, 8]}}}  # fmt: skip
    del values["presets"], values["evaluate"]
    values |= {"phases": [phase], "start_from": {"encoder": "foundation-vision", "backbone": "foundation-text"},
               "init_from": {"encoder": "nano-foundation", "backbone": "nano-foundation"}, "stage": stage,
               "average_phases": [], "output": str(runs / stage), "engine": engine, "log_every": 1,
               "save_every": 100, "window": steps, "device": "cpu", "dtype": "float32", "threads": 1}  # fmt: skip
    path = runs / f"{stage}.yaml"
    path.write_text(yaml.safe_dump(values), "utf-8")
    return path


class Reached(Exception):
    pass


def test_under_zero3_weights_are_shared_before_the_model_goes_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    shared: list[torch.dtype] = []

    def initialize(**arguments: Any) -> None:
        raise Reached

    def share(module: torch.nn.Module, **arguments: Any) -> None:
        shared.extend(parameter.dtype for parameter in module.parameters())

    config = TrainConfig(stage="one", model="nano", recipe="nano/stage2", train_only=["bridge"], engine="zero3",
                         phases=[PhaseConfig(steps=1, row_length=64)])  # fmt: skip
    zero = Zero.__new__(Zero)
    zero.config, zero.dtype, zero.stage, zero.rank, zero.device = config, torch.bfloat16, 3, 0, torch.device("cpu")
    zero.deepspeed = SimpleNamespace(zero=SimpleNamespace(Init=share), initialize=initialize)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, source: None)
    model = Model(world_config())
    with pytest.raises(Reached):
        zero.prepare(Forward(model, config.aids), select_parts(model, ["bridge"]), None)
    outside = sum(1 for _ in model.encoder.parameters())
    assert shared == [torch.bfloat16] * (sum(1 for _ in model.parameters()) - outside)


@pytest.mark.long
@needs_deepspeed
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_two_processes_train_nano_as_one(runs: Path, engine: str) -> None:
    run_stage(load_stage(few_of_nano(runs, "one", "torch")))
    run(few_of_nano(runs, "two", engine), 2)
    compare(runs / "one", runs / "two")


@pytest.mark.long
@needs_deepspeed
def test_in_bfloat16_the_curve_is_the_same_within_its_rounding(runs: Path) -> None:
    """What rounding does to the curve is seen on one process: bf16 against fp32, both of plain torch."""
    changes = {"phases": [FIRST | {"steps": 12, "learning_rate": 1e-2}], "dtype": "bfloat16"}
    run_stage(load_stage(write_stage(runs, stage="exact", **plan(runs, **changes | {"dtype": "float32"}))))
    run(write_stage(runs, stage="one", **plan(runs, **changes)), 1)
    exact, one = (losses(runs / stage) for stage in ("exact", "one"))
    rounding = furthest(exact, one)
    assert exact[0][1] - exact[-1][1] > 3 and 0 < rounding < 0.05
    for engine in ("zero2", "zero3"):
        run(write_stage(runs, stage=engine, **plan(runs, **changes), engine=engine), 2)
        two = losses(runs / engine)
        assert furthest(exact, two) < 3 * rounding, engine
        # AdamW does not see a gradient's scale; its norm does, where the routers do not yet choose other experts
        for (step, _, norm), (_, _, other) in zip(one[:8], two[:8], strict=True):
            assert other == pytest.approx(norm, rel=0.05), (engine, step)


def furthest(one: list[tuple[int, float, float]], other: list[tuple[int, float, float]]) -> float:
    return max(abs(loss - other_loss) for (_, loss, _), (_, other_loss, _) in zip(one, other, strict=True))
