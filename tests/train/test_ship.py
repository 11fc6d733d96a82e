"""A finished curriculum in shipping form: what was trained, or a sentence, never weights that nobody trained."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from longllava import LongLLaVA
from longllava.errors import LongLLaVAError
from longllava.train.config import load_stage
from longllava.train.ship import ship
from longllava.train.stage import run_stage
from tests.tiny_world import write_stage


@pytest.fixture
def finished(runs: Path) -> Path:
    """Runs with a stage that is done, and a vision foundation as its own training leaves it."""
    path = write_stage(runs, phases=[{"steps": 1, "row_length": 192, "rows": 2}])
    sizes = json.loads((runs / "tiny.json").read_text())
    sizes["encoder"]["weights"] = "tiny-foundation"
    (runs / "tiny.json").write_text(json.dumps(sizes))
    run_stage(load_stage(path))
    save_file(encoder_of(runs), runs / "foundation-vision/encoder.safetensors")
    return runs


def encoder_of(runs: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(runs / "foundation-vision/model/model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if name.startswith("encoder.")}


def test_both_folders_hold_what_was_trained(finished: Path, tmp_path: Path) -> None:
    first, second = ship(finished, tmp_path / "assets")
    foundation, final = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    text = load_file(finished / "foundation-text/model/model.safetensors")
    trained = load_file(finished / "stage2/model/model.safetensors")
    wanted = encoder_of(finished) | {name: tensor for name, tensor in text.items() if name.startswith("backbone.")}
    for name, tensor in wanted.items():
        assert torch.equal(foundation[name].float(), tensor.to(foundation[name].dtype).float()), name
    assert final.keys() == {name for name in trained if not name.startswith("encoder.")}
    assert json.loads((second / "training.json").read_text())["stage"] == "stage2"
    talker = LongLLaVA.from_pretrained(str(first))
    assert isinstance(talker.generate("What is this?", images=["world:3.4.1.1.0.8.0@noto"], max_new_tokens=2), str)


@pytest.mark.parametrize("harm", ["nothing", "less", "other", "torn", "gone"])
def test_a_foundation_that_is_not_whole_is_not_shipped(finished: Path, tmp_path: Path, harm: str) -> None:
    file, tensors = finished / "foundation-vision/encoder.safetensors", encoder_of(finished)
    name = sorted(tensors)[0]
    told = f"its encoder is of another model; they differ in {name.removeprefix('encoder.')}"
    if harm == "nothing":
        save_file({"readout": torch.zeros(2)}, file)
    elif harm == "less":
        save_file({other: tensor for other, tensor in tensors.items() if other != name}, file)
    elif harm == "other":
        save_file({**tensors, name: torch.zeros(3)}, file)
    elif harm == "torn":
        file.write_bytes(b"torn")
        told = "encoder.safetensors: cannot be read"
    else:
        shutil.rmtree(file.parent)
        told = "foundation-vision: no such folder"
    with pytest.raises(LongLLaVAError, match=told):
        ship(finished, tmp_path / "assets")
    assert not (tmp_path / "assets").exists()


def test_the_command_says_in_a_sentence_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["ship", str(tmp_path / "none"), str(tmp_path / "assets")])
    monkeypatch.delitem(sys.modules, "longllava.train.ship")  # or runpy warns
    with pytest.raises(SystemExit, match="^longllava ship: .*/none: no finished stage there"):
        runpy.run_module("longllava.train.ship", run_name="__main__")
