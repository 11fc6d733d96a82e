"""Folders of peft that this library did not write: merged as peft merges them, or refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from longllava.checkpoints import load_model, quantize_folder
from longllava.checkpoints.adapters import merge, merge_, read_adapter
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


@pytest.mark.parametrize(
    ("edit", "config", "message"),
    [
        (lambda a, b: (a, b[:, 0]), {}, "adapters without a fitting other half: base_model.model.backbone.layers.0"),
        (lambda a, b: (a[0, 0], b), {}, "adapters without a fitting other half: base_model.model.backbone.layers.0"),
        (lambda a, b: (a, b[..., None]), {}, "adapters without a fitting other half: base_model.model.backbone."),
        (lambda a, b: (a, b), {"r": 8}, "adapters of another rank than r, 8: backbone.layers.0"),
        (lambda a, b: (a, b), {"lora_alpha": 10**400}, r"r is 4 and lora_alpha 10{39}, expected numbers"),
        (lambda a, b: (a.to(torch.float8_e4m3fn), b), {}, "floats of 8 bits in base_model.model.backbone.layers.0"),
    ],
)
def test_adapters_of_other_shapes_are_refused(tmp_path: Path, edit: Any, config: dict[str, int], message: str) -> None:
    name, halves = "base_model.model.backbone.layers.0.mixer.in_proj", edit(torch.ones(4, 32), torch.ones(128, 4))
    tensors = {f"{name}.lora_{half}.weight": x.contiguous() for half, x in zip("AB", halves, strict=True)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=message):
        read_adapter(tmp_path)


@pytest.mark.parametrize("name", ["adapter_config.json", "base.json"])
def test_brackets_without_an_end_are_a_file_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    save_file({"x": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / name).write_text("[" * 10**5)
    with pytest.raises(CheckpointError, match=f"{name}: cannot be read: maximum recursion"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "alpha", "dtype"),
    [
        ({"backbone.layers.0.mixer.in_proj.lora_B.weight": torch.full((128, 4), 9e4)}, 8, "float16"),
        ({"bridge.up.weight": torch.full((32, 16), 9e4)}, 8, "float16"),
        ({}, 1e300, "float32"),
    ],
)
def test_weights_that_become_infinite_are_told_and_not_written(
    tmp_path: Path, tensors: dict[str, torch.Tensor], alpha: float, dtype: str
) -> None:
    base, name = save(tmp_path / "base", dtype=getattr(torch, dtype)), "backbone.layers.0.mixer.in_proj"
    halves = {f"{name}.lora_A.weight": torch.ones(4, 32), f"{name}.lora_B.weight": torch.ones(128, 4)}
    (folder := tmp_path / "adapter").mkdir()
    save_file({f"base_model.model.{key}": x for key, x in (halves | tensors).items()},
              folder / "adapter_model.safetensors")  # fmt: skip
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": alpha, "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text("{}")
    told = f"(in_proj|bridge.up).weight has values beyond what torch.{dtype} holds; merge in torch.bfloat16"
    for run in (lambda: merge(base, folder, tmp_path / "out"), lambda: load_model(folder)):
        with pytest.raises(CheckpointError, match=told):
            run()
    assert not (tmp_path / "out").exists()


def test_adapters_whose_bases_lead_in_a_circle_are_refused(tmp_path: Path) -> None:
    name = "base_model.model.backbone.layers.0.mixer.in_proj"
    for own, base in (("a", "b"), ("b", "b"), ("c", "d"), ("d", "c")):
        (folder := tmp_path / own).mkdir()
        (folder / "config.json").write_text("{}")
        settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": str(tmp_path / base)}
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        save_file({f"{name}.lora_A.weight": torch.ones(4, 32), f"{name}.lora_B.weight": torch.ones(128, 4)},
                  folder / "adapter_model.safetensors")  # fmt: skip
    for own, found in (("a", "b"), ("b", "b"), ("c", "c")):
        told = f"{tmp_path / found / 'adapter_config.json'}: base_model_name_or_path leads back to this folder"
        with pytest.raises(CheckpointError, match=re.escape(told)):
            load_model(tmp_path / own)


def test_an_adapter_of_floats_is_not_of_another_model_than_their_int8_form(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = save(tmp_path / "base")
    theirs = peft.get_peft_model(load_model(base), peft.LoraConfig(r=4, target_modules=["in_proj"]))
    theirs.save_pretrained(folder := tmp_path / "adapter")
    int8 = quantize_folder(base, tmp_path / "int8")
    told = r"adapters go into weights of floats, and .*int8 has backbone.*in_proj.weight.* in int8; merge with"
    with pytest.raises(CheckpointError, match=told):
        merge(int8, folder, tmp_path / "out")
