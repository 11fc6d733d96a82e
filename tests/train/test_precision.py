"""Training in bf16: products are rounded, weights are not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from longllava.train import loop
from longllava.train.config import load_stage
from longllava.train.stage import run_stage
from tests.tiny_world import write_foundation, write_stage
from tests.train.runs import losses


def test_in_bfloat16_a_stage_trains_and_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in bf16 over fp32 weights, on the pictures too; what is saved is fp32."""
    monkeypatch.setenv("LONGLLAVA_CACHE", str(tmp_path / "cache"))
    runs = write_foundation(tmp_path / "runs")
    real, products = loop.Forward.forward, []

    def forward(self, *arguments):
        products.append((torch.ones(1, 1) @ torch.ones(1, 1)).dtype)
        return real(self, *arguments)

    monkeypatch.setattr(loop.Forward, "forward", forward)
    plan = {"phases": [{"steps": 3, "row_length": 192, "rows": 2, "learning_rate": 1e-2}], "eval_questions": 4}
    for stage, dtype in (("exact", "float32"), ("low", "bfloat16")):
        run_stage(load_stage(write_stage(runs, stage=stage, dtype=dtype, evaluate=["caption", "needle@4"], **plan)))
    assert products == 3 * [torch.float32] + 3 * [torch.bfloat16]
    for (step, loss, norm), (_, low, low_norm) in zip(losses(runs / "exact"), losses(runs / "low"), strict=True):
        assert low == pytest.approx(loss, rel=0.01) and low_norm == pytest.approx(norm, rel=0.02), step
        assert low_norm != norm, step
    assert all(tensor.dtype == torch.float32 for tensor in load_file(runs / "low/model/model.safetensors").values())
    assert json.loads((runs / "low" / "evaluation.json").read_text())["models"][0]["tasks"]["needle@4"]["questions"]
