"""config.json of others: LongLLaVA's (llava_jamba), plain Jamba's, and stock transformers' Llava with Jamba.

Sources: LongLLaVA @f349366 (Jamba/config.json, llava_jamba.py, clip_encoder.py); transformers 5.23,
configuration_jamba.py and configuration_llava.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from longllava.checkpoints.expressible import unexpressed
from longllava.checkpoints.folders import CONFIG
from longllava.checkpoints.towers import PREPROCESSOR, preprocessor_fields, tower_config, vision_fields, vision_values
from longllava.config import (
    MODEL_TYPE,
    PUBLISHED_PROMPT,
    BackboneConfig,
    BridgeConfig,
    EncoderConfig,
    ModelConfig,
    PromptConfig,
)
from longllava.errors import CheckpointError, ConfigError
from longllava.files import write_json
from longllava.settings import build, load, read_mapping

BACKBONE = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "num_hidden_layers": "n_layers",
    "attn_layer_period": "attention_every",
    "attn_layer_offset": "attention_at",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "intermediate_size": "mlp_width",
    "num_experts": "n_experts",
    "num_experts_per_tok": "n_experts_per_token",
    "expert_layer_period": "expert_every",
    "expert_layer_offset": "expert_at",
    "mamba_expand": "expand",
    "mamba_d_state": "state_size",
    "mamba_d_conv": "conv_size",
    "mamba_dt_rank": "dt_rank",
    "mamba_conv_bias": "conv_bias",
    "mamba_proj_bias": "proj_bias",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "initializer_range": "init_std",
}
# transformers' defaults where they are not ours: configs may leave them out
JAMBA_DEFAULTS = {"num_experts": 16, "mamba_dt_rank": "auto"}
PROMPT = "longllava_prompt"  # our key in their configs: how this model is spoken to, where that is not the layout's way
# settings that change the answers, and the only values that this library knows
FIXED: dict[str, tuple] = {
    "hidden_act": ("silu",),
    "sliding_window": (None,),
    "mamba_inner_layernorms": (True,),
    "quantization_config": (None,),
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_vision_select_feature": ("patch",),
    "mm_patch_merge_type": ("flat",),
    "mm_use_im_start_end": (False,),
    "projector_hidden_act": ("gelu",),
    "multimodal_projector_bias": (True,),
}


def read_config(folder: Path) -> ModelConfig:
    """The model of a folder, of ours or of a published layout. Raises: ConfigError, CheckpointError."""
    path = folder / CONFIG
    data = read_mapping(path)
    return load(ModelConfig, path) if data.get("model_type") in (None, MODEL_TYPE) else config_of(data, folder)


def config_of(data: Mapping[str, Any], folder: Path) -> ModelConfig:
    """The model that a published layout's config.json describes. folder: where it lies, with what stands beside it."""
    path, kind = folder / CONFIG, data.get("model_type")
    if not isinstance(kind, str) or kind not in READERS:
        raise CheckpointError(f"{path}: model_type {kind!r}; this library reads {', '.join(READERS)}, and its own")
    for key, allowed in FIXED.items():
        for part in (data, data.get("text_config")):
            if isinstance(part, dict) and part.get(key, allowed[0]) not in allowed:
                raise CheckpointError(f"{path}: {key} {part[key]!r} is not supported, only {allowed[0]!r}")
    return READERS[kind](data, folder)


def read_jamba(data: Mapping[str, Any], folder: Path) -> ModelConfig:
    backbone = backbone_of(data, folder)
    return ModelConfig(
        name=folder.name, encoder=None, bridge=None, backbone=backbone, prompt=prompt_of(data, folder, PromptConfig())
    )


def read_longllava(data: Mapping[str, Any], folder: Path) -> ModelConfig:
    """resamplePooling "2d" is 2 x 2 means, any other text 1-D; a checkpoint without it ran with all tokens."""
    tower = data.get("mm_vision_tower")
    if not isinstance(tower, str):
        raise CheckpointError(f"{folder / CONFIG}: mm_vision_tower {tower!r}; expected the vision tower's name")
    encoder = tower_config(tower, folder, data.get("mm_vision_select_layer", -2))
    if data.get("mm_hidden_size", encoder.width) != encoder.width:
        raise CheckpointError(
            f"{folder / CONFIG}: mm_hidden_size {data['mm_hidden_size']}, but {tower} has width {encoder.width}"
        )
    backbone, all_tokens = backbone_of(data, folder), encoder.grid() ** 2
    pooling = data.get("resamplePooling")
    pool = "none" if not pooling else "2d" if pooling == "2d" else "1d"
    n_tokens = all_tokens if pool == "none" else all_tokens // 4
    bridge = BridgeConfig(pool=pool, tokens_per_image=n_tokens, hidden=backbone.width)
    prompt = prompt_of(data, folder, PUBLISHED_PROMPT)
    return ModelConfig(name=folder.name, encoder=encoder, bridge=bridge, backbone=backbone, prompt=prompt)


