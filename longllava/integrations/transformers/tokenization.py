"""Our tokenizer as transformers' fast one.

In a string that it encodes, special tokens are what they are called, as everywhere in transformers: give a stranger's
text to the processor, which takes it as plain text.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerFast

from longllava.checkpoints import find_folder
from longllava.checkpoints.folders import CONFIG
from longllava.checkpoints.published import read_config
from longllava.files import expanded
from longllava.inputs.template import chat_template
from longllava.inputs.tokenizer import FILE_NAME, Tokenizer
from longllava.integrations.transformers.loading import hub_arguments


class LongLLaVATokenizer(PreTrainedTokenizerFast):
    """A folder's tokenizer.json, or tokenizer.model; its prompt layout is the chat template. Pads on the left."""

    model_input_names = ["input_ids", "attention_mask"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *inputs: Any, **kwargs: Any) -> LongLLaVATokenizer:
        saved = expanded(pretrained_model_name_or_path)
        if (saved / FILE_NAME).is_file() and not (saved / CONFIG).is_file():  # by save_pretrained, no model beside it
            return super().from_pretrained(saved, *inputs, **kwargs)
        folder = find_folder(pretrained_model_name_or_path, **hub_arguments(kwargs))
        prompt = read_config(folder).prompt
        backend = Tokenizer.from_folder(folder, prompt).backend
        backend.encode_special_tokens = False
        own: dict[str, Any] = {
            name: kwargs[name] for name in ("padding_side", "model_max_length", "chat_template") if name in kwargs
        }
        settings: dict[str, Any] = {
            "bos_token": prompt.bos_token, "eos_token": prompt.eos_token, "pad_token": prompt.pad_token,
            "padding_side": "left", "chat_template": chat_template(prompt), **own,
        }  # fmt: skip
        return cls(tokenizer_object=backend, name_or_path=str(pretrained_model_name_or_path), **settings)
