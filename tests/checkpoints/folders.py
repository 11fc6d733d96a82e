"""A tiny model's folder, and what lies in any: read, changed, compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from longllava.checkpoints import save_model
from tests.tiny import tiny_model

TINY = tiny_model(3)


def save(folder: Path, **options) -> Path:
    return save_model(TINY.model, TINY.tokenizer, folder, **options)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object], name: str = "model.safetensors") -> None:
    tensors = load_file(folder / name)
    edit(tensors)
    save_file(tensors, folder / name)


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []
