"""Folders of peft that this library did not write: merged as peft merges them, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from longllava.checkpoints import load_model
from longllava.checkpoints.adapters import merge_, read_adapter
from longllava.errors import CheckpointError
from tests.checkpoints.folders import save


@pytest.mark.parametrize("begin", [True, "gaussian", "orthogonal", "pissa", "pissa_niter_2", "olora"])
def test_adapters_that_began_with_the_bases_weights_are_refused(tmp_path: Path, begin: Any) -> None:
    peft = pytest.importorskip("peft")
    base = save(tmp_path / "base")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["in_proj", "q_proj"], init_lora_weights=begin)
    theirs = peft.get_peft_model(load_model(base), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if ".lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(folder := tmp_path / "adapter")
    if str(begin).startswith(("pissa", "olora")):
        with pytest.raises(CheckpointError, match=f"init_lora_weights is '{begin}', which changes the base too"):
            read_adapter(folder)
        return
    mine = load_model(base)
    merge_(mine, read_adapter(folder), folder, base)
    for name, tensor in theirs.merge_and_unload().state_dict().items():
        torch.testing.assert_close(mine.state_dict()[name], tensor, rtol=0, atol=1e-5)
