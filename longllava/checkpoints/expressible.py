"""What the layouts of others have no word for. All of it is told at once."""

from __future__ import annotations

from longllava.checkpoints.towers import is_here, tower_config, vision_faults
from longllava.config import BackboneConfig, BridgeConfig, EncoderConfig, ModelConfig

TEXT_ONLY = ("jamba", "longllava")  # layouts of language models alone; Jamba-9B-Instruct is in LongLLaVA's
WITH_PICTURES = ("longllava", "llava")


def unexpressed(config: ModelConfig, scheme: str) -> list[str]:
    """Settings of a model that a layout cannot express, each with its reason; none: it can be written so."""
    faults = jamba_faults(config.backbone)
    if config.encoder is None or config.bridge is None:
        if scheme not in TEXT_ONLY:
            faults.append(f"encoder: none, but {scheme} describes a model with one; write {' or '.join(TEXT_ONLY)}")
        return faults
    if config.fusion.kind != "splice":
        faults.append(f"fusion.kind: {config.fusion.kind}, where pictures stand among the words")
    if scheme not in WITH_PICTURES:
        return [*faults, f"encoder: the layout {scheme} has none; write {' or '.join(WITH_PICTURES)}, or the text part"
                         " only"]  # fmt: skip
    faults += bridge_faults(config.bridge, config.backbone.width)
    return faults + {"longllava": longllava_faults, "llava": llava_faults}[scheme](config.encoder, config.bridge)


def jamba_faults(config: BackboneConfig) -> list[str]:
    faults = [f"backbone.{key}: Jamba has no such setting" for key in ("qk_norm", "log_length_scale")
              if getattr(config, key)]  # fmt: skip
    if config.head_dim * config.n_heads != config.width:
        faults.append(f"backbone.head_dim: {config.head_dim}; Jamba's is width / n_heads,"
                      f" {config.width / config.n_heads:g}")  # fmt: skip
    return faults


def bridge_faults(config: BridgeConfig, width: int) -> list[str]:
    faults = []
    if config.kind != "mlp":
        faults.append(f"bridge.kind: {config.kind}; there it is two linear layers")
    if config.hidden != width:
        faults.append(f"bridge.hidden: {config.hidden}; there it is the language model's width, {width}")
    if config.output_rms:
        faults.append(f"bridge.output_rms: {config.output_rms:g}; there is no norm after the bridge")
    return faults


def longllava_faults(encoder: EncoderConfig, bridge: BridgeConfig) -> list[str]:
    all_tokens, n_tokens, faults = encoder.grid() ** 2, bridge.tokens_per_image, []
    if n_tokens not in (all_tokens, all_tokens // 4):
        faults.append(f"bridge.tokens_per_image: {n_tokens}, only {all_tokens} and {all_tokens // 4}")
    if not encoder.weights:
        faults.append("encoder.weights: none; there the vision tower is named")
    elif is_here(encoder.weights):
        tower = tower_config(encoder.weights, select_layer=encoder.select_layer)
        differ = [key for key, value in vars(tower).items() if key != "weights" and getattr(encoder, key) != value]
        faults += [f"encoder.{key}: {getattr(encoder, key)}; there the named tower says it, and {encoder.weights} has"
                   f" {getattr(tower, key)}" for key in differ]  # fmt: skip
    return faults


def llava_faults(encoder: EncoderConfig, bridge: BridgeConfig) -> list[str]:
    all_tokens, faults = encoder.grid() ** 2, vision_faults(encoder)
    if bridge.tokens_per_image != all_tokens:
        faults.append(f"bridge.pool: {bridge.pool}, to tokens_per_image: {bridge.tokens_per_image} of {all_tokens}:"
                      " stock Llava does not pool")  # fmt: skip
    return faults
