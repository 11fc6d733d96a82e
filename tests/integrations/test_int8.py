"""Int8 folders through transformers' doors."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

import longllava.integrations.transformers  # noqa: F401
from longllava.api import LongLLaVA
from longllava.checkpoints import load_model, quantize_folder
from longllava.config import Int8Config
from longllava.errors import CheckpointError
from longllava.nn import Context
from tests.tiny import tiny_model, tiny_pictures


def test_an_int8_folder_answers_and_is_saved_as_it_is(tmp_path):
    tiny_model(3).save_pretrained(tmp_path / "floats")
    folder = quantize_folder(tmp_path / "floats", tmp_path / "int8", Int8Config(parts=("backbone", "bridge")))
    library = LongLLaVA.from_pretrained(folder, device="cpu", dtype="float32")
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    parts = [{"type": "image", "image": tiny_pictures(1)[0]}, {"type": "text", "text": "a?"}]
    talk = [{"role": "user", "content": parts}]
    inputs = processor.apply_chat_template(talk, add_generation_prompt=True, tokenize=True, return_dict=True)
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert processor.batch_decode(ids, skip_special_tokens=True) == [library.generate(talk, max_new_tokens=8)]
    expected = model.state_dict()
    assert any(tensor.dtype == torch.int8 for tensor in expected.values())
    model.save_pretrained(tmp_path / "again")
    processor.save_pretrained(tmp_path / "again")
    found = LongLLaVA.from_pretrained(tmp_path / "again", device="cpu", dtype="float32").model.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    made = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    assert {key: tensor.dtype for key, tensor in made.state_dict().items()} == {
        key: tensor.dtype for key, tensor in expected.items()
    }


def test_int8_weights_saved_over_others_can_be_read(tmp_path):
    """The folder lists the files of the earlier ones; transformers, which writes others, knows nothing of that."""
    tiny_model(3).save_pretrained(tmp_path / "floats")
    folder = quantize_folder(tmp_path / "floats", tmp_path / "int8")
    model = AutoModelForImageTextToText.from_pretrained(folder)
    with torch.no_grad():
        model.backbone.final_norm.weight.add_(1)
    model.save_pretrained(folder)
    assert torch.equal(load_model(folder).backbone.final_norm.weight, model.backbone.final_norm.weight)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match="model.safetensors is not what int8.json lists"):
        load_model(folder)


def test_a_processor_of_the_floats_leaves_the_config_of_int8_weights(tmp_path):
    floats = tiny_model(3).save_pretrained(tmp_path / "floats")
    processor = AutoProcessor.from_pretrained(floats)
    folder = quantize_folder(floats, tmp_path / "int8", Int8Config())
    expected = (folder / "config.json").read_bytes()
    processor.save_pretrained(folder)
    assert (folder / "config.json").read_bytes() == expected
    load_model(folder)
    processor.save_pretrained(tmp_path / "alone")
    assert (tmp_path / "alone/config.json").read_bytes() == (floats / "config.json").read_bytes() != expected


def test_a_folder_that_says_nothing_of_rotation_is_saved_so(tmp_path):
    tiny_model(3).save_pretrained(tmp_path / "floats")
    folder = quantize_folder(tmp_path / "floats", tmp_path / "int8", Int8Config(rotated=()))
    config = json.loads((folder / "config.json").read_text())
    del config["int8"]["rotated"]
    (folder / "config.json").write_text(json.dumps(config))
    AutoModelForImageTextToText.from_pretrained(folder).save_pretrained(tmp_path / "again")
    x_BLD = torch.randn(1, 12, 32)
    with torch.inference_mode():
        before, after = (load_model(place)(x_BLD, Context())[0] for place in (folder, tmp_path / "again"))
    assert torch.equal(before, after)
