"""What a run writes of itself names no folder of the machine; what it must keep to go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from longllava.config import ModelConfig
from longllava.data.recipes import Recipe
from longllava.data.worlds.sheets import CELL, COLUMNS, things
from longllava.errors import TrainingError
from longllava.train.config import PhaseConfig, TrainConfig
from longllava.train.record import command, environment, resume_facts
from longllava.train.state import compare


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("/home/someone/longllava/longllava/train/__main__.py", "-m longllava.train nano/stage1 seed=2"),
        ("/usr/lib/python3/site-packages/longllava/__main__.py", "-m longllava nano/stage1 seed=2"),
        ("/home/someone/.venv/bin/longllava", "longllava nano/stage1 seed=2"),
        ("/usr/lib/python3/site-packages/pytest/__main__.py", "-m pytest nano/stage1 seed=2"),
        ("benchmarks/vniah.py", "vniah.py nano/stage1 seed=2"),
    ],
)
def test_the_command_is_what_was_typed_without_folders(monkeypatch, program: str, expected: str) -> None:
    monkeypatch.setattr("sys.argv", [program, "nano/stage1", "seed=2"])
    assert command() == environment()["command"] == expected


def test_the_device_is_the_one_that_worked(monkeypatch) -> None:
    """On a machine with a GPU, what --device cpu had measured stood under the GPU's name."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device=None: f"card of {device}")
    assert environment("cpu")["device"] == "cpu"
    assert [environment(name)["device"] for name in ("cuda:1", None)] == ["card of cuda:1", "card of cuda"]


@pytest.mark.parametrize(
    ("change", "told"),
    [  # a stream's samples are shuffled in windows: some of an epoch would come again, others not at all
        ({"streaming": True}, "streaming.0: False then, True now"),
        ({"subset": "default"}, "versions.0.subset: None then, 'default' now"),
        ({"revision": "v2"}, "versions.0.revision: None then, 'v2' now"),
        # of the same number of samples, others: count is drawn from all that is not dropped
        ({"duplicates": "drop"}, "duplicates.0: 'refuse' then, 'drop' now"),
    ],
)
def test_a_run_does_not_go_on_with_another_form_of_a_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], told: str
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "arrow"))
    datasets.disable_progress_bars()
    monkeypatch.setenv("LONGLLAVA_CACHE", str(tmp_path / "cache"))
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "train.jsonl").write_text("".join(
        json.dumps({"id": str(number), "conversations": turns}) + "\n" for number in range(20)))  # fmt: skip
    config = TrainConfig(stage="s", model="nano", recipe="r", train_only=["bridge"],
                         phases=[PhaseConfig(steps=2, row_length=64)])  # fmt: skip
    facts = []
    for changes in ({}, change):
        source = {"name": "own", "kind": "llava", "format": "datasets", "path": "own", "count": 20, "licence": "CC0",
                  "origin": "x", **changes}  # fmt: skip
        (tmp_path / "r.yaml").write_text(yaml.safe_dump({"name": "r", "sources": [source]}))
        facts.append(resume_facts(config, Recipe.load(tmp_path / "r.yaml"), ModelConfig()))
    compare(facts[1], facts[1], 1)
    key = told.split(".")[0]
    compare({name: fact for name, fact in facts[0].items() if name != key}, facts[0], 1)  # an older checkpoint
    with pytest.raises(TrainingError, match=rf"begun with other settings \({told}\)"):
        compare(facts[0], facts[1], 1)


def test_a_run_does_not_go_on_with_a_sheet_that_was_drawn_anew(tmp_path: Path) -> None:
    """Half of the steps would have seen other pictures."""
    size = (COLUMNS * CELL, -(-len(things()) // COLUMNS) * CELL)
    source = {"name": "own", "kind": "world", "task": "single", "weight": 1, "licence": "CC0", "origin": "x"}
    pictures = {"styles": [str(tmp_path / "sheet.png")]}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"name": "r", "sources": [source], "pictures": pictures}))
    config = TrainConfig(stage="s", model="nano", recipe="r", train_only=["bridge"],
                         phases=[PhaseConfig(steps=2, row_length=64)])  # fmt: skip
    facts = []
    for colour in ("red", "red", "blue"):
        Image.new("RGBA", size, colour).save(tmp_path / "sheet.png")
        facts.append(resume_facts(config, Recipe.load(tmp_path / "r.yaml"), ModelConfig()))
    compare(facts[0], facts[1], 1)
    with pytest.raises(TrainingError, match=r"other settings \(sheets\..*sheet\.png: '\w+' then, '\w+' now\)"):
        compare(facts[0], facts[2], 1)


def test_what_later_versions_say_of_a_model_refuses_no_older_checkpoint() -> None:
    """Of other settings a name too many is a change: a part that starts from somewhere now."""
    older = {"architecture": {"backbone": {"width": 8}, "encoder": None}, "start_from": {"bridge": "stage1"}}
    now = {"architecture": {"backbone": {"width": 8, "new": 0}, "encoder": None}, "start_from": {"bridge": "stage1"}}
    compare(older, now, 1)
    with pytest.raises(TrainingError, match="architecture.backbone: "):
        compare(now, older, 1)
    with pytest.raises(TrainingError, match=r"architecture.backbone.width: 8 then, 9 now"):
        compare(older, {**now, "architecture": {"backbone": {"width": 9, "new": 0}, "encoder": None}}, 1)
    with pytest.raises(TrainingError, match="start_from"):
        compare(older, {**now, "start_from": {"bridge": "stage1", "backbone": "stage2"}}, 1)
