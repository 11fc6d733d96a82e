"""Runs of stages, and what they leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from longllava.train import loop
from longllava.train.config import load_stage
from longllava.train.stage import run_stage

ROOT = Path(__file__).resolve().parents[2]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def losses(folder: Path) -> list[tuple[int, float, float]]:
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"], record["norm"]) for record in records]


def start(path: Path) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "longllava.train", str(path)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_step(child: subprocess.Popen, log: Path, step: int) -> None:
    while not (log.exists() and f'{{"step": {step},' in log.read_text()):
        assert child.poll() is None, child.stdout and child.stdout.read()
        time.sleep(0.005)


def stopped_at(path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Runs a stage until that forward pass. The list has an entry for each so far, of later runs too."""
    real, passes = loop.Forward.forward, []

    def forward(self, *arguments):
        passes.append(len(passes))
        if len(passes) == number:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(loop.Forward, "forward", forward)
    with pytest.raises(KeyboardInterrupt):
        run_stage(load_stage(path))
    return passes
