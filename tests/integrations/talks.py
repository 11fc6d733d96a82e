"""Conversations with a tiny model through transformers: what is asked, and the answers."""

import torch

from tests.tiny import tiny_pictures

PICTURES = tiny_pictures(3)
N_NEW = 12


def user(*parts):
    return {"role": "user", "content": [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]}  # fmt: skip


TALKS = [
    [user("what is this?")],
    [user(PICTURES[0], "what is this?")],
    [user("a ", PICTURES[1], " red", PICTURES[2], "?"), {"role": "assistant", "content": "a red heart"},
     user("\n", PICTURES[0], "is this the heart of what?")],
]  # fmt: skip


def prepared(processor, talk, **options):
    how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template(talk, **how, **options)


def answers(model, processor, inputs, **options):
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=N_NEW, **{"do_sample": False, **options})
    return processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
