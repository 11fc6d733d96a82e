"""The three stages of nano as `make stage1 stage2 stage3 PRESET=smoke` runs them, from random foundations."""

from __future__ import annotations

import json
from pathlib import Path

from longllava import LongLLaVA
from longllava.checkpoints import save_model
from longllava.checkpoints.load import ASSETS
from longllava.config import ModelConfig
from longllava.files import write_json
from longllava.inputs.tokenizer import Tokenizer
from longllava.model import Model
from longllava.settings import load
from longllava.shipped import shipped
from longllava.train import main

STAGES = ("stage1", "stage2", "stage3")


def test_three_stages_of_nano(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LONGLLAVA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PRESET", "smoke")
    config = load(ModelConfig, shipped("configs", "models/nano"))
    model, tokenizer = Model(config), Tokenizer.from_folder(ASSETS / "nano", config.prompt)
    model.initialise_(0)
    for stage in ("foundation-vision", "foundation-text"):
        folder = save_model(model, tokenizer, Path("runs/nano") / stage / "model")
        write_json(folder / "training.json", {"stage": stage})
    for stage in STAGES:
        main(shipped("configs", f"train/nano/{stage}"))
        folder = Path("runs/nano-smoke") / stage
        record = json.loads((folder / "model" / "training.json").read_text())
        assert record["stage"] == stage and "commit" in record
        assert json.loads((folder / "evaluation.json").read_text())["models"][0]["tasks"]
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert log[-1]["step"] == record["steps"] and log[-1]["tokens_per_second"] > 0
    assert "single" in capsys.readouterr().out  # stage 3 says what it kept of stage 2
    assert not any((Path("runs/nano") / stage).exists() for stage in STAGES)  # a trial is not the real stage
    talker = LongLLaVA.from_pretrained("runs/nano-smoke/stage3/model")
    assert isinstance(talker.generate("What is this?", images=["world:3.4.1.1.0.8.0@noto"], max_new_tokens=4), str)