def read_llava(data: Mapping[str, Any], folder: Path) -> ModelConfig:
    text = data.get("text_config")
    if not isinstance(text, dict) or text.get("model_type") != "jamba":
        raise CheckpointError(f"{folder / CONFIG}: text_config is not of model_type 'jamba', the only one supported")
    values = vision_values(data["vision_config"], folder) if "vision_config" in data else {}
    values["select_layer"] = data.get("vision_feature_layer", -2)
    encoder = build(EncoderConfig, values, f"{folder / CONFIG}: vision_config")
    strategy = data.get("vision_feature_select_strategy", "default")
    if (strategy == "default") != encoder.class_token:
        raise CheckpointError(
            f"{folder / CONFIG}: vision_feature_select_strategy {strategy!r}; 'default' drops the class token of CLIP,"
            " SigLIP has none and takes 'full'"
        )
    # one of the two says so, as transformers reads it
    tied = data.get("tie_word_embeddings") or text.get("tie_word_embeddings")
    backbone = backbone_of({**text, "tie_word_embeddings": tied}, folder)
    bridge = BridgeConfig(pool="none", tokens_per_image=encoder.grid() ** 2, hidden=backbone.width)
    prompt = prompt_of(data, folder, PromptConfig())
    return ModelConfig(name=folder.name, encoder=encoder, bridge=bridge, backbone=backbone, prompt=prompt)


READERS = {"jamba": read_jamba, "llava_jamba": read_longllava, "llava": read_llava}


def prompt_of(data: Mapping[str, Any], folder: Path, usual: PromptConfig) -> PromptConfig:
    """The layout's usual prompt, or the one that this library wrote beside the layout's own keys."""
    return build(PromptConfig, data[PROMPT], f"{folder / CONFIG}: {PROMPT}") if PROMPT in data else usual


def backbone_of(data: Mapping[str, Any], folder: Path) -> BackboneConfig:
    given = {**JAMBA_DEFAULTS, **data}
    values = {ours: given[theirs] for theirs, ours in BACKBONE.items() if given.get(theirs) is not None}
    width, n_heads = values.get("width", BackboneConfig.width), values.get("n_heads", BackboneConfig.n_heads)
    if isinstance(width, int) and isinstance(n_heads, int) and n_heads > 0:
        values["head_dim"] = width // n_heads
    if values.get("dt_rank") == "auto" and isinstance(width, int):
        values["dt_rank"] = -(-width // 16)
    return build(BackboneConfig, values, f"{folder / CONFIG}: backbone")


def published_config(config: ModelConfig, scheme: str) -> dict[str, Any]:
    """config.json of a scheme. Raises: ConfigError naming all settings that it cannot express."""
    if faults := unexpressed(config, scheme):
        raise ConfigError(f"the layout {scheme} cannot express {'; '.join(faults)}")
    usual = PUBLISHED_PROMPT if scheme == "longllava" and config.encoder else PromptConfig()
    said = {} if config.prompt == usual else {PROMPT: asdict(config.prompt)}
    text = jamba_fields(config.backbone)
    if config.encoder is None or config.bridge is None:
        more = {"mamba_inner_layernorms": True} if scheme == "longllava" else {}
        return {"architectures": ["JambaForCausalLM"], "model_type": "jamba", **text, **more, **said}
    return {**WRITERS[scheme](config.encoder, config.bridge, text), **said}


def write_config(staged: Path, fields: Mapping[str, Any], config: ModelConfig) -> None:
    """config.json, and what transformers keeps beside it: the mean and std of pictures, unless they are read so."""
    write_json(staged / CONFIG, fields)
    if config.encoder is not None and isinstance(vision := fields.get("vision_config"), dict):
        read = vision_values(vision, staged)
        if (read["mean"], read["std"]) != (config.encoder.mean, config.encoder.std):
            write_json(staged / PREPROCESSOR, preprocessor_fields(config.encoder))


def longllava_fields(encoder: EncoderConfig, bridge: BridgeConfig, text: dict) -> dict[str, Any]:
    return {
        "architectures": ["LlavaJambaForCausalLM"], "model_type": "llava_jamba", **text,
        "mamba_inner_layernorms": True, "mm_hidden_size": encoder.width, "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch", "mm_vision_select_layer": encoder.select_layer,
        "mm_vision_tower": encoder.weights, "use_mm_proj": True,
        "resamplePooling": bridge.pool if bridge.tokens_per_image != encoder.grid() ** 2 else None,
    }  # fmt: skip


def llava_fields(encoder: EncoderConfig, bridge: BridgeConfig, text: dict) -> dict[str, Any]:
    return {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
        "image_seq_length": encoder.grid() ** 2, "multimodal_projector_bias": True, "projector_hidden_act": "gelu",
        "text_config": {"model_type": "jamba", **text}, "vision_config": vision_fields(encoder),
        "tie_word_embeddings": text["tie_word_embeddings"], "vision_feature_layer": encoder.select_layer,
        "vision_feature_select_strategy": "default" if encoder.class_token else "full",
    }  # fmt: skip


WRITERS = {"longllava": longllava_fields, "llava": llava_fields}


def jamba_fields(config: BackboneConfig) -> dict[str, Any]:
    fields = {theirs: getattr(config, ours) for theirs, ours in BACKBONE.items()}
    return {**fields, "hidden_act": "silu", "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
