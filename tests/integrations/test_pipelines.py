"""transformers' pipelines: answers are LongLLaVA's."""

import pytest
import torch
from transformers import AutoModelForCausalLM, pipeline

import longllava.integrations.transformers as ours
from longllava.api import LongLLaVA
from longllava.errors import InputError
from tests.integrations.talks import N_NEW, PICTURES, TALKS
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def pipe(folder):
    return pipeline("image-text-to-text", model=str(folder), device="cpu")


def test_pipeline_of_messages_and_of_pictures(library, pipe):
    said = pipe(text=TALKS[2], max_new_tokens=N_NEW, return_full_text=False)[0]["generated_text"]
    assert said == library.generate(TALKS[2], max_new_tokens=N_NEW)
    asked = pipe(images=PICTURES[1], text="what is <image> ?", max_new_tokens=N_NEW, return_full_text=False)
    assert asked[0]["generated_text"] == library.generate("what is <image> ?", PICTURES[1], max_new_tokens=N_NEW)
    expected = [library.generate(talk, max_new_tokens=N_NEW) for talk in TALKS[1:]]
    for batch_size in (1, 2):
        both = pipe(text=TALKS[1:], max_new_tokens=N_NEW, batch_size=batch_size)
        assert [row[0]["generated_text"][-1]["content"] for row in both] == expected


def test_a_pipeline_that_was_saved_is_the_same(library, pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = pipeline("image-text-to-text", model=str(tmp_path), device="cpu")
    said = again(text=TALKS[2], max_new_tokens=N_NEW, return_full_text=False)[0]["generated_text"]
    assert said == library.generate(TALKS[2], max_new_tokens=N_NEW)


def test_pipeline_of_text_for_a_model_without_eyes(tmp_path):
    tiny_model(encoder=None, bridge=None).save_pretrained(tmp_path)
    library = LongLLaVA.from_pretrained(tmp_path, device="cpu", dtype="float32")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is ours.LongLLaVAForConditionalGeneration
    pipe = pipeline("text-generation", model=str(tmp_path), device="cpu")
    talk = [{"role": "user", "content": "what is this?"}]
    said = pipe(talk, max_new_tokens=N_NEW, do_sample=False, return_full_text=False)[0]["generated_text"]
    assert said == library.generate(talk, max_new_tokens=N_NEW)
    with pytest.raises(InputError, match="pixel_values: this model reads text only"):
        pipe.model(input_ids=torch.zeros(1, 4, dtype=torch.long), pixel_values=torch.zeros(1, 3, 16, 16))
