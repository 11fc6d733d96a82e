"""Words that start as the encoder's codes, and parts that stay as they are while the rest trains."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from longllava.checkpoints.load import ASSETS
from longllava.config import PromptConfig
from longllava.data.worlds.sheets import things
from longllava.errors import TrainingError
from longllava.inputs.tokenizer import Tokenizer
from longllava.train.names import FILE, name_codes_
from longllava.train.optimizer import select_parts

WIDTH = 24


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(ASSETS / "nano", PromptConfig())


def codes_in(folder, width: int = 16, n: int | None = None) -> torch.Tensor:
    codes = torch.nn.functional.normalize(torch.randn(n or len(things()), width), dim=-1)
    save_file({"codes": codes}, folder / FILE)
    return codes


def test_names_lie_as_their_codes_do_and_other_words_beside_them(tmp_path, tokenizer) -> None:
    torch.manual_seed(0)
    codes = codes_in(tmp_path)
    embeddings = torch.randn(tokenizer.vocab_size, WIDTH) * 0.1
    before = embeddings.clone()
    name_codes_(embeddings, tokenizer, tmp_path, seed=3)
    names = torch.tensor([tokenizer.encode(thing.name)[0] for thing in things()])
    others = torch.ones(len(embeddings), dtype=torch.bool)
    others[names] = False
    scale = before.norm(dim=1).mean()
    torch.testing.assert_close(
        embeddings[names] @ embeddings[names].T, codes @ codes.T * scale**2, rtol=1e-4, atol=1e-5
    )
    assert (embeddings[others] @ embeddings[names].T).abs().max() < 1e-5
    torch.testing.assert_close(embeddings[others].norm(dim=1), before[others].norm(dim=1))
    assert torch.linalg.matrix_rank(embeddings[others]) == WIDTH - 16


def test_what_cannot_be_used_is_named(tmp_path, tokenizer) -> None:
    embeddings = torch.randn(tokenizer.vocab_size, WIDTH)
    with pytest.raises(TrainingError, match="name_readout.safetensors; train the vision foundation first"):
        name_codes_(embeddings, tokenizer, tmp_path)
    codes_in(tmp_path, width=WIDTH)  # nothing would be left for the other words
    with pytest.raises(TrainingError, match=f"codes of {WIDTH} numbers"):
        name_codes_(embeddings, tokenizer, tmp_path)
    codes_in(tmp_path, n=5)
    with pytest.raises(TrainingError, match="5 codes"):
        name_codes_(embeddings, tokenizer, tmp_path)
    (tmp_path / FILE).write_bytes(b"torn")
    with pytest.raises(TrainingError, match=f"{FILE}: cannot be read"):
        name_codes_(embeddings, tokenizer, tmp_path)


def test_frozen_modules_inside_a_part_do_not_train() -> None:
    model = nn.ModuleDict(
        {"bridge": nn.Linear(2, 2), "backbone": nn.ModuleDict({"a": nn.Linear(2, 2), "ab": nn.Linear(2, 2)})}
    )
    assert [name for name, _ in select_parts(model, ["backbone"], ["backbone.a"])] == [
        "backbone.ab.weight",
        "backbone.ab.bias",
    ]
    assert [name for name, _ in select_parts(model, ["bridge"])] == ["bridge.weight", "bridge.bias"]
    with pytest.raises(TrainingError, match="no 'backbone.embed'"):
        select_parts(model, ["backbone"], ["backbone.embed"])
