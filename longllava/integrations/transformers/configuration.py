"""A ModelConfig as transformers carries it. Saved, it is the config.json that this library writes, no more."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from longllava.checkpoints.folders import CONFIG
from longllava.checkpoints.published import config_of
from longllava.config import MODEL_TYPE, ModelConfig
from longllava.errors import CheckpointError
from longllava.files import json_text
from longllava.inputs.tokenizer import FILE_NAME, SENTENCEPIECE, Tokenizer
from longllava.settings import build

FIELDS = tuple(field.name for field in dataclasses.fields(ModelConfig) if field.name != "model_type")


class LongLLaVAConfig(PreTrainedConfig):
    """Fields of ModelConfig by their names, parts as dictionaries; and what transformers asks every config for.

    pad_token_id, bos_token_id, eos_token_id: of the folder's tokenizer. Image tokens stand where the pad id is and the
    attention mask is 1. Raises: ConfigError naming the field that is wrong.
    """

    model_type = MODEL_TYPE

    def __init__(self, **values: Any):
        ours = build(ModelConfig, {name: values.pop(name) for name in FIELDS if name in values}, "config")
        described = dataclasses.asdict(ours)
        values.pop("model_type", None)  # transformers keeps it on the class
        for name in FIELDS:
            setattr(self, name, described[name])
        self.pad_token_id = values.pop("pad_token_id", None)
        self.bos_token_id = values.pop("bos_token_id", None)
        self.eos_token_id = values.pop("eos_token_id", None)
        super().__init__(**values)
        self.tie_word_embeddings = self.backbone["tie_embeddings"]

    def model_config(self) -> ModelConfig:
        return build(ModelConfig, {name: getattr(self, name) for name in FIELDS}, "config")

    @property
    def image_token_id(self) -> int | None:
        return self.pad_token_id

    @property
    def vocab_size(self) -> int:
        return self.backbone["vocab_size"]

    @property
    def hidden_size(self) -> int:
        return self.backbone["width"]

    @property
    def num_hidden_layers(self) -> int:
        return self.backbone["n_layers"]

    @property
    def num_attention_heads(self) -> int:
        return self.backbone["n_heads"]

    @property
    def num_key_value_heads(self) -> int:
        return self.backbone["n_kv_heads"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        return super().from_pretrained(
            pretrained_model_name_or_path, **{"name_or_path": str(pretrained_model_name_or_path), **kwargs}
        )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:  # type: ignore[override]
        """A config.json's values. name_or_path: where it lies; then it is read strictly, with its tokenizer's ids."""
        if (name := kwargs.get("name_or_path")) is not None:
            folder = Path(name)
            written = {key: value for key, value in config_dict.items() if not key.startswith("_")}  # not transformers'
            config = build(ModelConfig, written, str(folder / CONFIG))
            config_dict = config_dict | dataclasses.asdict(config)
            with contextlib.suppress(CheckpointError):  # AutoProcessor would hide it; who needs the tokenizer says so
                config_dict |= token_ids(folder, config)
        return super().from_dict(config_dict, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self.model_config())

    def to_json_string(self, use_diff: bool = True) -> str:
        """What is saved: fields in our order, as save_model writes them."""
        return json_text(self.to_diff_dict()) if use_diff else super().to_json_string(use_diff=False)


class PublishedConfig(LongLLaVAConfig):
    """The config.json of LongLLaVA's own checkpoints. Read, it is a LongLLaVAConfig: saved again, so is the folder."""

    model_type = "llava_jamba"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:  # type: ignore[override]
        """Nothing but these values is read: at a name of the hub others may lie than in the revision they came from."""
        described = config_of(config_dict, Path(kwargs.get("name_or_path", cls.model_type)))
        return LongLLaVAConfig.from_dict(dataclasses.asdict(described), **kwargs)


def token_ids(folder: Path, config: ModelConfig) -> dict[str, int]:
    """pad, bos and eos of a folder's tokenizer; nothing for a folder without one, or a name of the hub."""
    if not any((folder / name).is_file() for name in (FILE_NAME, SENTENCEPIECE)):
        return {}
    tokenizer = Tokenizer.from_folder(folder, config.prompt)
    return {"pad_token_id": tokenizer.pad_id, "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
