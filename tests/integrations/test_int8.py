"""Int8 folders through transformers' doors."""

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

import longllava.integrations.transformers  # noqa: F401
from longllava.api import LongLLaVA
from longllava.checkpoints import quantize_folder
from longllava.config import Int8Config
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
