"""A folder that stock transformers loads without code of ours: Llava with Jamba and CLIP, or the Jamba alone.

What a layout cannot express is refused. The prompt layout goes along as a chat template, in which a picture is the pad
token: it has a row in the vocabulary, which a new token would not, and no text makes it. Rows are padded with eos.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longllava.checkpoints.convert import maker, open_source
from longllava.checkpoints.folders import BESIDE, CONFIG
from longllava.checkpoints.save import config_fields, renamed
from longllava.checkpoints.towers import PREPROCESSOR, preprocessor_fields
from longllava.checkpoints.write import SHARD_BYTES, Output, write_folder
from longllava.config import EncoderConfig, ModelConfig, PromptConfig
from longllava.errors import CheckpointError, ConfigError
from longllava.files import expanded, write_json, write_text
from longllava.inputs.template import chat_template
from longllava.inputs.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

FORMATS = {"hf-llava": "llava", "jamba": "jamba"}  # format -> scheme of names


def export(
    source: str | Path,
    target: str | Path,
    format: str = "hf-llava",
    *,
    allow_unpooled: bool = False,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a model for stock transformers, tensor by tensor: weights, config.json, tokenizer, processor, template.

    format: "hf-llava" (LlavaForConditionalGeneration) or "jamba" (JambaForCausalLM, the language model alone).
    allow_unpooled: of a model that pools, all tokens of each picture: what it answers with tokens_per_image set to all
    of them, not what it was trained for. Raises: ConfigError naming all settings that the format cannot express.
    """
    if format not in FORMATS:
        raise CheckpointError(f"format: got {format!r}, allowed: {', '.join(FORMATS)}")
    opened = open_source(source, text_only=format == "jamba")
    target = expanded(target)
    if target.resolve() == opened.folder.resolve():
        raise CheckpointError(f"{target}: source and target are one folder; give another to write into")
    config = unpooled(opened.model.config) if allow_unpooled else opened.model.config
    outputs = {key: Output(shape, opened.dtype(key, dtype), maker(opened, key))
               for key, shape in opened.places.shapes.items()}  # fmt: skip
    try:
        fields, named = config_fields(config, FORMATS[format], outputs), renamed(outputs, FORMATS[format])
    except ConfigError as error:
        pools = "bridge.pool" in str(error)
        way = "; --allow-unpooled writes it with all tokens of each picture" if pools else ""
        raise ConfigError(f"{opened.folder}: {error}{way}") from None
    tokenizer = Tokenizer.from_folder(opened.folder, config.prompt)
    fields |= ids_of(tokenizer, config.encoder is not None)
    if "text_config" in fields:
        fields["text_config"] |= ids_of(tokenizer, False)

    def rest(staged: Path) -> None:
        write_json(staged / CONFIG, fields)
        tokenizer.save(staged)
        write_json(staged / "tokenizer_config.json", tokenizer_fields(config.prompt))
        write_json(staged / "generation_config.json", generation_fields(tokenizer, config.backbone.vocab_size))
        write_text(staged / "chat_template.jinja", chat_template(config.prompt, config.prompt.pad_token))
        if config.encoder is not None:
            write_json(staged / PREPROCESSOR, preprocessor_fields(config.encoder))
            write_json(staged / "processor_config.json", processor_fields(config.encoder, config.prompt))

    return write_folder(target, named, rest, shard_bytes, BESIDE)


def unpooled(config: ModelConfig) -> ModelConfig:
    if config.encoder is None or config.bridge is None:
        return config
    bridge = dataclasses.replace(config.bridge, pool="none", tokens_per_image=config.encoder.grid() ** 2)
    return dataclasses.replace(config, bridge=bridge)


def ids_of(tokenizer: Tokenizer, pictures: bool) -> dict[str, int]:
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.eos_id}
    return {**ids, "image_token_index": tokenizer.pad_id} if pictures else ids


def tokenizer_fields(prompt: PromptConfig) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": prompt.bos_token, "eos_token": prompt.eos_token,
        "pad_token": prompt.eos_token, "padding_side": "left", "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }  # fmt: skip


def generation_fields(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """suppress_tokens: rows of the vocabulary that no token has."""
    spare = list(range(tokenizer.vocab_size, vocab_size))
    return {**ids_of(tokenizer, False), **({"suppress_tokens": spare} if spare else {})}


def processor_fields(config: EncoderConfig, prompt: PromptConfig) -> dict[str, Any]:
    return {
        "processor_class": "LlavaProcessor", "image_token": prompt.pad_token, "patch_size": config.patch_size,
        "num_additional_image_tokens": int(config.class_token),
        "vision_feature_select_strategy": "default" if config.class_token else "full",
    }  # fmt: skip
